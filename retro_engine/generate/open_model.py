"""A run's best checkpoint, or a checkpoint folder, as a model that generates: checked, in a type, on a device; and a plain
decoder as one that reads neighbors in front of its own keys (model/prefix.py), without new weights.
"""

from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from retro_engine.config import check_model
from retro_engine.data.checkpoint_files import opened, read_generation
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import UsageError
from retro_engine.model.device import pick_device
from retro_engine.model.retro import RetroModel
from retro_engine.train.adapters import load_model

READINGS = ("prefix", "none")  # of a plain decoder


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    folder: Path  # of the checkpoint
    model: RetroModel
    tokenizer: Tokenizer
    generation: dict[str, Any]  # generation_config.json: how it samples when nothing is said


def open_model(
    path: str | Path | Future[Path], dtype: str | torch.dtype | None = None, device: str | torch.device = "auto"
) -> OpenedModel:
    """`path`: a run's folder, a checkpoint's, or what `checkpoint_files.opening` gives. `dtype`: fp32, bf16, int8 or int4, for
    generation; one of torch's; None = as saved. `device`: auto (a GPU where there is one), cpu, gpu, or one of torch's.

    Raises MissingInputError for what is no run, StoreError for a file that is damaged, UsageError for the type.
    """
    folder = path.result() if isinstance(path, Future) else opened(path)
    place = pick_device(device) if isinstance(device, str) else device
    model = load_model(folder, dtype).to(place)
    generation = read_generation(folder)
    return OpenedModel(folder=folder, model=model, tokenizer=Tokenizer.load(folder), generation=generation)


def check_reading(model: RetroModel, asked: str | None) -> None:
    """Raise UsageError where `asked` (one of READINGS; None = nothing) is not how a model reads that was trained to."""
    c = model.config
    if asked is not None and asked not in READINGS:
        raise UsageError(
            f"reading {asked} cannot be used", "a plain decoder reads in front or not at all", "prefix, none"
        )
    if c.retrieval and asked not in (None, c.reading):
        raise UsageError(
            f"reading {asked} cannot be used",
            f"this model was trained with model.reading={c.reading}, which cannot be changed",
            "retrieval is off where there are no neighbors (--no-retrieval, mode off)",
        )


def read_in_front(
    model: RetroModel, tokenizer: Tokenizer, chunk_size: int | None = None, asked: dict[str, Any] | None = None
) -> None:
    """Let a plain decoder read neighbors in front. `chunk_size`: that of what it reads (None: the model's); `asked`: its
    num_neighbors, retrieved_length (else two chunks) and sink_id (else the tokenizer's; None = no token).

    Raises UsageError for a model that reads in a way of its own, and for settings under which it cannot read so.
    """
    c = model.config
    if c.retrieval:
        check_reading(model, "none")
    chosen: dict[str, Any] = {"retrieved_length": None, "sink_id": tokenizer.sink_id, **(asked or {})}
    config = replace(c, retrieval=True, reading="prefix", chunk_size=chunk_size or c.chunk_size, **chosen)
    check_model(config)
    most, front = config.most_tokens, config.first_position
    if most is not None and front >= most:
        raise UsageError(
            f"{config.num_neighbors} neighbors of {config.r} tokens cannot stand in front",
            f"the model has {most} positions",
            "fewer or shorter ones: model.num_neighbors=1, model.retrieved_length=N",
        )
    model.config = config
