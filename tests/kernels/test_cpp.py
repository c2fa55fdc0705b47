"""Every instruction set that this processor has gives the same values as float64; one it has not is refused."""

import pytest
import torch
from kernel_helpers import TOLERANCE, cca_case, in_double, output_and_gradients, relative_error, rotary_tables
from retro_kernels import cpp, reference
from retro_kernels.chunked_cross_attention import chunked_cross_attention
from retro_kernels.gather_neighbors import gather_neighbors
from retro_kernels.rope import rope

pytestmark = pytest.mark.skipif(not cpp.is_available(), reason="no C++ extension")
QKV = ("q", "k", "v")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention(instruction_set: str, dtype: torch.dtype) -> None:
    for shape in ((2, 70, 4, 2, 32, 16, 2, 32, 32), (1, 67, 2, 1, 96, 16, 2, 37, 48), (1, 40, 1, 1, 18, 16, 1, 7, 12)):
        case = cca_case(shape, dtype)
        found = output_and_gradients(chunked_cross_attention, case, QKV)
        exact = output_and_gradients(chunked_cross_attention, in_double(case, QKV), QKV)
        for name, a, b in zip(("o", *QKV), found, exact):
            assert relative_error(a, b) < TOLERANCE[dtype], f"{name}: {relative_error(a, b):.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_and_gathering(instruction_set: str, dtype: torch.dtype) -> None:
    x, (cos, sin) = torch.randn(2, 33, 3, 18).to(dtype), rotary_tables(33, 12)
    assert relative_error(rope(x, cos, sin), reference.rope(x.double(), cos, sin)) < TOLERANCE[dtype]
    table, document = torch.arange(80, dtype=torch.int32).reshape(20, 4), torch.arange(20) // 7
    ids = torch.randint(-1, 20, (3, 50), generator=torch.Generator().manual_seed(1))
    for r in (3, 8, 30):
        found = gather_neighbors(table, document, torch.full((20,), 4), ids, r)
        exact = reference.gather_neighbors(table, document, torch.full((20,), 4), ids, r, 0)
        assert all(torch.equal(a, b) for a, b in zip(found, exact))


def test_extreme_scores_stay_finite(instruction_set: str) -> None:
    case = cca_case((1, 48, 1, 1, 16, 16, 2, 32, 0), torch.float32)
    case["k"] = torch.nan_to_num(case["k"])  # type: ignore[arg-type]
    case["v"] = torch.nan_to_num(case["v"])  # type: ignore[arg-type]
    for factor in (0.0, 1e3, 1e15):
        out = output_and_gradients(chunked_cross_attention, case | {"q": case["q"] * factor}, QKV)  # type: ignore[operator]
        assert all(torch.isfinite(x).all() for x in out)


def test_an_instruction_set_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETRO_CPU", "avx1024")
    cpp.instruction_set.cache_clear()
    with pytest.raises(ValueError, match="RETRO_CPU=avx1024: this processor has"):
        cpp.instruction_set()
    cpp.instruction_set.cache_clear()
