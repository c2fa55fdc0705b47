"""Weights in blocks, as ggml's files have them: what lies where, values of blocks, and blocks of values.

A row of D weights is blocks of 32 (or 256: the K types) values, little-endian, one after another; a last block that is not full
holds zeros. d, m: float16. Letters: O rows, D values, X bytes of a row.

    q4_0  d, 16 bytes                       d (q - 8); byte i has value i in its low half, i + 16 in its high one
    q4_1  d, m, 16 bytes                    d q + m
    q5_0  d, u32, 16 bytes                  d (q - 16), bit 4 of value i in bit i of the u32
    q5_1  d, m, u32, 16 bytes               d q + m
    q8_0  d, 32 i8                          d q
    q4_k  d, m, 12 bytes, 128 bytes         d s q - m l for each 32 values, s and l of six bits in the 12 bytes
    q5_k  d, m, 12 bytes, 32 bytes, 128     the same, bit 4 of value i of run j in bit j of byte i of the 32
    q6_k  128 bytes, 64 bytes, 16 i8 s, d   d s (q - 32) for each 16 values, four low bits and two high ones

Products round their inputs to bytes, 32 at a time: `rounded`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 32  # inputs that are rounded with one scale
SLICE = 1 << 16  # values that are rounded to blocks at a time: they stay in a cache
NARROWER = (1.0, 0.94, 0.88)  # tried for four bits: the share of a block's range that the 16 values span


@dataclass(frozen=True)
class BlockType:
    number: int  # ggml's
    values: int  # of a block
    bytes: int  # of a block

    def row_bytes(self, inputs: int) -> int:
        return -(-inputs // self.values) * self.bytes


TYPES = {
    "q4_0": BlockType(2, 32, 18),
    "q4_1": BlockType(3, 32, 20),
    "q5_0": BlockType(6, 32, 22),
    "q5_1": BlockType(7, 32, 24),
    "q8_0": BlockType(8, 32, 34),
    "q4_k": BlockType(12, 256, 144),
    "q5_k": BlockType(13, 256, 176),
    "q6_k": BlockType(14, 256, 210),
}


def dequantize(blocks: Tensor, kind: str, inputs: int) -> Tensor:
    """uint8 [..., x] -> float32 [..., d]."""
    size = TYPES[kind].bytes
    values = _VALUES[kind](blocks.reshape(-1, size))
    return values.reshape(*blocks.shape[:-1], blocks.shape[-1] // size * TYPES[kind].values)[..., :inputs]


def rounded(x: Tensor) -> Tensor:
    """x [..., d] as weights in bytes and in blocks meet it: whole multiples, -127 ... 127, of max |x| / 127 of each 32; float32 or wider."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    blocks = F.pad(x, (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    top = blocks.abs().amax(-1, keepdim=True)
    factor = torch.where(top > 1e-30, 127 / top, 0)  # finite
    return ((blocks * factor).round() * (top / 127)).flatten(-2)[..., : x.shape[-1]]


