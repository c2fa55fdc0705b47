"""y = x w' + bias of float32 rows by the faster of two libraries: the BLAS that PyTorch takes, or oneDNN.

PyTorch's BLAS is MKL, which chooses its code by the processor's maker: on an AMD processor with AVX-512 it multiplies with
AVX2, at about half of oneDNN's rate. Which one is faster here is timed once in a process, at the first product, unless
RETRO_PRODUCTS or `use` has said it. Both sum in float32, in another order: results differ in the last bits, so whoever
promises the same bits again names the library (train/loop.py does). The roofline is the processor's float32 rate.
Shape letters: T rows, D inputs, O outputs.
"""

import os
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from retro_kernels.checks import is_transformed
from torch import Tensor

LIBRARIES = ("blas", "onednn")
MARGIN = 1.25  # oneDNN must be as many times as fast: where both are alike, noise chooses nothing
SIZE, ROUNDS = 512, 3  # of what is timed: 3 products of SIZE^3, some 50 ms

_chosen: str | None = None


def library() -> str:
    """The library in use, timed where nothing has said it. Raises ValueError where RETRO_PRODUCTS cannot be used."""
    forced = os.environ.get("RETRO_PRODUCTS", "")
    if forced:
        _check("RETRO_PRODUCTS", forced)
        return forced
    if _chosen is None:
        use(faster())
    assert _chosen is not None
    return _chosen


def use(name: str | None) -> None:
    """Let the products of this process be those of `name`; None: of the one that is faster at the next. Raises ValueError."""
    global _chosen
    if name is not None:
        _check("products", name)
    _chosen = name


def _check(what: str, name: str) -> None:
    if name not in LIBRARIES:
        raise ValueError(f"{what}={name} is no library\n  one of {', '.join(LIBRARIES)}\n  unset RETRO_PRODUCTS")
    if name == "onednn" and not has_onednn():
        raise ValueError(f"{what}=onednn is not available\n  this PyTorch was built without it\n  unset RETRO_PRODUCTS")


def has_onednn() -> bool:
    """Whether this PyTorch was built with it."""
    return torch.backends.mkldnn.is_available()


def faster() -> str:
    """The library that takes less for a product and its gradients."""
    if not has_onednn():
        return "blas"
    x, w = torch.ones(SIZE, SIZE), torch.ones(SIZE, SIZE)

    def seconds(product: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> float:
        start = time.perf_counter()
        for a, b in ((x, w), (x, w.T), (x.T, x.T)):
            product(a, b, None)
        return time.perf_counter() - start

    with torch.no_grad():
        times = [(seconds(F.linear), seconds(onednn_product)) for _ in range(1 + ROUNDS)][1:]
    blas, onednn = map(min, zip(*times))
    return "onednn" if blas > MARGIN * onednn else "blas"


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., d], weight [o, d], bias [o] -> [..., o] with gradients; float32 on a CPU by the library in use, else PyTorch's."""
    if not is_onednn(x, weight, *([] if bias is None else [bias])):
        return F.linear(x, weight, bias)
    y: Tensor = onednn_product(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def is_onednn(*parts: Tensor) -> bool:
    """Whether a product of these is oneDNN's; what is compiled is the compiler's."""
    if torch.compiler.is_compiling():
        return False
    is_taken = all(part.device.type == "cpu" and part.dtype == torch.float32 and part.numel() for part in parts)
    return is_taken and not torch.is_autocast_enabled("cpu") and not is_transformed(*parts) and library() == "onednn"


@torch.library.custom_op("retro_kernels::onednn_product", mutates_args=())
def onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [t, d], weight [o, d], bias [o] -> [t, o] in float32; either may be a transposed matrix."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


@onednn_product.register_fake
def _(x, weight, bias):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], weight.shape[0]))


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, _bias = inputs
    ctx.save_for_backward(x, weight)


def _gradients(ctx, grad_TO):  # type: ignore[no-untyped-def]
    x_TD, weight_OD = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    return (
        onednn_product(grad_TO, weight_OD.T, None) if needs_x else None,
        onednn_product(x_TD.T, grad_TO.T, None).T
        if needs_weight
        else None,  # this way round it is 1.2-1.5 times as fast
        grad_TO.sum(0) if needs_bias else None,
    )


onednn_product.register_autograd(_gradients, setup_context=_keep)
