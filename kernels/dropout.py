"""Dropout of attention weights without a stored mask (arXiv 1207.0580): which weight is dropped is a hash of where it is.

A weight is dropped where 24 bits of mixed(h(seed, batch, head, query) ^ h(seed, key)) are below 2^24 p; what is kept is divided by
1 - p. `mixed` is the integer hash lowbias32. So forward, backward, recomputation and every backend, thread number and instruction
set have the same mask, and a run that is resumed goes on with the same: the seed is drawn from torch's generator.
Letters: B batch, H heads, N queries, S keys.
"""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def check(dropout: float) -> None:
    """Raises ValueError."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: expected at least 0 and below 1")


def new_seed(like: Tensor) -> Tensor:
    """int64, from the generator of the device."""
    return torch.randint(2**63 - 1, (), device=like.device)


def drop_below(dropout: float) -> int:
    """The smallest of 24 bits that is kept; 0 = nothing is dropped."""
    return round(dropout * 2**24)


def factors(dropout: float, seed: Tensor, batch_size: int, heads: int, queries_N: Tensor, keys_S: Tensor) -> Tensor:
    """[b, h, n, s] float32: 1/(1 - dropout) for the weights that are kept, else 0, of these numbers of queries and keys."""
    low, high = seed & _MASK, seed >> 32
    b, h = (torch.arange(n, device=queries_N.device) for n in (batch_size, heads))
    rows = _mixed(_mixed(_mixed(low + b)[:, None, None] + h[:, None]) + queries_N)
    bits = _mixed(rows[..., None] ^ _mixed(high + keys_S)) >> 8
    return (bits >= drop_below(dropout)).float() / (1 - dropout)


def _mixed(x: Tensor) -> Tensor:
    """Of 32 bits, in int64."""
    x = x & _MASK
    x = (x ^ x >> 16) * 0x7FEB352D & _MASK
    x = (x ^ x >> 15) * 0x846CA68B & _MASK
    return x ^ x >> 16
