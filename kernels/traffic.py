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


# What the predictions assume of a card: an H200 as it is sold.
BEST_SHARE = 0.92  # of a copy's rate, where nothing else binds: what kernels that only move data reach
COPY_RATE = 4.2e12  # bytes a second, read and written
L2_RATE = 1.5 * COPY_RATE
ISSUE_RATE = 132 * 4 * 1.7e9 * 0.75  # instructions of a warp a second; three quarters of the schedulers' slots

# Instructions of all warps for one problem of 64 queries and two segments of 128 keys, counted in the code that Triton 3.9 makes
# for compute capability 9.0 (tile_of's warps x (what runs once + tiles x the loop)): (head width, is backward).
INSTRUCTIONS = {
    (64, False): 4 * (1002 + 2 * 176 + 4 * 654),
    (64, True): 4 * (1898 + 4 * 1173),
    (128, False): 8 * (1003 + 2 * 170 + 4 * 699),
    (128, True): 8 * (1425 + 16 * 671),  # 16 keys a tile
}


def share(traffic: Traffic, instructions: int = 0) -> float:
    """Of a copy's rate: bound by memory, by L2 where more is asked of it than memory gives, or by instructions. A prediction."""
    seconds = max(
        traffic.useful / COPY_RATE / BEST_SHARE,
        traffic.moved / L2_RATE,
        instructions / ISSUE_RATE,
    )
    return traffic.useful / COPY_RATE / seconds


def _predicted() -> dict[str, float]:
    found = {"rope q and k bf16 16x2048x12x64": BEST_SHARE, "rope q and k fp16 16x2048x12x64": BEST_SHARE}
    # as tile_of has them on compute capability 9.0: BM, BN, whole
    for size, width, (BM, BN, is_whole) in (
        ("16x2048x12x64", 64, (64, 64, True)),
        ("8x2048x16x128", 128, (64, 16, True)),
    ):
        problem = Problems(1, 64, 2, 128, width, width // 2)
        first, second = forward(problem, 64), backward(problem, BM, BN, is_whole)
        one, other = (share(x, INSTRUCTIONS.get((width, x is second), 0)) for x in (first, second))
        both = (first.useful + second.useful) / (first.useful / one + second.useful / other)
        for dtype in ("bf16", "fp16"):
            found[f"chunked cross-attention {dtype} {size} fwd"] = one
            found[f"chunked cross-attention {dtype} {size} fwd+bwd"] = both
    return {case: round(value, 2) for case, value in found.items()}


PREDICTED = _predicted()  # by case of `bench kernels`
