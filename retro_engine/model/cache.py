"""What decoding keeps between steps: keys and values, the current chunk, the encoded neighbors.

Shape letters: B batch, S capacity, G key/value heads, E head width, M chunk length, D width, K neighbors,
R tokens per neighbor. Left-aligned chunks make every entry final once written: nothing is recomputed.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from retro_engine.config import ModelConfig
from retro_engine.model.decoder import StepWeights


@dataclass
class Cache:
    """Decoding state of a batch of sequences that advance together; made by `RetroModel.new_cache`."""

    keys_BSGE: list[Tensor]  # one a decoder layer, rotated
    values_BSGE: list[Tensor]
    is_token_BS: Tensor  # False = padding
    hidden_BMD: Tensor  # normed state of the current chunk at the first cross-attending layer
    length: int = 0  # tokens taken so far, padding included
    has_padding: bool = False
    pads_B: Tensor | None = None  # how much of a row is padding, when all of it is on the left
    # made at the first step of one token:
    weights: list[StepWeights] = field(default_factory=list)
    rotary: tuple[Tensor, Tensor] | None = None  # of every position
    cross_rotary: tuple[Tensor, Tensor] | None = None
    cross_keys: dict[int, Tensor] = field(default_factory=dict)  # layer -> [b, k*r, g, e] of the last whole chunk
    cross_values: dict[int, Tensor] = field(default_factory=dict)
    cross_mask: Tensor | None = None  # [b, k*r] True = valid; None = no neighbors so far

    @property
    def capacity(self) -> int:
        return self.is_token_BS.shape[1]


def new_cache(config: ModelConfig, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device) -> Cache:
    shape = (batch_size, capacity, config.key_value_heads, config.head_width)
    return Cache(
        keys_BSGE=[torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.dec_num_layers)],
        values_BSGE=[torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.dec_num_layers)],
        is_token_BS=torch.zeros(batch_size, capacity, dtype=torch.bool, device=device),
        hidden_BMD=torch.zeros(batch_size, config.chunk_size, config.hidden_size, dtype=dtype, device=device),
    )
