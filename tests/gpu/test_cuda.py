"""What cannot be seen without an NVIDIA GPU: the kernels there against float64, their determinism, graphs, host memory.

Run by benchmarks/gpu_check.sh; skipped where torch sees no GPU.
"""

import pytest
import torch
from kernel_helpers import (
    CCA_SHAPES,
    TOLERANCE,
    cca_case,
    in_double,
    output_and_gradients,
    relative_error,
    rotary_tables,
)
from retro_kernels import cuda, reference
from retro_kernels.attention import attention
from retro_kernels.chunked_cross_attention import chunked_cross_attention
from retro_kernels.cross_entropy import cross_entropy_
from retro_kernels.gather_neighbors import gather_neighbors
from retro_kernels.rope import rope_qk

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
QKV = ("q", "k", "v")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LARGE = [(4, 1024, 12, 12, 64, 64, 2, 128, 64), (2, 1024, 16, 4, 128, 64, 2, 128, 128)]


def on_gpu(arguments: dict[str, object]) -> dict[str, object]:
    return {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CCA_SHAPES + LARGE, ids=str)
def test_chunked_cross_attention(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Within the tolerance, and at most 1.5 times as far from float64 as eager math in the same type."""
    case = on_gpu(cca_case(shape, dtype))
    found = output_and_gradients(chunked_cross_attention, case, QKV)
    monkeypatch.setenv("RETRO_BACKEND", "reference")
    eager = output_and_gradients(chunked_cross_attention, case, QKV)
    exact = output_and_gradients(chunked_cross_attention, in_double(case, QKV), QKV)
    for name, a, b, c in zip(("o", *QKV), found, eager, exact):
        assert torch.isfinite(a).all(), name
        error = relative_error(a, c)
        assert error < TOLERANCE[dtype], f"{name}: {error:.1e}"
        assert error < 1.5 * relative_error(b, c) + 1e-7, f"{name}: {error:.1e}, eager {relative_error(b, c):.1e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["causal", "packed", "range"])
def test_attention(monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype) -> None:
    B, N, H, G, E = 2, 300, 4, 2, 64
    case = {name: torch.randn(B, N, heads, E, device="cuda").to(dtype) for name, heads in zip(QKV, (H, G, G))}
    arguments: dict[str, object] = dict(case)
    if kind == "range":
        arguments |= {"key_begins": torch.tensor([0, 40]).cuda(), "key_ends": torch.tensor([0, 257]).cuda()}
    else:
        arguments["is_causal"] = True
    if kind == "packed":
        arguments["first_keys"] = (torch.arange(N) // 70 * 70).expand(B, N).contiguous().cuda()
    found = output_and_gradients(attention, arguments, QKV)
    monkeypatch.setenv("RETRO_BACKEND", "reference")
    for name, a, b in zip(("o", *QKV), found, output_and_gradients(attention, in_double(arguments, QKV), QKV)):
        assert relative_error(a, b) < TOLERANCE[dtype], f"{name}: {relative_error(a, b):.1e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy(dtype: torch.dtype) -> None:
    for rows, vocabulary in ((7, 70), (300, 50_257)):
        logits = (4 * torch.randn(rows, vocabulary, device="cuda")).to(dtype)
        labels = torch.randint(0, vocabulary, (rows,), device="cuda")
        exact = logits.double()
        losses = reference.cross_entropy_(exact, labels, True)
        found = cross_entropy_(logits, labels)
        torch.testing.assert_close(found.double(), losses, rtol=2e-6, atol=1e-5)
        assert relative_error(logits, exact) < TOLERANCE[dtype]


def test_the_same_bits_a_hundred_times() -> None:
    case = on_gpu(cca_case(LARGE[0], torch.bfloat16))
    first = output_and_gradients(chunked_cross_attention, case, QKV)
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, output_and_gradients(chunked_cross_attention, case, QKV)))


def test_a_graph_replays() -> None:
    case = on_gpu(cca_case(LARGE[0], torch.bfloat16))
    with torch.no_grad():
        expected = chunked_cross_attention(**case)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = chunked_cross_attention(**case)
        out.fill_(torch.nan)
        graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, name: str) -> None:
    if name == "cuda" and cuda.LIBRARY is None:
        pytest.skip("built without nvcc")
    monkeypatch.setenv("RETRO_BACKEND", name)
    for width, rotated, is_interleaved in ((64, 64, False), (128, 64, True), (80, 40, False), (18, 12, True)):
        cos, sin = (x.cuda() for x in rotary_tables(100, rotated))
        wide = torch.randn(2, 67, 5, 2 * width, device="cuda").to(dtype)
        q, k = wide[:, :, :4, :width], wide[:, :, 4:, width:]
        for positions in (None, torch.randint(0, 100, (67,)).cuda(), torch.randint(0, 100, (2, 67)).cuda()):
            for a, x in zip(rope_qk(q, k, cos, sin, positions, is_interleaved), (q, k)):
                exact = reference.rope(x.double(), cos, sin, positions, is_interleaved)
                assert relative_error(a, exact) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_gathering(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if name == "cuda" and cuda.LIBRARY is None:
        pytest.skip("built without nvcc")
    monkeypatch.setenv("RETRO_BACKEND", name)
    table, document = torch.randint(0, 30_000, (1000, 64)).int(), torch.arange(1000) // 7
    lengths, ids = torch.full((1000,), 64), torch.randint(-1, 1000, (16, 8, 2))
    expected = reference.gather_neighbors(table, document, lengths, ids, 128, 0)
    found = gather_neighbors(table.cuda(), document.cuda(), lengths.cuda(), ids.cuda(), 128)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected))
    if name == "cuda":
        cuda.register_host(table)
        found = gather_neighbors(table, document.cuda(), lengths.cuda(), ids.cuda(), 128)
        torch.cuda.synchronize()
        cuda.unregister_host(table)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected))
