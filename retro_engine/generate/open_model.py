"""A run's newest checkpoint, or a checkpoint folder, as a model that generates: checked, in a type, on a device."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from retro_engine.data.tokenizer import Tokenizer
from retro_engine.model.device import pick_device
from retro_engine.model.quantize import use_weights
from retro_engine.model.retro import RetroModel
from retro_engine.model.weights import load_model
from retro_engine.train import checkpoint


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    folder: Path  # of the checkpoint
    model: RetroModel
    tokenizer: Tokenizer
    generation: dict[str, Any]  # generation_config.json: how it samples when nothing is said


def open_model(
    path: str | Path, dtype: str | torch.dtype | None = None, device: str | torch.device = "auto"
) -> OpenedModel:
    """`dtype`: fp32, bf16 or int8, for generation; one of torch's; None = as saved. `device`: auto (a GPU where there is
    one), cpu, gpu, or one of torch's.

    Raises MissingInputError for what is no run, StoreError for a file that is damaged, UsageError for the type.
    """
    folder = checkpoint.find_checkpoint(path)
    checkpoint.verify(folder)
    place = pick_device(device) if isinstance(device, str) else device
    model = load_model(folder, dtype if isinstance(dtype, torch.dtype) else None)
    if isinstance(dtype, str):
        use_weights(model, dtype)
    model.to(place)
    generation = checkpoint.read_generation(folder)
    return OpenedModel(folder=folder, model=model, tokenizer=Tokenizer.load(folder), generation=generation)
