"""-log softmax(logits)[label] of every row and, in the logits' place, its gradient softmax(logits) - onehot(label).

Reads the logits three times and writes them once, a row at a time, which stays in the cache: one read and one write of the
logits is the roofline. Sums are float32 (float64 of float64). On a CPU in C++ where that was built, on a GPU in Triton; all else is PyTorch's.
Shape letters: T tokens, V vocabulary.
"""

import torch
from retro_kernels import reference
from retro_kernels.backend import choose, cross_entropy_kernels
from retro_kernels.checks import carries_derivative, check_range, is_unobserved
from torch import Tensor


def cross_entropy_(logits: Tensor, labels: Tensor, has_gradient: bool = True) -> Tensor:
    """logits [t, V], labels int64 [t] -> [t] in float32 (float64 of float64).

    With `has_gradient` the logits are overwritten by the gradient of the sum, without it they keep their values. Raises ValueError
    for other shapes and types and for labels outside 0 ... V - 1, and RuntimeError where a gradient or a derivative would be lost.
    """
    if carries_derivative(logits):
        raise RuntimeError(
            "cross_entropy_ gives a gradient and has none\n  the logits require one, or are a dual number or wrapped by torch.func"
            "\n  call it under torch.no_grad() or in an autograd.Function, or take torch.nn.functional.cross_entropy"
        )
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)} {labels.dtype}: expected [t, V] and int64 [t]"
        )
    check_range("labels", labels, logits.shape[1] - 1)
    is_packed = logits.is_contiguous() and logits.numel() > 0
    if is_packed and choose("cross_entropy", logits) != "reference":
        if is_unobserved(logits):
            return cross_entropy_kernels(logits).cross_entropy_(logits, labels, has_gradient)
        return _cross_entropy_(logits, labels, has_gradient)
    return reference.cross_entropy_(logits, labels, has_gradient)


@torch.library.custom_op("retro_kernels::cross_entropy_", mutates_args=("logits",))
def _cross_entropy_(logits: Tensor, labels: Tensor, has_gradient: bool) -> Tensor:
    return cross_entropy_kernels(logits).cross_entropy_(logits, labels, has_gradient)


@_cross_entropy_.register_fake
def _(logits, labels, has_gradient):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape[:1], dtype=torch.float32)
