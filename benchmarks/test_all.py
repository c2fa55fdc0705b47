"""Every bench under pytest-benchmark: `make bench`, or `pytest benchmarks -k library`; what it found is the extra info."""

import pytest

from retro_engine.bench import checkout
from retro_engine.bench.__main__ import DEFAULT, measure
from retro_engine.bench.frame import Options


@pytest.mark.parametrize("name", [*DEFAULT, *checkout.benches()])
def test_bench(benchmark, name: str) -> None:
    benchmark.extra_info |= benchmark.pedantic(measure, ([name], Options()), rounds=1)
