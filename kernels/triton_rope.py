"""RoPE on NVIDIA GPUs in Triton: q and k in one launch, each read and written once.

A program owns TOKENS tokens of one batch row, loads their cosines and sines once and walks the heads of q, then of k.
Letters: T tokens of a tile, P pairs.
"""

# mypy: allow-untyped-defs
import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate_heads(
    X, Y, cos, sin, at_x, at_y, inside, pair, x_h, y_h, HEADS, P: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    if INTERLEAVED:
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, pair + P
    mask = inside[:, None] & (pair < P)[None, :]
    rest = 2 * P + tl.arange(0, REST)
    for h in range(HEADS):
        x, y = X + at_x[:, None] + h * x_h, Y + at_y[:, None] + h * y_h
        a = tl.load(x + first[None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x + second[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(y + first[None, :], (a * cos - b * sin).to(Y.dtype.element_ty), mask=mask)
        tl.store(y + second[None, :], (b * cos + a * sin).to(Y.dtype.element_ty), mask=mask)
        if WIDTH > 2 * P:
            passes = inside[:, None] & (rest < WIDTH)[None, :]
            tl.store(y + rest[None, :], tl.load(x + rest[None, :], mask=passes, other=0.0), mask=passes)


@triton.jit
def _rope(
    Q, K, Q_OUT, K_OUT, COS, SIN, POSITIONS, sign,
    q_b, q_n, q_h, k_b, k_n, k_h, qo_b, qo_n, qo_h, ko_b, ko_n, ko_h, position_b, num_positions, token_tiles, N, Q_HEADS, K_HEADS,
    P: tl.constexpr, PAIRS: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, TOKENS: tl.constexpr,
    INTERLEAVED: tl.constexpr, HAS_POSITIONS: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // token_tiles).to(tl.int64)
    token = tl.program_id(0) % token_tiles * TOKENS + tl.arange(0, TOKENS)
    inside = token < N
    pair = tl.arange(0, PAIRS)
    position = token.to(tl.int64)
    if HAS_POSITIONS:
        position = tl.load(POSITIONS + b * position_b + token, mask=inside, other=0)
        position = tl.minimum(tl.maximum(position, 0), num_positions - 1)  # nothing outside the table is read
    at = position[:, None] * P + pair[None, :]
    mask = inside[:, None] & (pair < P)[None, :]
    cos = tl.load(COS + at, mask=mask, other=1.0)
    sin = tl.load(SIN + at, mask=mask, other=0.0) * sign
    token = token.to(tl.int64)
    _rotate_heads(Q, Q_OUT, cos, sin, b * q_b + token * q_n, b * qo_b + token * qo_n, inside, pair, q_h, qo_h, Q_HEADS,
                  P, WIDTH, REST, INTERLEAVED)  # fmt: skip
    _rotate_heads(K, K_OUT, cos, sin, b * k_b + token * k_n, b * ko_b + token * ko_n, inside, pair, k_h, ko_h, K_HEADS,
                  P, WIDTH, REST, INTERLEAVED)  # fmt: skip


def rope_qk(
    q_BNHE: Tensor, k_BNGE: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """q and k rotated, or rotated back; k may have no heads."""
    B, N, H, E = q_BNHE.shape
    q_out = torch.empty(q_BNHE.shape, dtype=q_BNHE.dtype, device=q_BNHE.device)
    k_out = torch.empty(k_BNGE.shape, dtype=k_BNGE.dtype, device=k_BNGE.device)
    if B * N * E == 0:
        return q_out, k_out
    P = cos.shape[1]
    tokens = 8 if E > 128 else 16
    place = None if positions is None else positions.contiguous()
    tiles = triton.cdiv(N, tokens)
    with torch.cuda.device_of(q_BNHE):
        _rope[(tiles * B,)](
            *(q_BNHE, k_BNGE, q_out, k_out, cos.float().contiguous(), sin.float().contiguous()),
            *(q_BNHE if place is None else place, -1.0 if inverse else 1.0),
            *(*q_BNHE.stride()[:3], *k_BNGE.stride()[:3], *q_out.stride()[:3], *k_out.stride()[:3]),
            *(N if place is not None and place.dim() == 2 else 0, cos.shape[0], tiles, N, H, k_BNGE.shape[2]),
            **constants(E, P, interleaved, place is not None),
            TOKENS=tokens,
            num_warps=4,
        )
    return q_out, k_out


def constants(head_width: int, rotated: int, interleaved: bool, has_positions: bool) -> dict[str, int | bool]:
    """The kernel's constexpr arguments beside TOKENS."""
    rest = head_width - 2 * rotated
    return {
        "P": rotated,
        "PAIRS": triton.next_power_of_2(max(1, rotated)),
        "WIDTH": head_width,
        "REST": triton.next_power_of_2(max(1, rest)),
        "INTERLEAVED": interleaved,
        "HAS_POSITIONS": has_positions,
    }
