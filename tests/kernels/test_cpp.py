"""Every instruction set that this processor has gives the same values as float64; one it has not is refused. Functions that C++
computes itself are right over all of float32, or as PyTorch has it.
"""

import pytest
import torch
import torch.nn.functional as F
from kernel_helpers import TOLERANCE, cca_case, in_double, output_and_gradients, relative_error, rotary_tables
from retro_kernels import cpp, reference
from retro_kernels.attention import attention
from retro_kernels.blocks import rounded
from retro_kernels.chunked_cross_attention import chunked_cross_attention
from retro_kernels.cross_entropy import cross_entropy_
from retro_kernels.gather_neighbors import gather_neighbors
from retro_kernels.rope import rope
from retro_kernels.step import Attending, CrossAttentionPart, FeedForwardPart, Matrix, Norm, SelfAttentionPart, Steps
from torch import Tensor

pytestmark = pytest.mark.skipif(not cpp.is_available(), reason="no C++ extension")
QKV = ("q", "k", "v")
SMALLEST = 2.0**-126  # normal; below it a function may give 0
EXACT = {
    "exp2": torch.exp2,
    "erf": torch.erf,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention(instruction_set: str, dtype: torch.dtype) -> None:
    for shape in ((2, 70, 4, 2, 32, 16, 2, 32, 32), (1, 67, 2, 1, 96, 16, 2, 37, 48), (1, 40, 1, 1, 18, 16, 1, 7, 12)):
        case = cca_case(shape, dtype)
        found = output_and_gradients(chunked_cross_attention, case, QKV)
        exact = output_and_gradients(chunked_cross_attention, in_double(case, QKV), QKV)
        for name, a, b in zip(("o", *QKV), found, exact):
            assert relative_error(a, b) < TOLERANCE[dtype], f"{name}: {relative_error(a, b):.1e}"


@pytest.mark.parametrize("N", [70, 64, 16])  # of 16, one query attends
def test_what_no_query_writes_is_zero(instruction_set: str, N: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = cca_case((2, N, 2, 1, 32, 16, 2, 20, 0), torch.float32)
    exact = output_and_gradients(chunked_cross_attention, in_double(case, QKV), QKV)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(77))
    for name, a, b in zip(("o", *QKV), output_and_gradients(chunked_cross_attention, case, QKV), exact):
        assert relative_error(a, b) < TOLERANCE[torch.float32], name


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


@pytest.mark.skipif("avx512_bf16" not in cpp.instruction_sets(), reason="this processor has no bf16")
def test_an_instruction_set_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETRO_CPU", "avx1024")
    cpp.instruction_set.cache_clear()
    with pytest.raises(ValueError, match="RETRO_CPU=avx1024: this processor has"):
        cpp.instruction_set()
    cpp.instruction_set.cache_clear()


def all_of_float32() -> Tensor:
    """Every exponent of both signs (subnormals, infinities, payloads of NaN) with 16 mantissas each, and what activations meet."""
    generator = torch.Generator().manual_seed(0)
    mantissas = torch.cat(
        (torch.tensor([0, 1, 1 << 22, (1 << 23) - 1]), torch.randint(1 << 23, (12,), generator=generator))
    )
    bits = ((torch.arange(256)[:, None] << 23) | mantissas).flatten()
    values = torch.cat((bits, bits - (1 << 31))).int().view(torch.float32)
    return torch.cat((values, torch.linspace(-300, 300, 30_001)))


@pytest.mark.parametrize("name", EXACT)
def test_over_all_of_float32(instruction_set: str, name: str) -> None:
    x = all_of_float32()
    exact, found = EXACT[name](x.double()), cpp.primitive(name, x)
    assert torch.equal(found.isnan(), exact.isnan())
    assert torch.equal(found.isinf(), exact.float().isinf())
    size = {"erf": torch.ones_like(exact), "exp2": exact.abs(), "sigmoid": exact.abs() * (1 + x.double().abs())}
    within = (found - exact).abs() <= SMALLEST + 1e-6 * size.get(name, x.double().abs())
    within |= (found == exact.float()) | exact.isnan()
    assert within.all(), f"{name}({x[~within][0]:g}) = {found[~within][0]:g}, not {exact[~within][0]:g}"


def test_rounding_to_bfloat16(instruction_set: str) -> None:
    """To the nearest, ties to even; NaN stays NaN whatever its payload. One processor's instruction takes subnormals for 0."""
    x = all_of_float32()
    exact, found = x.bfloat16().float(), cpp.primitive("bfloat16", x)
    assert torch.equal(found.isnan(), exact.isnan())
    differs = (found != exact) & ~exact.isnan()
    assert (x[differs].abs() < SMALLEST).all()
    assert (found[differs] == 0).all()
    assert instruction_set in ("avx512_bf16", "avx512_amx") or not differs.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keys", [1, 3, 16, 37, 130, 300])
def test_a_key_that_is_not_finite_reaches_the_output(instruction_set: str, keys: int, dtype: torch.dtype) -> None:
    """Wherever it lies, in the output and the gradients; what does not read it stays as it is."""
    places = sorted({0, keys // 2, keys - 1})
    q, v = torch.ones(len(places) + 1, 3, 1, 18), torch.randn(len(places) + 1, keys, 1, 18)
    for bad in (torch.nan, torch.inf):
        k = torch.randn(len(places) + 1, keys, 1, 18)
        for row, place in enumerate(places):
            k[row, place, 0, 3] = bad
        tensors = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = attention(*tensors)
        assert out[:-1].isnan().all(), bad
        gradients = torch.autograd.grad(out.float().sum(), tensors)
        assert all(x[-1].isfinite().all() for x in (out, *gradients))
        assert all(x[:-1].isnan().any() for x in gradients)


def test_scores_of_any_size(instruction_set: str) -> None:
    """Up to 2^126, far from what a mask's number might be; -inf weighs nothing, and where all are -inf the output is 0."""
    values = torch.randn(1, 4, 1, 2)
    for scores in ([-1e35, -2e35, -1e38, -1e35], [1e38, 9e37, 0, -1e38], [-torch.inf, 1, 2, 3], [-torch.inf] * 4):
        q, k = (
            torch.tensor([1.0, 0]).expand(1, 1, 1, 2),
            torch.tensor(scores)[None, :, None, None] * torch.tensor([1.0, 0]),
        )
        k = torch.where(torch.arange(2) == 0, k, 0)  # inf * 0
        exact = reference.attention(q, k, values, False, None, None, None, None, None, 0, 1, 1.0)
        torch.testing.assert_close(attention(q, k, values, scale=1.0), exact)
        valid = torch.ones(1, 4, dtype=torch.bool)
        for mask in (None, valid, valid & (torch.arange(4) < 3)):
            eye = Matrix(torch.eye(2))
            part = CrossAttentionPart(
                Norm(None, None, 0.0, True), eye, eye, Attending(k, values, 1.0, valid=mask), True
            )
            x = torch.tensor([[1.0, 0]]) / 2**0.5
            torch.testing.assert_close(Steps([part])(x), reference.step(x, part))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_all", [False, True])
def test_a_neighbor_that_holds_nan(instruction_set: str, dtype: torch.dtype, is_all: bool) -> None:
    q, k, v = (torch.randn(1, 8, 1, 16), *(torch.randn(1, 2, 2, 8, 1, 16) for _ in range(2)))
    k[0, 0, 1, slice(None) if is_all else 5] = torch.nan
    out = chunked_cross_attention(q.to(dtype), k.to(dtype), v.to(dtype), None, 4)
    assert isinstance(out, Tensor)
    assert out.isnan()[0, :, 0, 0].tolist() == [False] * 3 + [True] * 4 + [False]


@pytest.mark.parametrize("keys", [1, 5, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cached_key_that_holds_nan(instruction_set: str, keys: int, dtype: torch.dtype) -> None:
    D, eye = 8, Matrix(torch.eye(8))
    for place in {0, keys // 2, keys - 1}:
        cache = [torch.randn(2, keys + 1, 1, D).to(dtype) for _ in range(2)]
        cache[0][0, place] = torch.nan
        attending = Attending(*cache, 1.0, starts=torch.full((2,), keys))
        out = Steps([SelfAttentionPart(Norm(None, None, 0.0, True), eye, eye, eye, eye, attending)])(torch.ones(2, D))
        assert out[0].isnan().all()
        assert out[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 7, 16, 40, 1003])
def test_a_loss_over_what_is_not_finite(instruction_set: str, dtype: torch.dtype, vocab: int) -> None:
    """As PyTorch's: NaN where a logit is NaN or +inf, wherever it lies, so that the guard of training sees it."""
    places, label = sorted({0, vocab // 2, vocab - 1}), torch.tensor([vocab - 1])
    for bad in (torch.nan, torch.inf, -torch.inf):
        for chosen in (*([place] for place in places), list(range(vocab))):
            logits = torch.randn(1, vocab).to(dtype)
            logits[0, chosen] = bad
            exact = F.cross_entropy(logits.float(), label, reduction="none")
            for function in (cross_entropy_, reference.cross_entropy_):
                changed = logits.clone()
                torch.testing.assert_close(function(changed, label, True), exact, equal_nan=True)
                assert bool(changed.isnan().any()) == bool(exact.isnan())


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "swiglu"])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.int8])
def test_large_activations(instruction_set: str, kind: torch.dtype, activation: str) -> None:
    """A step of decoding where the first product gives -10^6 ... 10^6, and where it gives NaN."""
    x = torch.tensor([[1.0], [-1.0], [torch.nan]])
    inner = torch.cat((torch.logspace(-2, 6, 40), torch.linspace(1, 300, 77)))[:, None]
    inner = Matrix(torch.ones_like(inner).to(kind), None, inner[:, 0]) if kind == torch.int8 else Matrix(inner.to(kind))
    out = Matrix(torch.ones(1, 117).to(kind), None, torch.ones(1) if kind == torch.int8 else None)
    gate = inner if activation == "swiglu" else None
    part = FeedForwardPart(Norm(None, None, 0.0, True), gate, inner, out, activation)
    found = Steps([part])(x)
    if kind == torch.int8:  # the second product's inputs are rounded to bytes
        wide = reference.linear(x, inner)
        wide = (
            F.silu(wide) * wide if gate else F.gelu(wide, approximate="tanh" if activation == "gelu_tanh" else "none")
        )
        exact = x + rounded(wide).sum(-1, keepdim=True)
    else:
        exact = reference.step(x.to(kind), part).float()
    torch.testing.assert_close(found, exact, rtol=2e-2 if kind == torch.bfloat16 else 2e-3, atol=1e-4, equal_nan=True)
    assert found.isnan().flatten().tolist() == [False, False, True]


@pytest.mark.parametrize("is_rms", [False, True])
def test_norms_of_any_size(instruction_set: str, is_rms: bool) -> None:
    """As PyTorch's: of 10^-40 ... 10^15, and NaN of what holds NaN or infinity."""
    eye = Matrix(torch.eye(21))
    part = FeedForwardPart(Norm(None, None, 1e-5, is_rms), None, eye, eye, "gelu_tanh")
    for size in (1e-40, 1e-20, 1.0, 1e10, 1e15):
        x = size * torch.randn(2, 21)
        found, exact = (function(x) - x for function in (Steps([part]), lambda x: reference.step(x, part)))
        assert (found - exact).abs().max() <= 1e-6 * exact.abs().max() + 1e-42
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = torch.randn(2, 21)
        x[1, 20] = bad
        found, exact = (function(x) for function in (Steps([part]), lambda x: reference.step(x, part)))
        assert torch.equal(found.isfinite(), exact.isfinite())
