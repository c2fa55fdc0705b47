"""`attention`: ranges of keys, packed causal documents, fused rotation, bad arguments, registration."""

import pytest
import torch
from kernel_helpers import TOLERANCE, in_double, output_and_gradients, relative_error, rotary_tables
from retro_kernels import cpp
from retro_kernels.attention import attention

QKV = ("q", "k", "v")
SHAPES = [  # b, n, s, heads, key/value heads, head width
    (2, 60, 60, 4, 2, 32),
    (1, 300, 300, 2, 2, 64),
    (3, 7, 7, 2, 1, 80),
    (2, 1, 200, 4, 4, 16),
    (2, 40, 130, 2, 1, 18),
]
KINDS = ("plain", "causal", "packed", "range", "range and rotation")


def case(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> dict[str, object]:
    B, N, S, H, G, E = shape
    generator = torch.Generator().manual_seed(sum(shape))
    q = torch.randn(B, N, H, E, generator=generator).to(dtype)
    k, v = (torch.randn(B, S, G, E, generator=generator).to(dtype) for _ in range(2))
    out: dict[str, object] = {"q": q, "k": k, "v": v}
    if kind in ("causal", "packed"):
        out["is_causal"] = True
    if kind == "packed":
        place = torch.arange(N) + S - N
        out["first_keys"] = torch.stack([place - place % (5 + 13 * b) for b in range(B)])
    if kind.startswith("range"):
        begins = torch.randint(0, S, (B,), generator=generator)
        out |= {
            "key_begins": begins,
            "key_ends": begins + torch.randint(0, S, (B,), generator=generator) % (S - begins + 1),
        }
    if kind == "range and rotation":
        out["cos"], out["sin"] = rotary_tables(S + 3, E // 4 * 2)
        out |= {"query_offset": 3, "query_period": max(1, N // 2)}
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    arguments = case(shape, kind, dtype)
    found = output_and_gradients(attention, arguments, QKV)
    exact = output_and_gradients(attention, in_double(arguments, QKV), QKV)
    for name, a, b in zip(("o", *QKV), found, exact):
        assert relative_error(a, b) < TOLERANCE[dtype], f"{name}: {relative_error(a, b):.1e}"


def test_an_empty_range_gives_exact_zeros() -> None:
    arguments = case((2, 20, 20, 2, 2, 32), "plain", torch.float32)
    arguments |= {"key_begins": torch.tensor([0, 4]), "key_ends": torch.tensor([0, 9])}
    out, *gradients = output_and_gradients(attention, arguments, QKV)
    assert (out[0] == 0).all() and (out[1] != 0).any()
    assert all((gradient[0] == 0).all() for gradient in gradients)


def test_what_is_outside_the_range_does_not_matter() -> None:
    arguments = case((2, 20, 150, 2, 1, 32), "plain", torch.float32)
    arguments |= {"key_begins": torch.tensor([3, 140]), "key_ends": torch.tensor([9, 150])}
    expected = output_and_gradients(attention, arguments, QKV)
    for name in ("k", "v"):
        spoiled = arguments[name].clone()  # type: ignore[attr-defined]
        spoiled[0, :3], spoiled[0, 9:], spoiled[1, :140] = torch.nan, torch.nan, torch.nan
        arguments[name] = spoiled
    assert all(torch.equal(a, b) for a, b in zip(output_and_gradients(attention, arguments, QKV), expected))


@pytest.mark.parametrize("kind", KINDS)
def test_attentions_over_parts_of_the_keys_are_merged_by_their_log_sum_exps(kind: str) -> None:
    arguments = case(SHAPES[4], kind, torch.float32)
    out, lse = attention(**arguments, return_lse=True)
    exact, exact_lse = attention(**in_double(arguments, QKV), return_lse=True)
    assert torch.equal(out, attention(**arguments)) and exact_lse.dtype == torch.float64
    assert torch.equal(lse.isposinf(), exact_lse.isposinf())
    assert relative_error(lse.nan_to_num(posinf=0), exact_lse.nan_to_num(posinf=0)) < TOLERANCE[torch.float32]
    if kind != "plain":
        return
    q, k, v = (arguments[name] for name in QKV)
    parts = [attention(q, k[:, part], v[:, part], return_lse=True) for part in (slice(0, 50), slice(50, None))]  # type: ignore[index]
    share = (parts[0][1] - parts[1][1]).sigmoid().transpose(1, 2)[..., None]
    assert relative_error(torch.lerp(parts[1][0], parts[0][0], share), exact) < TOLERANCE[torch.float32]


@pytest.mark.skipif(not cpp.is_available(), reason="no C++ extension")
def test_how_many_threads_share_the_queries_changes_no_bit(instruction_set: str) -> None:
    arguments = case((1, 700, 700, 6, 3, 32), "causal", torch.bfloat16)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(attention(**arguments))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, found[0]) for one in found)


def test_zero_sizes() -> None:
    zeros = torch.zeros
    assert attention(zeros(0, 3, 2, 8), zeros(0, 3, 2, 8), zeros(0, 3, 2, 8)).shape == (0, 3, 2, 8)
    assert attention(zeros(2, 0, 2, 8), zeros(2, 3, 2, 8), zeros(2, 3, 2, 8)).shape == (2, 0, 2, 8)


@pytest.mark.skipif(not cpp.is_available(), reason="no C++ extension")
def test_registration() -> None:
    arguments = case((2, 60, 60, 4, 2, 32), "packed", torch.float32)
    tensors = [arguments[name].requires_grad_() for name in QKV]  # type: ignore[attr-defined]
    q, k, v = (x.detach() for x in tensors)
    each = tuple(x.requires_grad_() for x in (q, k[:, None, None], v[:, None, None]))
    data = (None, None, arguments["first_keys"], *rotary_tables(60, 32), None, 0, True, 0, 60, 0.2, 0.0)
    torch.library.opcheck(torch.ops.retro_kernels.attention.default, (*each, *data))
    compiled = torch.compile(attention, fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(**arguments), attention(**arguments))


def test_gradcheck() -> None:
    arguments = in_double(case((1, 5, 5, 2, 1, 4), "packed", torch.float32), QKV)
    check = lambda q, k, v: attention(**(arguments | {"q": q, "k": k, "v": v}))  # noqa: E731
    assert torch.autograd.gradcheck(check, [arguments[name].requires_grad_() for name in QKV])  # type: ignore[attr-defined]


X = torch.zeros(2, 6, 2, 8)
WRONG = {
    "q has shape": {"q": X[0]},
    "expected the same": {"v": X[:, :5]},
    "batch and head width": {"q": X[:1]},
    "multiple of the second": {"q": torch.zeros(2, 6, 3, 8)},
    "at least as many keys": {"q": torch.zeros(2, 7, 2, 8), "is_causal": True},
    "first_keys has shape": {"first_keys": torch.zeros(2, 5)},
    "first_keys is torch.float32": {"first_keys": torch.full((2, 6), 1.7)},
    "first_keys is torch.bool": {"first_keys": torch.ones(2, 6, dtype=torch.bool)},
    "first_keys .* spans -3": {"first_keys": torch.full((2, 6), -3)},
    "key_ends is torch.float64": {"key_ends": torch.ones(2, dtype=torch.float64)},
    "key_ends has shape": {"key_ends": torch.zeros(6)},
    "key_ends .* spans 0 ... 7; expected 0 ... 6": {"key_ends": torch.tensor([0, 7])},
    "key_begins .* spans -1": {"key_begins": torch.tensor([-1, 0])},
    "given together": {"sin": torch.ones(6, 4)},
    "cos has 4 positions; 6": {"cos": torch.ones(4, 4), "sin": torch.ones(4, 4)},
    "q is torch.bfloat16": {"q": X.bfloat16()},
    "query_offset=-5": {"query_offset": -5, "cos": torch.ones(6, 4), "sin": torch.ones(6, 4)},
    "query_period=0": {"query_period": 0},
}


@pytest.mark.parametrize("named", WRONG)
def test_wrong_arguments_are_named(named: str) -> None:
    with pytest.raises(ValueError, match=named):
        attention(**({"q": X, "k": X, "v": X} | WRONG[named]))
