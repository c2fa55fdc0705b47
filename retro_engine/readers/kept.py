"""What the first opening of a reader made of its base and its adapters, kept for later ones, which map it.

Reads and writes HOME/opened/NAME/DTYPE-KEY/: a checkpoint's folder without an optimizer (docs/formats.md), weights in
DTYPE, fp32 or bf16; KEY is of the hashes of both. Another base or other adapters of the same reader take its place.
"""

from concurrent.futures import Future
from pathlib import Path

from retro_engine.data import files
from retro_engine.data.checkpoint_files import COMPLETE, verify
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import InUseError, MissingInputError, RetroError, StoreError
from retro_engine.generate.open_model import OpenedModel, open_model
from retro_engine.interop.imports import GREEDY
from retro_engine.model.retro import RetroModel
from retro_engine.readers.places import Say, home, kept_type
from retro_engine.readers.reader_file import Reader
from retro_engine.train.checkpoint import publish_model


def kept_folder(reader: Reader, dtype: str) -> Path:
    return home() / "opened" / reader.name / f"{kept_type(dtype)}-{reader.key}"


def open_kept(folder: Path, dtype: str, say: Say, compared: Future[Path] | None = None) -> OpenedModel | None:
    """What was kept; None where nothing was, or what is there is damaged, which is said. `compared`: what `checkpoint_files.opened`
    says of it, where that has begun.
    """
    if not (folder / COMPLETE).is_file():
        return None
    try:
        return open_model(compared or folder, dtype, "cpu")
    except (StoreError, MissingInputError) as error:
        say(f"{error.what} ({error.why}): it is made again")
    except OSError as error:  # another process replaces it
        say(f"{folder} cannot be opened ({error}): it is made again")
    return None


def keep(folder: Path, model: RetroModel, tokenizer: Tokenizer, say: Say) -> None:
    """Write what was made, unless another process is at it; where it cannot be written, that is said."""
    place = folder.parent
    try:
        files.make_folder(place)
        with files.locked(place):
            if _is_whole(folder):  # another process has made it meanwhile
                return
            files.remove_tree(folder)
            publish_model(folder, model, tokenizer, {"imported": "a reader"}, GREEDY)
            for old in place.glob(f"{folder.name.partition('-')[0]}-*"):  # who has it open keeps its pages
                if old != folder:
                    files.remove_tree(old)
    except InUseError:
        return
    except (RetroError, OSError) as error:
        why = f"{error.what}: {error.why}" if isinstance(error, RetroError) else str(error)
        say(f"the opened reader cannot be kept, every start makes it anew ({why})")


def _is_whole(folder: Path) -> bool:
    if not (folder / COMPLETE).is_file():
        return False
    try:
        verify(folder)
    except (RetroError, OSError):
        return False
    return True
