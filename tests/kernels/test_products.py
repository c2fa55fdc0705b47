"""fp32 products by either library: close to float64 in every direction and order of derivative, and which one is taken."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from retro_kernels import products

has_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("RETRO_PRODUCTS", raising=False)
    before = products.library()
    yield
    products.use(before)


@has_onednn
@pytest.mark.parametrize("library", products.LIBRARIES)
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3, 5), (129,)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_against_float64(library: str, shape: tuple[int, ...], has_bias: bool) -> None:
    products.use(library)
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(*shape, 33, generator=generator), torch.randn(21, 33, generator=generator)]
    parts += [torch.randn(21, generator=generator)] * has_bias
    slope = torch.randn(*shape, 21, generator=generator)

    def values(dtype: torch.dtype) -> list[torch.Tensor]:
        given = [part.to(dtype).requires_grad_() for part in parts]
        y = products.product(*given)
        return [y, *torch.autograd.grad((y * slope).sum(), given)]

    for mine, exact in zip(values(torch.float32), values(torch.float64)):
        assert mine.shape == exact.shape and mine.dtype == torch.float32
        assert float((mine - exact).detach().norm() / exact.detach().norm()) < 1e-6


@has_onednn
def test_other_derivatives_types_and_compilation() -> None:
    products.use("onednn")
    x, w = torch.randn(6, 5), torch.randn(4, 5)
    squares = lambda x: (products.product(x, w) ** 2).sum()  # noqa: E731
    plain = lambda x: (F.linear(x, w) ** 2).sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(squares)(x), torch.func.grad(plain)(x))
    hessian = torch.autograd.functional.hessian
    torch.testing.assert_close(hessian(squares, x), hessian(plain, x))
    assert torch.equal(products.product(x.double(), w.double()), F.linear(x.double(), w.double()))
    assert products.product(x[:0], w).shape == (0, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert products.product(x, w).dtype == torch.bfloat16
    torch.library.opcheck(torch.ops.retro_kernels.onednn_product, (x.requires_grad_(), w.requires_grad_(), None))


@has_onednn
def test_the_faster_one_is_taken_once_and_can_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in products.LIBRARIES:
        products.use(None)
        monkeypatch.setattr(products, "faster", lambda found=found: found)
        assert products.library() == found
        monkeypatch.setattr(products, "faster", None)  # it is not timed again
        assert products.library() == found
    monkeypatch.setenv("RETRO_PRODUCTS", "blas")
    assert products.library() == "blas"
    monkeypatch.setenv("RETRO_PRODUCTS", "mkl")
    with pytest.raises(ValueError, match="RETRO_PRODUCTS=mkl is no library\n.*blas, onednn\n.*unset RETRO_PRODUCTS"):
        products.library()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ValueError, match="onednn is not available"):
        products.use("onednn")


def test_what_takes_twice_as_long_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(1000))
    monkeypatch.setattr(products.time, "perf_counter", lambda: float(next(times)))
    assert products.faster() == "blas", "both take the same"
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert products.faster() == "blas"
