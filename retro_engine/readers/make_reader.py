"""`retro export RUN --reader BASE`: a reader's folder from a run whose adapters learned to read beside an imported base.

Reads the run's best checkpoint (adapters.safetensors, adapters.json, config.json), its settings and its base, and the
base's GGUF file, whose weights have to be those that the adapters learned beside; writes what readers/reader_file.py describes.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from retro_engine.config import LoraConfig, ModelConfig
from retro_engine.data import files
from retro_engine.data.checkpoint_files import ADAPTERS_FILE, is_imported, opened
from retro_engine.errors import RetroError, UsageError
from retro_engine.interop.gguf_model import read_gguf
from retro_engine.model.lora import is_adapter
from retro_engine.model.memory import MappedTensors
from retro_engine.model.weights import read_config
from retro_engine.readers.bases import find_base
from retro_engine.readers.reader_file import (
    CARD_FILE,
    READER_FILE,
    BaseFile,
    Reader,
    ReadingSettings,
    check_templates,
    read_reader,
)
from retro_engine.train import checkpoint, record
from retro_engine.train.adapters import read_weights
from retro_engine.train.run_data import run_config

MAX_NEW_TOKENS = 32


def make_reader(
    path: str | Path,
    folder: str | Path,
    base: str | Path,
    *,
    name: str | None = None,
    template: str | None = None,
    passage: str = "{text}",
    absent: str | None = None,
    k: int | None = None,
    chunk_size: int | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    card: str = "",
) -> Path:
    """Write the reader of a run to `folder`. `base`: the GGUF file that its base was imported from, or a name that
    `retro fetch` knows; `template` of the prompt, the `absent` answer and `k` passages: None = the run's; `chunk_size` of the
    texts that are searched (None: what lets a chunk and as much that follows it be read); `card`: what README.md says first.

    Raises UsageError for a run that holds no reader of this base, and for a folder that holds something.
    """
    files.check_unused(folder := Path(folder))
    found = opened(path)
    beside, config = checkpoint.read_base(found), read_config(found)
    if beside is None or not config.reads_prefix or not is_imported(beside.folder):
        raise UsageError(
            f"{found} holds no reader",
            "a reader is adapters beside an imported model, trained with model.reading=prefix",
            "retro train --init-from MODEL model.reading=prefix model.lora.rank=16",
        )
    file = find_base(base)
    _check_base(file.path, config, beside.folder)
    data = run_config(found, [], needed=()).model.data
    template = data.question_template if template is None else template
    absent = data.question_absent_answer if absent is None else absent
    check_templates(template, passage)
    own = MappedTensors(found / ADAPTERS_FILE)
    if odd := sorted(key for key in own if not is_adapter(key)):
        raise UsageError(f"{found} holds no reader", f"it learned whole matrices too: {', '.join(odd[:4])}")
    weights = _bytes({key: value.to(torch.bfloat16) for key, value in own.items()})
    with files.publish_folder(folder) as aside:
        files.publish(aside / ADAPTERS_FILE, [weights])
        reader = Reader(
            folder=aside,
            name=name or folder.resolve().name,
            base=BaseFile(name=file.name, file=file.path.name, sha256=file.sha256, get=file.get),
            lora=LoraConfig(rank=beside.lora.rank, alpha=beside.lora.alpha, targets=list(beside.lora.chosen)),
            reading=_reading(config, k, chunk_size),
            template=template,
            passage=passage,
            absent=absent,
            max_new_tokens=max_new_tokens,
            adapters=files.sha256_file(aside / ADAPTERS_FILE),
        )
        files.publish(aside / READER_FILE, [files.json_bytes(reader.to_json())])
        files.publish(aside / CARD_FILE, [_card(reader, found, card).encode()])
        try:
            read_reader(aside)
        except RetroError as error:  # a name, a text or a number that no reader may have
            raise UsageError(f"{folder} cannot be made", error.why) from error
    return folder


def _reading(config: ModelConfig, k: int | None, chunk_size: int | None) -> ReadingSettings:
    """A passage is a chunk and at most as much that follows it; where the question stands, chunks make no difference."""
    chunk_size = max(config.chunk_size, -(-config.r // 2)) if chunk_size is None else chunk_size
    return ReadingSettings(
        chunk_size=chunk_size,
        retrieved_length=min(config.r, 2 * chunk_size),
        num_neighbors=config.num_neighbors if k is None else k,
        sink_id=config.sink_id,
    )


def _check_base(path: Path, config: ModelConfig, imported: Path) -> None:
    """Raises UsageError unless the GGUF file has the weights that the adapters learned beside."""
    state, trained = read_gguf(path)[1], read_weights(imported)
    if state.keys() != trained.keys() or not all(_is_same(state[name], value) for name, value in trained.items()):
        raise UsageError(
            f"{path} is not what the run learned beside",
            f"the weights of {imported} are others",
            "name the file that was imported",
        )
    assert state["embedding.weight"].shape[0] == config.vocab_size


def _is_same(theirs: torch.Tensor, trained: torch.Tensor) -> bool:
    """`retro import` may have rounded them (--dtype)."""
    return theirs.shape == trained.shape and torch.equal(theirs.to(trained.dtype), trained)


def _bytes(state: dict[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    return save({key: value.contiguous() for key, value in state.items()}, {"format": "pt"})


def _card(reader: Reader, found: Path, card: str) -> str:
    """README.md: what its author says, then what the run knows of itself."""
    facts = record.read_facts(found.parent.parent)
    steps = checkpoint.read_trainer(found)["step"]
    command: Sequence[str] | str = facts.get("command", [])
    said = command if isinstance(command, str) else " ".join(map(str, command))
    rows = [f"- {name}: {value}" for name, value in asdict(reader.reading).items()]
    return (
        f"{card.strip() or f'# {reader.name}'}\n\n## How it was made\n\n"
        f"Adapters (LoRA, rank {reader.lora.rank}, alpha {reader.lora.alpha:g}, {', '.join(reader.lora.chosen)}; bf16) beside "
        f"{reader.base.file} (SHA-256 {reader.base.sha256}; {reader.base.get}), {steps:,} steps:\n\n"
        f"```sh\n{said}\n```\n\n## How it reads\n\nPassages in front of the prompt `{reader.template!r}`; "
        f"`{reader.absent}` says that they do not hold the answer.\n\n" + "\n".join(rows) + "\n"
    )
