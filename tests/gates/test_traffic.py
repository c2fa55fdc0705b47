"""Gate: an interpreter that counts every byte finds what kernels/traffic.py reckons, and the shipped tiles keep to its bounds.

A process of its own, as test_interpreter.py: TRITON_INTERPRET=1 must be set before triton is imported.
"""

import os
from collections import Counter
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 (make gates)", allow_module_level=True)
pytest.importorskip("triton")

from kernel_helpers import rotary_tables
from retro_kernels import traffic, triton_attention
from retro_kernels.cpp import Problem
from triton.runtime import interpreter

B, L, M, K, R, E, P = 1, 2, 64, 2, 128, 64, 32


@pytest.fixture
def accesses(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, int]]:
    """Addresses and bytes a value of all loads and stores that a mask lets through."""
    seen: list[tuple[Any, int]] = []

    def counting(name: str, mask_at: int) -> None:
        original = getattr(interpreter.InterpreterBuilder, name)

        def counted(self, pointers, *arguments):  # type: ignore[no-untyped-def]
            mask = arguments[mask_at].data
            seen.append((pointers.data[mask], pointers.get_element_ty().primitive_bitwidth // 8))
            return original(self, pointers, *arguments)

        monkeypatch.setattr(interpreter.InterpreterBuilder, name, counted)

    counting("create_masked_load", 0)
    counting("create_masked_store", 1)
    return seen


@pytest.mark.parametrize("is_whole", [True, False])
def test_bytes(accesses: list[tuple[Any, int]], monkeypatch: pytest.MonkeyPatch, is_whole: bool) -> None:
    """Half precision counts q, k, v, o and gradients; four bytes the tables and log-sum-exps; eight the lengths."""
    q = torch.randn(B, L * M + M - 1, 1, E).half()
    k, v = (torch.randn(B, L, K, R, 1, E).half() for _ in range(2))
    cos, sin = rotary_tables(2 * M, 2 * P)
    lengths = torch.full((B, L, K), R)
    problem = Problem(lengths=lengths, cos=cos, sin=sin, chunk_length=M, query_offset=M - 1, scale=E**-0.5)
    o, lse = triton_attention.attention_forward(q, k, v, problem)
    tile = triton_attention.tile_of(90, E, M, False, False, False, False)
    problems = traffic.Problems(B * L, M, K, R, E, P)
    check(accesses, traffic.forward(problems, tile["BM"]), problems, 1.15)
    accesses.clear()
    if not is_whole:
        monkeypatch.setattr(triton_attention, "is_whole", lambda *which: False)
    triton_attention.attention_backward(o, q, k, v, o, lse, problem)
    tile = triton_attention.tile_of(90, E, M, False, False, False, True)
    reckoned = traffic.backward(problems, tile["BM"], tile["BN"], is_whole)
    check(accesses, reckoned, problems, 1.3 if is_whole else 2.1)


def check(accesses: list[tuple[Any, int]], reckoned: traffic.Traffic, problems: traffic.Problems, most: float) -> None:
    """What was counted is what is reckoned, at most `most` times what is useful."""
    found: Counter[int] = Counter()
    for addresses, item in accesses:
        found[item] += addresses.size * item
    rest = found[4] - reckoned.tables  # log-sum-exps: once for every time that the queries are read
    assert rest % (4 * problems.rows * problems.count) == 0 and rest > 0
    assert found[2] + rest == reckoned.moved
    assert reckoned.factor <= most
