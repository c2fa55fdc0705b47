"""Bytes that the attention kernels of kernels/triton_attention.py ask for, by formula, and the share of a copy's rate that follows.

Useful are q, k, v, o (backward: and grad_o, and the three gradients) once each, with what goes with a row. `moved` is what the
programs load and store; rotary tables, the same for all programs and kept by L1, are counted apart. An interpreter that
counts (tests/gates/test_traffic.py) finds the same. Letters as in kernels/triton_attention.py.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Problems:
    """`count` problems of `rows` queries (tokens times heads that share keys) and `segments` of `keys` full keys."""

    count: int
    rows: int
    segments: int
    keys: int
    width: int
    rotated: int  # pairs
    item: int = 2  # bytes of a value

    @property
    def query_bytes(self) -> int:
        return self.rows * self.width * self.item

    @property
    def key_bytes(self) -> int:
        return self.segments * self.keys * self.width * self.item


@dataclass(frozen=True)
class Traffic:
    """Bytes."""

    useful: int
    moved: int
    tables: int

    @property
    def factor(self) -> float:
        return self.moved / self.useful


def forward(problems: Problems, BM: int) -> Traffic:
    """Every tile of queries reads all keys and values."""
    tiles = -(-problems.rows // BM)
    queries = 2 * problems.query_bytes + 4 * problems.rows  # q, o; log-sum-exp
    tables = 8 * problems.rotated * (problems.rows + tiles * problems.segments * problems.keys)
    moved = queries + 2 * tiles * problems.key_bytes
    return _times(problems.count, queries + 2 * problems.key_bytes, moved, tables)


def backward(problems: Problems, BM: int, BN: int, is_whole: bool) -> Traffic:
    """Whole: everything once. Else a tile of queries reads all keys and values, a tile of keys all of q, o and grad_o."""
    keys, rows = problems.key_bytes, problems.rows
    given = 3 * problems.query_bytes + 4 * rows  # q, o, grad_o; log-sum-exp
    useful = given + problems.query_bytes + 4 * keys
    table_rows = 2 * rows + 2 * problems.segments * problems.keys
    if is_whole:
        return _times(problems.count, useful, useful, 8 * problems.rotated * table_rows)
    query_tiles, key_tiles = -(-rows // BM), problems.segments * -(-problems.keys // BN)
    moved = given * (1 + key_tiles) + problems.query_bytes + 2 * keys * (query_tiles + 1) + 2 * keys
    table_rows += key_tiles * rows + query_tiles * problems.segments * problems.keys
    return _times(problems.count, useful, moved, 8 * problems.rotated * table_rows)


def _times(count: int, useful: int, moved: int, tables: int) -> Traffic:
    return Traffic(count * useful, count * moved, count * tables)


BEST_SHARE = 0.92  # of a copy's rate, where nothing else binds: what kernels that only move data reach
L2_RATE = 1.5  # of a copy's rate, what L2 gives: assumed


def share(traffic: Traffic) -> float:
    """Of a copy's rate: bound by memory, or by L2 where more is asked of it than memory gives. A prediction, not a measurement."""
    return min(BEST_SHARE, L2_RATE / traffic.factor)


def _both(one: Traffic, other: Traffic) -> float:
    return (one.useful + other.useful) / (one.useful / share(one) + other.useful / share(other))


def _predicted() -> dict[str, float]:
    found = {"rope q and k bf16 16x2048x12x64": BEST_SHARE}
    # as tile_of has them on compute capability 9.0: BM, BN, whole
    for size, count, width, (BM, BN, is_whole) in (
        ("16x2048x12x64", 16 * 32 * 12, 64, (64, 64, True)),
        ("8x2048x16x128", 8 * 32 * 16, 128, (32, 32, False)),
    ):
        problems = Problems(count, 64, 2, 128, width, width // 2)
        first, second = forward(problems, 64), backward(problems, BM, BN, is_whole)
        for dtype in ("bf16", "fp16"):
            found[f"chunked cross-attention {dtype} {size} fwd"] = share(first)
            found[f"chunked cross-attention {dtype} {size} fwd+bwd"] = _both(first, second)
    return {case: round(value, 2) for case, value in found.items()}


PREDICTED = _predicted()  # by case of `bench kernels` on an H100 or H200
