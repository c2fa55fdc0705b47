"""Dropout in the attention kernels: the twin's mask exactly, whatever computes it; its rate; its seed from torch's generator."""

from typing import Any

import pytest
import torch
from kernel_helpers import TOLERANCE, cca_case, output_and_gradients, relative_error, rotary_tables
from retro_kernels import cpp
from retro_kernels.attention import attention
from retro_kernels.chunked_cross_attention import chunked_cross_attention
from retro_kernels.dropout import factors, new_seed
from torch.utils.checkpoint import checkpoint

QKV = ("q", "k", "v")
SEED = torch.tensor(2**61 + 12345)


def case(kind: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    B, N, S, H, G, E = (2, 150, 150, 4, 2, 18) if kind != "range" else (3, 7, 140, 2, 1, 32)
    q = torch.randn(B, N, H, E, generator=generator)
    arguments: dict[str, Any] = {"q": q} | {name: torch.randn(B, S, G, E, generator=generator) for name in ("k", "v")}
    arguments = {name: x.to(dtype) for name, x in arguments.items()} | {"dropout": 0.3, "seed": SEED}
    if kind == "range":
        return arguments | {"key_begins": torch.tensor([0, 3, 9]), "key_ends": torch.tensor([140, 3, 139])}
    first = torch.arange(N) // 40 * 40
    tables = dict(zip(("cos", "sin"), rotary_tables(N, 8)))
    return arguments | {"is_causal": True, "first_keys": first.expand(B, N)} | tables


def crossing(
    dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (2, 70, 4, 2, 32, 16, 2, 37, 32)
) -> dict[str, Any]:
    return cca_case(shape, dtype) | {"dropout": 0.2, "seed": SEED}


def exact(function: Any, arguments: dict[str, Any]) -> list[torch.Tensor]:
    """In float64, that is by the twin."""
    return output_and_gradients(function, arguments | {name: arguments[name].double() for name in QKV}, QKV)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["packed", "range", "chunked"])
def test_the_same_mask_on_every_instruction_set(instruction_set: str, kind: str, dtype: torch.dtype) -> None:
    """Outputs and gradients; one weight dropped that should not be would show as an error of a hundredth."""
    function: Any = chunked_cross_attention if kind == "chunked" else attention
    arguments = crossing(dtype) if kind == "chunked" else case(kind, dtype)
    for name, a, b in zip(("o", *QKV), output_and_gradients(function, arguments, QKV), exact(function, arguments)):
        assert relative_error(a, b) < 1.5 * TOLERANCE[dtype], f"{name}: {relative_error(a, b):.1e}"


def test_gradcheck() -> None:
    arguments = {"dropout": 0.4, "seed": SEED, "is_causal": True}
    tensors = [torch.randn(1, 6, n, 4, dtype=torch.float64, requires_grad=True) for n in (2, 1, 1)]
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, **arguments), tensors)
    neighbors = [torch.randn(1, 2, 2, 3, 1, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    check = lambda q, k, v: chunked_cross_attention(q, k, v, None, 3, dropout=0.4, seed=SEED)  # noqa: E731
    assert torch.autograd.gradcheck(check, [tensors[0], *neighbors])


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5, 0.9])
def test_the_rate(dropout: float) -> None:
    """Of all weights, of each query's and of each key's; independent between neighbors, heads and seeds."""
    kept = factors(dropout, SEED, 3, 4, torch.arange(200), torch.arange(300))
    is_kept = (kept > 0).double()
    torch.testing.assert_close(kept.unique(), torch.tensor([0.0, 1 / (1 - dropout)])[0 if dropout else 1 :])
    deviation = max((dropout * (1 - dropout)) ** 0.5, 1e-9)
    for rate, count in ((is_kept.mean(), 3 * 4 * 200 * 300), (is_kept.mean(-1), 300), (is_kept.mean(2), 200)):
        assert (rate - (1 - dropout)).abs().max() <= 6 * deviation / count**0.5
    if dropout:
        other = (factors(dropout, SEED + 1, 3, 4, torch.arange(200), torch.arange(300)) > 0).double()
        a = (is_kept - (1 - dropout)) / deviation
        for b in (a.roll(1, -1), a.roll(1, -2), a.roll(1, 1), a.roll(1, 0), (other - (1 - dropout)) / deviation):
            assert abs(float((a * b).mean())) < 6 / a.numel() ** 0.5


def test_the_seed_is_drawn_and_everything_follows_it() -> None:
    arguments = case("packed") | {"seed": None}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = attention(**arguments), attention(**arguments)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(attention(**arguments), first)
    torch.set_rng_state(state)
    assert torch.equal(attention(**(arguments | {"seed": new_seed(first)})), first)
    assert torch.equal(
        attention(**(arguments | {"dropout": 0.0})), attention(**(arguments | {"dropout": 0.0, "seed": SEED}))
    )


@pytest.mark.skipif(not cpp.is_available(), reason="no C++ extension")
def test_threads_and_recomputation() -> None:
    arguments, threads = case("packed"), torch.get_num_threads()
    expected = output_and_gradients(attention, arguments, QKV)
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert all(map(torch.equal, output_and_gradients(attention, arguments, QKV), expected))
    finally:
        torch.set_num_threads(threads)
    drawn = arguments | {"seed": None}
    torch.manual_seed(4)
    plain = output_and_gradients(attention, drawn, QKV)
    torch.manual_seed(4)
    again = output_and_gradients(lambda **given: checkpoint(attention, use_reentrant=False, **given), drawn, QKV)
    assert all(map(torch.equal, again, plain))


@pytest.mark.skipif(not cpp.is_available(), reason="no C++ extension")
def test_registration() -> None:
    arguments = case("packed")
    tensors = [arguments[name] if name == "q" else arguments[name][:, None, None] for name in QKV]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    data = (None, None, arguments["first_keys"], None, None, SEED, 0, True, 0, 150, 0.2, 0.3)
    torch.library.opcheck(torch.ops.retro_kernels.attention.default, (*tensors, *data))
    arguments = crossing()
    arguments["k"], arguments["v"] = torch.nan_to_num(arguments["k"]), torch.nan_to_num(arguments["v"])
    tensors = [arguments[name].requires_grad_() for name in QKV]
    data = (arguments["neighbor_lengths"], None, None, arguments["cos"], arguments["sin"], SEED)
    data = (*data, 16, False, 15, 0, 0.2, 0.3)
    torch.library.opcheck(torch.ops.retro_kernels.chunked_cross_attention.default, (*tensors, *data))


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_what_is_no_share_is_named(dropout: float) -> None:
    for function, arguments in ((attention, case("packed")), (chunked_cross_attention, crossing())):
        with pytest.raises(ValueError, match=f"dropout={dropout}: expected at least 0 and below 1"):
            function(**(arguments | {"dropout": dropout}))
