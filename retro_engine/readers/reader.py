"""A reader, opened: its base's weights with its adapters merged into them, reading in front as it was taught to.

Reads the base's .gguf file, one tensor at a time, and the reader's folder (readers/reader_file.py), or what an earlier
opening made of them.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from retro_engine.data.checkpoint_files import ADAPTERS_FILE
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import StoreError, extra
from retro_engine.generate.open_model import OpenedModel, read_in_front
from retro_engine.interop.gguf_file import read_gguf_file
from retro_engine.interop.gguf_model import each_weight, read_header
from retro_engine.interop.huggingface import check_names, check_tokenizer, read_decoder
from retro_engine.interop.imports import GREEDY
from retro_engine.model.lora import A, B, merged
from retro_engine.model.memory import MappedTensors
from retro_engine.model.quantize import check_weights, use_weights
from retro_engine.model.retro import RetroModel
from retro_engine.model.weights import new_model
from retro_engine.readers.ahead import Comparing
from retro_engine.readers.kept import keep, kept_folder, open_kept
from retro_engine.readers.places import Say, nobody
from retro_engine.readers.reader_file import Reader
from retro_engine.train.precision import has_fast_bf16


def default_dtype() -> str:
    return "bf16" if has_fast_bf16() else "fp32"


def open_reader(reader: Reader, base: Path | Comparing, dtype: str | None = None, say: Say = nobody) -> OpenedModel:
    """The model of a reader beside `base`, a file of which the hash was compared (bases.py `base_path`), or is meanwhile. `dtype`: fp32,
    bf16, int8 or int4 (None: what is faster here). What the first opening makes is kept for later ones (readers/kept.py).

    Raises StoreError for adapters of another base, and what comparing it raises.
    """
    dtype = default_dtype() if dtype is None else dtype
    check_weights(dtype)
    folder = kept_folder(reader, dtype)
    path, kept = (base.base.result(), base.kept) if isinstance(base, Comparing) else (base, {})
    opened = open_kept(folder, dtype, say, kept.get(folder))
    if opened is None:
        model, tokenizer = _merged(reader, path, torch.bfloat16 if dtype == "bf16" else torch.float32)
        keep(folder, model, tokenizer, say)
        opened = OpenedModel(folder=folder, model=model, tokenizer=tokenizer, generation=dict(GREEDY))
        use_weights(model, dtype)
    reading = reader.reading
    asked = {name: getattr(reading, name) for name in ("num_neighbors", "retrieved_length", "sink_id")}
    read_in_front(opened.model, opened.tokenizer, reading.chunk_size, asked)
    opened.model.requires_grad_(False)
    return replace(opened, folder=reader.folder)


def _merged(reader: Reader, base: Path, dtype: torch.dtype) -> tuple[RetroModel, Tokenizer]:
    """The base with the adapters added to its matrices, one at a time, and its tokenizer."""
    with extra("ask", "gguf is not installed", "it reads what a reader stands on"):
        import gguf  # noqa: F401
    file = read_gguf_file(base)
    values, tokenizer, _ = read_header(file)
    config, names, _ = read_decoder(values, len(file.tensors), file.name)
    check_tokenizer(tokenizer, config, file.name)
    ours = {theirs: name for name, theirs in names.items()}
    adapters = MappedTensors(reader.folder / ADAPTERS_FILE)
    odd = sorted({key.removesuffix(A).removesuffix(B) for key in adapters} - {n.removesuffix(".weight") for n in names})
    if odd:
        why = f"{base} has no {', '.join(odd[:4])}"
        raise StoreError(f"the adapters of {reader.name} do not fit their base", why, "take another reader")
    state: dict[str, Tensor] = {}
    for theirs, weight in each_weight(file, values):
        name = ours.get(theirs, theirs)  # what is no part of the model is refused below
        key = name.removesuffix(".weight")
        own = {key + end: adapters[key + end] for end in (A, B) if key + end in adapters}
        whole = (
            merged({name: weight, **own}, reader.lora, str(reader.folder / ADAPTERS_FILE)) if own else {name: weight}
        )
        state[name] = whole[name].to(dtype)
    check_names(set(state), set(names), file.name)
    return new_model(config, state, file.name).eval(), tokenizer
