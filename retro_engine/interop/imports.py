"""`retro import`: a model of another project as a checkpoint folder of this one.

Reads a Hugging Face folder, a .gguf or .nemo file, or a Megatron checkpoint; writes what `retro train --init-from`,
`retro eval` and `retro generate` read.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from retro_engine.config import ModelConfig
from retro_engine.data.chat_files import read_chat_files
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import MissingInputError, UsageError, nearest
from retro_engine.interop import huggingface, megatron_files
from retro_engine.interop.gguf_model import read_gguf
from retro_engine.interop.megatron import convert
from retro_engine.model.retro import RetroModel
from retro_engine.model.weights import new_model
from retro_engine.train.checkpoint import publish_model

FORMATS = ("auto", "hf", "gguf", "nemo", "mcore", "megatron")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GREEDY = {"greedy": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


@dataclass
class Imported:
    """A model of another project, and what its user should know."""

    model: RetroModel
    tokenizer: Tokenizer
    source: str
    notes: list[str] = field(default_factory=list)


def find_format(path: Path, source: str = "auto") -> str:
    """What `path` is. Raises UsageError for a format that is not known, MissingInputError for what is none."""
    if source not in FORMATS:
        raise UsageError(f"--format {source} is not known", nearest(source, list(FORMATS)), ", ".join(FORMATS))
    if not path.exists():
        raise MissingInputError(f"{path} does not exist", "", "name a folder or a file")
    if source != "auto":
        return source
    if path.suffix in (".gguf", ".nemo"):
        return path.suffix[1:]
    if (path / "config.json").is_file():
        return "hf"
    if path.suffix in (".pt", ".ckpt") or (path / ".metadata").is_file() or any(path.glob("mp_rank_*")):
        return "megatron"
    if any(path.glob("*.pt")):
        return "megatron"
    raise MissingInputError(f"{path} is not a model that is known", "", f"--format {', '.join(FORMATS[1:])}")


def import_model(
    path: str | Path,
    source: str = "auto",
    tokenizer: str | Path | None = None,
    metadata: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    end_token: str | None = None,
) -> Imported:
    """The model at `path`. `tokenizer`: a tokenizer.json or a folder with one, where the model's own is not beside it;
    `metadata`: settings that a Megatron or NeMo checkpoint does not have in it (`megatron.convert`); `end_token` ends a document (None: what the files say).

    Raises StoreError naming what does not fit, and MissingInputError where there is no tokenizer.
    """
    path = Path(path)
    kind = find_format(path, source)
    given = None if tokenizer is None else _given(tokenizer, end_token)
    config: ModelConfig
    notes: list[str] = []
    if kind == "hf":
        config, state, notes = huggingface.read_folder(path)
        given = given or _own(path, end_token)
        given.chat_files = read_chat_files(path)  # also of another's tokenizer: the model ends and chats as it did
    elif kind == "gguf":
        config, state, given, notes = read_gguf(path, given, end_token)
    else:
        if kind == "nemo":
            state, meta, given = megatron_files.read_nemo(path, given, end_token)
        else:
            kind, state, meta = megatron_files.read_checkpoint(path)
        config, state = convert(state, meta | {key: str(value) for key, value in (metadata or {}).items()}, kind)
    if given is None:
        raise MissingInputError(f"{path} has no tokenizer that is known", "", "--tokenizer PATH")
    huggingface.check_tokenizer(given, config, str(path))
    ends = [given.backend.id_to_token(i) or str(i) for i in given.end_ids]
    if len(ends) > 1 or given.chat_files.templates:
        chats = "there is a chat template" if given.chat_files.templates else "there is no chat template"
        notes.append(f"a text ends at {' or '.join(ends)}; {chats}")
    model = new_model(config, state, str(path))
    return Imported(model.to(dtype).eval(), given, kind, notes)


def _given(tokenizer: str | Path, end_token: str | None) -> Tokenizer:
    if str(tokenizer) == "auto":
        why = (
            "a model is imported with the tokenizer that it was trained with; another one's ids mean other words to it"
        )
        raise UsageError(
            "--tokenizer auto cannot be used", why, "--tokenizer PATH names a tokenizer.json or its folder"
        )
    if not Path(tokenizer).exists():
        raise MissingInputError(f"--tokenizer {tokenizer} does not exist", "", "name a tokenizer.json or its folder")
    return Tokenizer.load(tokenizer, end_token)


def _own(folder: Path, end_token: str | None) -> Tokenizer:
    """The tokenizer of a Hugging Face folder."""
    try:
        return Tokenizer.load(folder, end_token)
    except MissingInputError as error:
        why = "expected tokenizer.json, or vocab.json and merges.txt"
        raise MissingInputError(f"{folder} has no tokenizer that is read", why, "--tokenizer PATH names one") from error


def write_checkpoint(imported: Imported, folder: str | Path, path: str | Path) -> None:
    """Publish an imported model as a checkpoint; `path` is where it came from."""
    trainer = {"imported": imported.source, "from": Path(path).name}
    publish_model(Path(folder), imported.model, imported.tokenizer, trainer, GREEDY)
