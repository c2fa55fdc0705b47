"""Rotary position embedding of queries and keys (arXiv 2104.09864), half-split or interleaved, full or partial.

y = (a cos t - b sin t, b cos t + a sin t) for each rotated pair (a, b) at angle t = position / base^(2p/rotary).
Reads x once and writes y once: 2 x bytes(x) is the roofline. Inputs are never overwritten.
"""

from retro_kernels import reference
from retro_kernels.backend import backend
from torch import Tensor


def rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, interleaved: bool = False) -> Tensor:
    """Rotate x [b, n, h, e] by cos and sin [positions, rotary/2]; positions [n] or [b, n], None = 0 ... n-1.

    The features past `rotary` pass through. Raises ValueError naming the argument and the rule.
    """
    _check(x, cos, sin, positions)
    assert backend() == "reference"
    return reference.rope(x, cos, sin, positions, interleaved)


def rope_qk(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """`rope` of q and of k, whose head counts may differ."""
    return rope(q, cos, sin, positions, interleaved), rope(k, cos, sin, positions, interleaved)


def _check(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> None:
    if x.dim() != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [b, n, h, e]")
    if cos.shape != sin.shape or cos.dim() != 2:
        raise ValueError(f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)}: expected the same [positions, rotary/2]")
    if 2 * cos.shape[1] > x.shape[3]:
        raise ValueError(f"cos {tuple(cos.shape)} rotates {2 * cos.shape[1]} features; x has e={x.shape[3]}")
    if positions is None and cos.shape[0] < x.shape[1]:
        raise ValueError(f"cos has {cos.shape[0]} positions; x has n={x.shape[1]} tokens")
    if positions is not None and positions.shape not in (x.shape[1:2], x.shape[:2]):
        raise ValueError(f"positions has shape {tuple(positions.shape)}; expected [n] or [b, n] of x {tuple(x.shape)}")
