"""What decoding keeps between steps: keys and values, the current chunk, the encoded neighbors.

Shape letters: B batch, S capacity, G key/value heads, E head width, M chunk length, D width, K neighbors,
R tokens per neighbor. Left-aligned chunks make every entry final once written: nothing is recomputed.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from retro_engine.config import ModelConfig
from retro_engine.model.ops import Steps


@dataclass
class Cache:
    """Decoding state of a batch of sequences that advance together; made by `RetroModel.new_cache`."""

    keys_BSGE: list[Tensor]  # one a decoder layer, rotated
    values_BSGE: list[Tensor]
    is_token_BS: Tensor  # False = padding
    hidden_BMD: Tensor  # normed state of the current chunk at the first cross-attending layer
    starts_B: Tensor  # of a step of one token: its place, and its offset in the chunk that attends
    offsets_B: Tensor
    length: int = 0  # tokens taken so far, padding included
    has_padding: bool = False
    pads_B: Tensor | None = None  # how much of a row is padding, when all of it is on the left
    # of one token, on this memory; made anew, from the model's weights, after any other step and at each chunk's end
    steps: Steps | None = field(default=None, init=False, repr=False, compare=False)
    cross_keys: dict[int, Tensor] = field(default_factory=dict)  # layer -> [b, k*r, g, e] of the last whole chunk
    cross_values: dict[int, Tensor] = field(default_factory=dict)
    cross_mask: Tensor | None = None  # [b, k*r] True = valid; None = no neighbors so far

    @property
    def capacity(self) -> int:
        return self.is_token_BS.shape[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "steps": None}  # a copy has other memory

    def put_cross(self, layer: int, *keys_values: Tensor) -> None:
        """Rotated keys and values [b, k*r, g, e] of the last whole chunk; kept as `empty_keys` lie in memory."""
        dtype = self.keys_BSGE[0].dtype
        self.cross_keys[layer], self.cross_values[layer] = (
            part.to(dtype).transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
            for part in keys_values
        )


def empty_keys(batch_size: int, tokens: int, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[b, tokens, g, e] of zeros; in memory each head's tokens follow one another, as a step of decoding reads them."""
    shape = (batch_size, config.key_value_heads, tokens, config.head_width)
    return torch.zeros(shape, dtype=dtype, device=device).transpose(1, 2)


def new_cache(
    config: ModelConfig,
    batch_size: int,
    capacity: int,
    dtype: torch.dtype,
    device: torch.device,
    keys_dtype: torch.dtype,
) -> Cache:
    layers = range(config.dec_num_layers)
    return Cache(
        keys_BSGE=[empty_keys(batch_size, capacity, config, keys_dtype, device) for _ in layers],
        values_BSGE=[empty_keys(batch_size, capacity, config, keys_dtype, device) for _ in layers],
        is_token_BS=torch.zeros(batch_size, capacity, dtype=torch.bool, device=device),
        hidden_BMD=torch.zeros(batch_size, config.chunk_size, config.hidden_size, dtype=dtype, device=device),
        starts_B=torch.zeros(batch_size, dtype=torch.long, device=device),
        offsets_B=torch.zeros(batch_size, dtype=torch.long, device=device),
    )
