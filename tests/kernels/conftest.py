"""What the tests of kernels share: each instruction set of this processor in turn."""

from collections.abc import Iterator

import pytest
from retro_kernels import cpp


@pytest.fixture(params=["scalar", "avx2", "avx512", "avx512_bf16", "avx512_amx"])
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param not in cpp.instruction_sets():
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setenv("RETRO_CPU", request.param)
    cpp.instruction_set.cache_clear()
    assert cpp.instruction_set() == request.param
    yield request.param
    cpp.instruction_set.cache_clear()
