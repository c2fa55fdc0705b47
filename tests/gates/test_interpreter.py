"""Gate: the Triton kernels in the interpreter against float64, over odd sizes, fp32 and fp16 (bf16 with upcasts).

A process of its own: TRITON_INTERPRET=1 must be set before triton is imported, and then nothing can be compiled.
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 (make gates)", allow_module_level=True)
pytest.importorskip("triton")

from kernel_helpers import CCA_SHAPES, cca_case, in_double, output_and_gradients, relative_error, rotary_tables
from retro_kernels import reference
from retro_kernels.attention import attention
from retro_kernels.chunked_cross_attention import chunked_cross_attention
from retro_kernels.cross_entropy import cross_entropy_
from retro_kernels.gather_neighbors import gather_neighbors
from retro_kernels.rope import rope_qk

QKV = ("q", "k", "v")
# The interpreter truncates where it stores bf16: one more unit in the last place than on a GPU.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1.2e-2}
DTYPES = list(TOLERANCE)


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETRO_BACKEND", "triton")


def _exact(monkeypatch: pytest.MonkeyPatch, function, arguments, names):  # type: ignore[no-untyped-def]
    with monkeypatch.context() as context:
        context.setenv("RETRO_BACKEND", "reference")
        return output_and_gradients(function, in_double(arguments, names), names)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [*CCA_SHAPES, (1, 80, 8, 1, 32, 40, 2, 80, 32), (1, 200, 1, 1, 128, 64, 2, 128, 64)], ids=str
)
def test_chunked_cross_attention(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    case = cca_case(shape, dtype)
    found = output_and_gradients(chunked_cross_attention, case, QKV)
    for name, a, b in zip(("o", *QKV), found, _exact(monkeypatch, chunked_cross_attention, case, QKV)):
        assert torch.isfinite(a).all(), name
        assert relative_error(a, b) < TOLERANCE[dtype], f"{name}: {relative_error(a, b):.1e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["causal", "packed", "range", "period"])
def test_attention(monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype) -> None:
    B, N, S, H, G, E = (1, 140, 140, 2, 1, 64) if kind in ("causal", "packed") else (3, 50, 37, 4, 2, 24)
    generator = torch.Generator().manual_seed(1)
    case = {"q": torch.randn(B, N, H, E, generator=generator).to(dtype), "is_causal": kind in ("causal", "packed")}
    case |= {name: torch.randn(B, S, G, E, generator=generator).to(dtype) for name in ("k", "v")}
    if kind == "packed":
        case["first_keys"] = torch.arange(N)[None] // 33 * 33
    if kind in ("range", "period"):
        case |= {"key_begins": torch.tensor([0, 3, 20]), "key_ends": torch.tensor([37, 3, 33])}
    if kind == "period":
        case |= dict(zip(("cos", "sin"), rotary_tables(60, 16))) | {"query_offset": 2, "query_period": 25}
    found = output_and_gradients(attention, case, QKV)
    for name, a, b in zip(("o", *QKV), found, _exact(monkeypatch, attention, case, QKV)):
        assert relative_error(a, b) < TOLERANCE[dtype], f"{name}: {relative_error(a, b):.1e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize(("width", "rotated"), [(64, 64), (80, 40), (18, 12), (256, 256)])
def test_rope(width: int, rotated: int, is_interleaved: bool, dtype: torch.dtype) -> None:
    cos, sin = rotary_tables(50, rotated)
    q, k = torch.randn(2, 37, 3, width).to(dtype), torch.randn(2, 37, 1, width).to(dtype)
    for positions in (None, torch.randint(0, 50, (37,)), torch.randint(0, 50, (2, 37))):
        found = rope_qk(q, k, cos, sin, positions, is_interleaved)
        for a, x in zip(found, (q, k)):
            exact = reference.rope(x.double(), cos, sin, positions, is_interleaved)
            assert relative_error(a, exact) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy(dtype: torch.dtype) -> None:
    """Of one tile and of several; what is not finite as PyTorch has it."""
    for rows, vocabulary in ((3, 1), (5, 70), (2, 9000)):
        logits, labels = (4 * torch.randn(rows, vocabulary)).to(dtype), torch.randint(0, vocabulary, (rows,))
        exact = logits.double()
        losses = reference.cross_entropy_(exact, labels, True)
        kept = logits.clone()
        without = cross_entropy_(kept, labels, has_gradient=False)
        assert torch.equal(kept, logits)
        found = cross_entropy_(logits, labels)
        assert torch.equal(found, without)
        torch.testing.assert_close(found.double(), losses, rtol=2e-6, atol=1e-5)
        assert float((logits.double() - exact).abs().max()) < TOLERANCE[dtype] * 2
    logits, labels = torch.randn(4, 40).to(dtype), torch.ones(4, dtype=torch.int64)
    logits[0, 7], logits[1, 39], logits[2, 5], logits[3] = torch.nan, torch.inf, -torch.inf, -torch.inf
    assert cross_entropy_(logits, labels).isfinite().tolist() == [False, False, True, False]
    assert logits.isfinite().all(1).tolist() == [False, False, True, False]


def test_gather_neighbors() -> None:
    generator = torch.Generator().manual_seed(2)
    table = torch.randint(0, 99, (40, 12), generator=generator).int()
    document = torch.arange(40) // 3
    lengths = torch.where(torch.arange(40) % 3 == 2, 5, 12)
    ids = torch.randint(-1, 40, (3, 5, 2), generator=generator)
    for r in (5, 12, 24, 40):
        for tokens in (table, table.long(), (table + 65_000).to(torch.uint16)):
            for given in (ids, ids.int()):
                found = gather_neighbors(tokens, document, lengths, given, r, pad_id=7)
                exact = reference.gather_neighbors(tokens, document, lengths, given.long(), r, 7)
                assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, exact))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite(dtype: torch.dtype) -> None:
    """A key that holds NaN or infinity reaches the output and the gradients; scores far below any mask's number do not vanish."""
    for bad in (torch.nan, torch.inf):
        for place in (0, 20, 69):
            q, k, v = torch.ones(2, 3, 1, 32), torch.randn(2, 70, 1, 32), torch.randn(2, 70, 1, 32)
            k[0, place, 0, 3] = bad
            tensors = [x.to(dtype).requires_grad_() for x in (q, k, v)]
            out = attention(*tensors)
            gradients = torch.autograd.grad(out.float().sum(), tensors)
            assert out[0].isnan().all()
            assert all(x[0].isnan().any() and x[1].isfinite().all() for x in (out, *gradients))
    if dtype == torch.float32:
        q, v = torch.ones(1, 1, 1, 2), torch.randn(1, 4, 1, 2)
        for scores in ([-1e35, -2e35, -1e38, -1e35], [-torch.inf, 1, 2, 3], [-torch.inf] * 4):
            k = torch.tensor(scores)[None, :, None, None] * torch.ones(2) / 2
            exact = reference.attention(q, k, v, False, None, None, None, None, None, 0, 1, 1.0)
            torch.testing.assert_close(attention(q, k, v, scale=1.0), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["packed", "chunked"])
def test_dropout(monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype) -> None:
    """The twin's mask, in the output and every gradient."""
    dropout = {"dropout": 0.3, "seed": torch.tensor(2**61 + 12345)}
    if kind == "chunked":
        function, case = chunked_cross_attention, cca_case((1, 40, 2, 1, 18, 16, 2, 7, 12), dtype)
    else:
        x = torch.randn(2, 40, 4, 18, generator=torch.Generator().manual_seed(3)).to(dtype)
        function, case = attention, {"q": x[:, :, :2], "k": x[:, :, 2:3], "v": x[:, :, 3:], "is_causal": True}
        case["first_keys"] = (torch.arange(40) // 33 * 33).expand(2, 40)
    found = output_and_gradients(function, case | dropout, QKV)
    for name, a, b in zip(("o", *QKV), found, _exact(monkeypatch, function, case | dropout, QKV)):
        assert relative_error(a, b) < 1.5 * TOLERANCE[dtype], f"{name}: {relative_error(a, b):.1e}"
