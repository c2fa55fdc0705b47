"""Which types a run computes in: the one that is asked for, or the faster one; and what follows for the weights.

32 | 64 | bf16-mixed | 16-mixed (autocast over fp32 weights); O2 = weights in bf16, with fp32 copies that are updated.
"""

import time
from dataclasses import dataclass

import torch

from retro_engine.config import Config
from retro_engine.evaluate.losses import autocast
from retro_engine.model.linear import Linear


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What `name` means for a run of this strategy."""

    name: str
    is_o2: bool
    strategy: str  # none | ddp | fsdp

    @property
    def autocast(self) -> str:
        return "32" if self.is_o2 else self.name

    @property
    def has_master(self) -> bool:
        """The optimizer holds fp32 copies; FSDP shards fp32 weights and gathers bf16 copies instead."""
        return self.is_o2 and self.strategy != "fsdp"

    @property
    def weights(self) -> torch.dtype:
        return torch.bfloat16 if self.has_master else torch.float64 if self.name == "64" else torch.float32

    @property
    def products(self) -> torch.dtype:
        """The type in which matrices are multiplied."""
        names = {"32": torch.float32, "64": torch.float64, "16-mixed": torch.float16}
        return torch.bfloat16 if self.is_o2 else names.get(self.name, torch.bfloat16)

    @property
    def is_scaled(self) -> bool:
        """The loss, so that fp16's small gradients are not 0."""
        return self.name == "16-mixed"


def has_fast_bf16() -> bool:
    """Whether this processor multiplies bf16; where it does not, bf16 is many times slower than fp32."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512") and torch.cpu._is_avx512_bf16_supported()


def asked_precision(config: Config) -> str | None:
    """What the settings say; None = auto."""
    if config.trainer.precision != "auto":
        return config.trainer.precision
    return "bf16-mixed" if config.model.megatron_amp_O2 else None


def faster_precision(config: Config, device: torch.device) -> str:
    """ "32" or "bf16-mixed": a layer's forward and backward are timed in both, where the device multiplies bf16."""
    if device.type == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32"
    if not has_fast_bf16():
        return "32"
    m = config.model
    layer = torch.nn.Sequential(
        Linear(m.hidden_size, m.ffn_hidden_size),
        torch.nn.GELU(),
        Linear(m.ffn_hidden_size, m.hidden_size),
    )
    x = torch.zeros(m.micro_batch_size * m.encoder_seq_length, m.hidden_size)

    def best_s(is_bf16: bool) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            with autocast(device, "bf16-mixed" if is_bf16 else "32"):
                out = layer(x)
            out.float().sum().backward()
            times.append(time.perf_counter() - start)
        return min(times[1:])

    return "bf16-mixed" if best_s(True) < 0.9 * best_s(False) else "32"