def round_to_blocks(values: Tensor, kind: str) -> Tensor:
    """float32 [n, 32] -> uint8 [n, bytes] of q4_0, q4_1 or q8_0: each value's nearest. With four bits the scale (and the least
    value) is the one of a few that leaves the least squared error, some of them fitted to the values that others give; with
    eight the largest value is 127.
    """
    parts = [_ROUNDERS[kind](part) for part in values.split(SLICE // BLOCK)]
    return torch.cat(parts) if parts else torch.empty(0, TYPES[kind].bytes, dtype=torch.uint8)


def _to_q8_0(x: Tensor) -> Tensor:
    scale = (x.abs().amax(-1, keepdim=True) / 127).half()
    values = torch.where(scale > 0, x / scale.float(), 0).round().clamp(-127, 127).to(torch.int8)
    return torch.cat((scale.view(torch.uint8), values.view(torch.uint8)), -1)


def _to_q4_0(x: Tensor) -> Tensor:
    """The largest value lies at -8, or beyond it."""
    largest, zero = x.gather(-1, x.abs().argmax(-1, keepdim=True)), torch.zeros(len(x), 1)
    tried = [(largest * (share / -8), zero) for share in NARROWER]
    scale, _ = _best(x, tried, -8, 7, False)
    return torch.cat((scale.half().view(torch.uint8), _packed(_nearest(x, scale, zero, -8, 7) + 8)), -1)


def _to_q4_1(x: Tensor) -> Tensor:
    low, high = x.aminmax(dim=-1, keepdim=True)
    span = high - low
    scale, least = _best(x, [(span * (s / 15), (low + high) / 2 - span * (s / 2)) for s in NARROWER], 0, 15, True)
    head = torch.cat((scale, least), -1).half().view(torch.uint8)
    return torch.cat((head, _packed(_nearest(x, scale, least, 0, 15))), -1)


def _best(x: Tensor, tried: list[tuple[Tensor, Tensor]], low: int, high: int, has_least: bool) -> tuple[Tensor, Tensor]:
    """Scales and least values [n, 1]: of each block those that leave the least error, of those tried and what is fitted to them."""
    pairs = [pair for first in tried for pair in (first, _fitted(x, _nearest(x, *first, low, high), first, has_least))]
    best, smallest = torch.zeros(2, len(x), 1), torch.full((len(x), 1), torch.inf)
    for pair in pairs:
        found = torch.stack(pair).half().float()
        scale, least = found.unbind()
        error = (_nearest(x, scale, least, low, high) * scale + least - x).square().sum(-1, keepdim=True)
        best, smallest = torch.where(error < smallest, found, best), torch.minimum(error, smallest)
    return best[0], best[1]


def _fitted(x: Tensor, values: Tensor, old: tuple[Tensor, Tensor], has_least: bool) -> tuple[Tensor, Tensor]:
    """The line through a block's values with the least squared error (through 0, without a least value), else the old one."""
    mean = values.mean(-1, keepdim=True) * has_least
    spread = ((values - mean) * values).sum(-1, keepdim=True)
    slope = ((values - mean) * x).sum(-1, keepdim=True) / spread
    least = (x.mean(-1, keepdim=True) - slope * mean) * has_least
    return torch.where(spread > 0, slope, old[0]), torch.where(spread > 0, least, old[1])


def _nearest(x: Tensor, scale: Tensor, least: Tensor, low: int, high: int) -> Tensor:
    return torch.where(scale != 0, (x - least) / scale, 0).clamp(low, high).round()


def _packed(values: Tensor) -> Tensor:
    """[n, 32] of 0 ... 15 -> [n, 16], the first half in the low bits."""
    low, high = values.to(torch.uint8).chunk(2, -1)
    return low | high << 4


_ROUNDERS = {"q4_0": _to_q4_0, "q4_1": _to_q4_1, "q8_0": _to_q8_0}


def _halves(part_X2: Tensor) -> Tensor:
    """Two bytes [n, 2] as a number [n, 1]."""
    return part_X2.contiguous().view(torch.float16).float()


def _nibbles(part_X: Tensor) -> Tensor:
    """[..., x] -> [..., 2 x]: all low halves, then all high ones."""
    return torch.cat((part_X & 15, part_X >> 4), -1)


def _fifth_bits(part: Tensor) -> Tensor:
    """[n, 4] -> [n, 32] of 0 or 16."""
    return ((part[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(-2) << 4


def _q4_0(b: Tensor) -> Tensor:
    return _halves(b[:, :2]) * (_nibbles(b[:, 2:]).float() - 8)


def _q4_1(b: Tensor) -> Tensor:
    return _halves(b[:, :2]) * _nibbles(b[:, 4:]).float() + _halves(b[:, 2:4])


def _q5_0(b: Tensor) -> Tensor:
    return _halves(b[:, :2]) * ((_nibbles(b[:, 6:]) | _fifth_bits(b[:, 2:6])).float() - 16)


def _q5_1(b: Tensor) -> Tensor:
    return _halves(b[:, :2]) * (_nibbles(b[:, 8:]) | _fifth_bits(b[:, 4:8])).float() + _halves(b[:, 2:4])


def _q8_0(b: Tensor) -> Tensor:
    return _halves(b[:, :2]) * b[:, 2:].contiguous().view(torch.int8).float()


def _k_scales(b: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and least value [n, 8, 1] of each 32 values, of the first 16 bytes of a block."""
    low, high, rest = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scale = torch.cat((low & 63, (rest & 15) | (low >> 6) << 4), 1)
    least = torch.cat((high & 63, (rest >> 4) | (high >> 6) << 4), 1)
    return (_halves(b[:, :2]) * scale.float())[..., None], (_halves(b[:, 2:4]) * least.float())[..., None]


def _k_nibbles(b: Tensor) -> Tensor:
    """128 bytes -> [n, 8, 32]: of each 32 bytes the low halves, then the high ones."""
    return _nibbles(b.unflatten(-1, (4, 32))).reshape(-1, 8, 32)


def _q4_k(b: Tensor) -> Tensor:
    scale, least = _k_scales(b)
    return scale * _k_nibbles(b[:, 16:]).float() - least


def _q5_k(b: Tensor) -> Tensor:
    scale, least = _k_scales(b)
    runs = torch.arange(8, dtype=torch.uint8)[:, None]
    high = ((b[:, None, 16:48] >> runs) & 1) << 4
    return scale * (_k_nibbles(b[:, 48:]) | high).float() - least


def _q6_k(b: Tensor) -> Tensor:
    low = b[:, :128].reshape(-1, 2, 2, 32)  # half, 32 bytes of it
    low = torch.stack((low & 15, low >> 4), 2)  # half, low or high bits, which bytes
    shifts = torch.tensor([[0, 2], [4, 6]], dtype=torch.uint8)[..., None]
    high = (b[:, 128:192].reshape(-1, 2, 1, 1, 32) >> shifts) & 3
    values = (low | high << 4).reshape(-1, 16, 16).float() - 32
    return _halves(b[:, 208:])[..., None] * b[:, 192:208].contiguous().view(torch.int8).float()[..., None] * values


_VALUES = {
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q8_0": _q8_0,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
}
