"""The rules that the ops share; each raises a ValueError that names the argument, its shape and the rule."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

MAX_HEAD_WIDTH = 256


def is_transformed(*tensors: Tensor | None) -> bool:
    """Whether any is a dual number, or wrapped by torch.func (jvp, grad, vmap): a kernel would compute without what it carries."""
    if torch.compiler.is_compiling():  # what is traced cannot be looked at; that a tangent may be there can
        return forward_ad._current_level >= 0
    if any(x is not None and torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors):
        return True
    if forward_ad._current_level < 0:
        return False
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def carries_derivative(*tensors: Tensor | None) -> bool:
    """Whether any has a gradient to come, or is transformed."""
    requires_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return requires_grad or is_transformed(*tensors)


def is_unobserved(*tensors: Tensor) -> bool:
    """Whether nothing but numbers is asked for: no derivative, no compiler, no mode that sees ops, no sign that is still to be applied. Then a
    kernel is called without PyTorch's op around it, whose first call loads the compiler (2 s and 180 MB).
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or carries_derivative(*tensors):
        return False
    return all(type(x) in (Tensor, torch.nn.Parameter) and not x.is_neg() for x in tensors)


def is_autocast(x: Tensor) -> bool:
    """Whether torch.autocast is on where x lies."""
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What torch.autocast makes of the arguments of scaled_dot_product_attention: all but float64 in its type, where it is on."""
    if not is_autocast(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(x if x.dtype == torch.float64 or not x.is_floating_point() else x.to(dtype) for x in tensors)


def check_heads(q: Tensor, k: Tensor, v: Tensor, keys: str) -> None:
    """The rules that every attention shares; `keys`: the dimensions of k and v. Raises ValueError."""
    if q.dim() != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected [b, n, h, e]")
    if k.dim() != keys.count(",") + 1 or k.shape != v.shape:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)}: expected the same {keys}")
    if (k.shape[0], k.shape[-1]) != (q.shape[0], q.shape[3]):
        raise ValueError(f"k {tuple(k.shape)} and q {tuple(q.shape)}: batch and head width must agree")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: expected one type")
    if not q.device == k.device == v.device:
        raise ValueError(f"q is on {q.device}, k on {k.device}, v on {v.device}: expected one device")
    if not q.dtype.is_floating_point:
        raise ValueError(f"q is {q.dtype}: expected a floating-point type")
    if not 2 <= q.shape[-1] <= MAX_HEAD_WIDTH or q.shape[-1] % 2:
        raise ValueError(
            f"q {tuple(q.shape)} has head width {q.shape[-1]}: expected an even one from 2 to {MAX_HEAD_WIDTH}"
        )
    if k.shape[-2] == 0 or q.shape[2] % k.shape[-2]:
        raise ValueError(f"q has {q.shape[2]} heads, k has {k.shape[-2]}: the first must be a multiple of the second")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.numel() and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} {tuple(tensor.shape)} has strides {tensor.stride()}: the last dimension must be contiguous"
            )


def check_tables(cos: Tensor | None, sin: Tensor | None, num_positions: int, head_width: int) -> None:
    """cos and sin [positions, rotary/2], together or not at all. Raises ValueError."""
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin must be given together")
    if cos is None or sin is None:
        return
    if cos.shape != sin.shape or cos.dim() != 2:
        raise ValueError(f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)}: expected the same [positions, rotary/2]")
    if 2 * cos.shape[1] > head_width:
        raise ValueError(f"cos {tuple(cos.shape)} rotates {2 * cos.shape[1]} features; the head width is {head_width}")
    if cos.shape[0] < num_positions:
        raise ValueError(f"cos has {cos.shape[0]} positions; {num_positions} are needed")


def check_whole(name: str, values: Tensor) -> None:
    """Whole numbers: of fractions a kernel would take the floor, and of a mask ones. Raises ValueError."""
    if values.dtype == torch.bool or values.is_floating_point() or values.is_complex():
        raise ValueError(f"{name} is {values.dtype}: expected a type of whole numbers (torch.int64)")


def check_range(name: str, values: Tensor | None, top: int, low: int = 0) -> None:
    """Whole numbers in low ... top; where they cannot be read without waiting (a GPU, compiling, vmap) they stay unread. Raises ValueError."""
    if values is None:
        return
    check_whole(name, values)
    if not values.numel() or values.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if is_transformed(values):
        return
    least, most = int(values.min()), int(values.max())
    if least < low or most > top:
        raise ValueError(f"{name} {tuple(values.shape)} spans {least} ... {most}; expected {low} ... {top}")
