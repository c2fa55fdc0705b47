"""Chunked cross-attention of RETRO (arXiv 2112.04426 section 2.4), causal shift and masks included.

Tokens um+m-1 ... um+2m-2 attend, under one softmax, all valid tokens of chunk u's neighbors. With cos and sin
the query at offset i is rotated at position i + m - 1 and the key i' of each neighbor at i'.
Reads q, k, v once and writes o once: bytes(q + k + v + o) is the roofline.
"""

from retro_kernels import reference
from retro_kernels.backend import backend
from torch import Tensor


def chunked_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    neighbor_lengths: Tensor | None = None,
    chunk_length: int = 64,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    scale: float | None = None,
    query_offset: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """q [b, n, h, e]; k, v [b, l, K, r, h_kv, e]; neighbor_lengths [b, l, K] -> [b, n, h, e].

    Exactly 0 before token m-1 and where a chunk has no valid neighbor; `neighbor_lengths` None = all full,
    0 = missing. l is floor(n / chunk_length). `scale` None = 1/sqrt(e). `query_offset` None = chunk_length - 1.
    Raises ValueError naming the argument, its shape and the rule.
    """
    if q.dim() != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected [b, n, h, e]")
    if k.dim() != 6 or k.shape != v.shape:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)}: expected the same [b, l, K, r, h_kv, e]")
    if (k.shape[0], k.shape[5]) != (q.shape[0], q.shape[3]):
        raise ValueError(f"k {tuple(k.shape)} and q {tuple(q.shape)}: batch and head width must agree")
    if k.shape[4] == 0 or q.shape[2] % k.shape[4]:
        raise ValueError(f"q has {q.shape[2]} heads, k has {k.shape[4]}: the first must be a multiple of the second")
    if chunk_length < 1 or k.shape[1] != q.shape[1] // chunk_length:
        raise ValueError(
            f"k has {k.shape[1]} chunks; n={q.shape[1]} tokens in chunks of {chunk_length} make "
            f"{q.shape[1] // max(1, chunk_length)}"
        )
    if neighbor_lengths is not None and neighbor_lengths.shape != k.shape[:3]:
        raise ValueError(
            f"neighbor_lengths has shape {tuple(neighbor_lengths.shape)}; expected [b, l, K] = {tuple(k.shape[:3])}"
        )
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin must be given together")
    offset = chunk_length - 1 if query_offset is None else query_offset
    if cos is not None and cos.shape[0] < max(offset + chunk_length, k.shape[3]):
        raise ValueError(f"cos has {cos.shape[0]} positions; {max(offset + chunk_length, k.shape[3])} are needed")
    assert backend() == "reference"
    return reference.chunked_cross_attention(q, k, v, neighbor_lengths, chunk_length, cos, sin, scale, offset, dropout)
