"""What a run is, in lines: for its beginning, and for --dry-run."""

from dataclasses import replace

import torch
from retro_kernels.backend import backend

from retro_engine.config import Config, ModelConfig
from retro_engine.model.attention import left_to_pytorch
from retro_engine.model.retro import RetroModel
from retro_engine.train.run_data import RunData, order_of


def kernels_in_use(config: ModelConfig, device: str, precision: str) -> str:
    """The backend of a run's ops, and what of its attention is PyTorch's nevertheless."""
    wide = {"64": torch.float64, "16-mixed": torch.float16}
    name = backend(device, wide.get(precision, torch.bfloat16 if "bf16" in precision else torch.float32))
    left = left_to_pytorch(config)
    return name if name == "reference" or not left else f"{name} (PyTorch: {' and '.join(left)})"


def describe(config: Config, data: RunData) -> str:
    """What a run with these settings would be: one line."""
    model = replace(config.model, vocab_size=config.model.vocab_size or data.store.vocab_size)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in RetroModel(model).parameters())
    valid = len(data.valid.documents) if data.valid is not None else 0
    return (
        f"{count / 1e6:.2f} M parameters, {config.trainer.max_steps:,} steps; {len(data.train.documents):,} documents in "
        f"{data.train.epoch_length(order_of(config), 0):,} sequences of {model.encoder_seq_length} tokens an epoch, {valid:,} held out"
    )
