"""The layers of a step of decoding: C++ close to float64, the same bits whatever rows are beside, bad places named."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from retro_kernels import cpp, reference
from retro_kernels.step import (
    Attending,
    CrossAttentionPart,
    FeedForwardPart,
    Matrix,
    Norm,
    Part,
    SelfAttentionPart,
    Steps,
)
from torch import Tensor, nn

pytestmark = pytest.mark.skipif(not cpp.is_available(), reason="no C++ extension")
S, POSITIONS = 37, 50
SHAPES = [(1, 2, 2, 8), (2, 4, 2, 16), (5, 6, 1, 10), (8, 3, 3, 64), (16, 2, 2, 80), (3, 1, 1, 128)]  # B, H, G, E
TYPES = [torch.float32, torch.bfloat16, torch.int8]


def rounded(kind: torch.dtype) -> float:
    """What int8 weights meet is bytes, what bfloat16 weights meet is bfloat16 where the processor has it."""
    if kind == torch.int8:
        return 1e-2
    return 5e-3 if kind == torch.bfloat16 and cpp.multiplies_bf16() else 2e-6


def matrix(outputs: int, inputs: int, kind: torch.dtype = torch.float32, has_bias: bool = True) -> Matrix:
    bias = torch.randn(outputs) if has_bias else None
    if kind == torch.int8:
        scale = torch.rand(outputs) / 127 / inputs**0.5
        return Matrix(torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8), bias, scale)
    weight = torch.randn(outputs, inputs) / inputs**0.5
    return Matrix(weight.to(kind), bias if bias is None else bias.to(kind))


def norm(width: int, is_rms: bool, dtype: torch.dtype = torch.float32) -> Norm:
    return Norm(torch.rand(width).to(dtype), None if is_rms else torch.randn(width).to(dtype), 1e-5, is_rms)


def wide(x: object) -> object:
    """The same in float64; the scale of int8 weights multiplied in."""
    if isinstance(x, Tensor):
        return x.double() if x.is_floating_point() else x
    if isinstance(x, Matrix) and x.scale is not None:
        return Matrix(x.weight.double() * x.scale.double()[:, None], wide(x.bias))  # type: ignore[arg-type]
    if isinstance(x, Matrix | Norm | Attending | Part):
        return replace(x, **{item.name: wide(getattr(x, item.name)) for item in fields(x) if item.init})
    return x


def tables(pairs: int) -> tuple[Tensor, Tensor]:
    angle = torch.rand(POSITIONS, pairs) * 6
    return angle.cos(), angle.sin()


def self_attending(shape: tuple[int, ...], dtype: torch.dtype, pairs: int, interleaved: bool) -> Attending:
    B, _, G, E = shape
    starts = torch.randint(4, S, (B,))
    cache = [torch.randn(B, S + 3, G, E).to(dtype)[:, :S] for _ in range(2)]
    rotary = tables(pairs) if pairs else (None, None)
    return Attending(*cache, E**-0.5, torch.randint(0, 4, (B,)), starts, None, starts, *rotary, interleaved)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("is_cache_narrow", [False, True])
@pytest.mark.parametrize("is_rms", [False, True])
def test_self_attention(
    instruction_set: str, shape: tuple[int, ...], kind: torch.dtype, is_cache_narrow: bool, is_rms: bool
) -> None:
    torch.manual_seed(0)
    B, H, G, E = shape
    D, cache_type = 24, torch.bfloat16 if is_cache_narrow else torch.float32
    attending = self_attending(shape, cache_type, E // 4 if is_rms else E // 2, interleaved=is_rms)
    weights = [matrix(n, D, kind) for n in (H * E, G * E, G * E)] + [matrix(D, H * E, kind, False)]
    x, part = torch.randn(B, D), SelfAttentionPart(norm(D, is_rms), *weights, attending)
    exact_part = wide(part)
    exact_attending = exact_part.attending  # type: ignore[attr-defined]
    exact = reference.step(x.double(), exact_part)  # type: ignore[arg-type]
    found = Steps([part])(x)
    error = 2e-2 if torch.bfloat16 in (kind, cache_type) else max(rounded(kind), 1e-5)
    assert found.dtype == torch.float32
    assert (found - exact).norm() <= error * exact.norm()
    rows = torch.arange(B)
    for cache, expected in zip((attending.keys, attending.values), (exact_attending.keys, exact_attending.values)):
        assert torch.equal(cache[rows, 0], expected[rows, 0].to(cache_type))
        written, wanted = cache[rows, attending.starts], expected[rows, attending.starts]
        assert (written - wanted).norm() <= error * wanted.norm()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("adds_bias", [False, True])
@pytest.mark.parametrize("keys", [S, 1, 0])
def test_cross_attention(instruction_set: str, shape: tuple[int, ...], adds_bias: bool, keys: int) -> None:
    torch.manual_seed(1)
    B, H, G, E = shape
    D, cache = 20, [torch.randn(B, S, G, E)[:, :keys] for _ in range(2)]
    valid = torch.rand(B, keys) < 0.5
    valid[0] = False  # a row that has no neighbors
    offsets = torch.randint(0, POSITIONS, (B,))
    cos, sin = tables(E // 2)
    attending = Attending(*cache, 0.2, valid=valid, positions=offsets, cos=cos, sin=sin)
    x, part = (
        torch.randn(B, D),
        CrossAttentionPart(norm(D, False), matrix(H * E, D), matrix(D, H * E), attending, adds_bias),
    )
    exact = reference.step(x.double(), wide(part))  # type: ignore[arg-type]
    found = Steps([part])(x)
    assert torch.isfinite(found).all()
    assert (found - exact).norm() <= 1e-5 * exact.norm()
    if not adds_bias:
        assert torch.equal(found[0], x[0])


@pytest.mark.parametrize("rows", [1, 2, 7, 17])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "swiglu"])
def test_feed_forward(instruction_set: str, rows: int, kind: torch.dtype, activation: str) -> None:
    torch.manual_seed(2)
    D, F = 40, 77
    gate = matrix(F, D, kind) if activation == "swiglu" else None
    x, plain = 3 * torch.randn(rows, D), norm(D, activation == "swiglu")
    part = FeedForwardPart(plain, gate, matrix(F, D, kind), matrix(D, F, kind), activation)
    exact = reference.step(x.double(), wide(part))  # type: ignore[arg-type]
    found = Steps([part])(x)
    assert (found - exact).norm() <= rounded(kind) * exact.norm()


@pytest.mark.parametrize("kind", TYPES)
def test_a_row_does_not_depend_on_the_rows_beside_it(instruction_set: str, kind: torch.dtype) -> None:
    torch.manual_seed(3)
    B, D = 21, 24
    attending = self_attending((B, 4, 2, 16), torch.float32, 8, False)
    weights = [matrix(n, D, kind) for n in (64, 32, 32)] + [matrix(D, 64, kind)]
    x, first, second = torch.randn(B, D), norm(D, False), norm(D, True)
    ffn = (matrix(50, D, kind), matrix(50, D, kind), matrix(D, 50, kind))

    def layer(rows: slice) -> Tensor:
        names = ("keys", "values", "begins", "starts", "positions")
        part = replace(attending, **{name: getattr(attending, name)[rows].clone() for name in names})
        parts = [SelfAttentionPart(first, *weights, part), FeedForwardPart(second, *ffn, "swiglu")]
        return Steps(parts)(x[rows].contiguous())

    together = layer(slice(0, B))
    for begin, end in ((0, 1), (3, 4), (0, 8), (5, 12), (8, 16), (0, 17), (4, 21)):
        assert torch.equal(layer(slice(begin, end)), together[begin:end])


def test_float64_is_pytorchs() -> None:
    torch.manual_seed(4)
    x, ws = torch.randn(3, 8).double(), [Matrix(torch.randn(8, 8).double()) for _ in range(2)]
    part = FeedForwardPart(Norm(torch.ones(8).double(), None, 1e-5, True), None, *ws, "gelu")
    assert torch.equal(Steps([part])(x), reference.step(x, part))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_caches_are_read_in_pieces(instruction_set: str, dtype: torch.dtype) -> None:
    """Rows of none to many pieces of keys, whose bits do not depend on the rows beside; and a key that is not a number."""
    torch.manual_seed(9)
    lengths, (G, H, E), D = torch.tensor([700, 256, 257, 3, 1025]), (2, 10, 20), 24
    caches = [torch.randn(5, G, 1100, E).to(dtype).transpose(1, 2) for _ in range(2)]
    attending = Attending(*caches, E**-0.5, torch.tensor([0, 0, 1, 2, 500]), lengths, None, lengths)
    weights = [matrix(n, D) for n in (H * E, G * E, G * E)] + [matrix(D, H * E)]
    x, part = torch.randn(5, D), SelfAttentionPart(norm(D, True), *weights, attending)
    exact = reference.step(x.double(), wide(part))  # type: ignore[arg-type]
    found = Steps([part])(x)
    assert (found - exact).norm() <= (1e-5 if dtype == torch.float32 else 5e-3) * exact.norm()
    for row in range(5):
        cut = {
            name: getattr(attending, name)[row : row + 1].clone()
            for name in ("keys", "values", "begins", "starts", "positions")
        }
        one = Steps([replace(part, attending=replace(attending, **cut))])(x[row : row + 1].clone())
        assert torch.equal(one, found[row : row + 1])
    caches[0][0, 300] = torch.nan
    assert Steps([part])(x).isnan().all(1).tolist() == [True, False, False, False, False]


def test_a_new_token_before_the_first_key_attends_nothing(instruction_set: str) -> None:
    """Padding on the left, token by token: as the twin, whatever the cache holds."""
    torch.manual_seed(6)
    weights = [matrix(16, 8), matrix(16, 8), matrix(16, 8), matrix(8, 16)]
    attending = replace(self_attending((2, 2, 2, 8), torch.float32, 4, False), begins=torch.tensor([7, S + 3]))
    part = SelfAttentionPart(norm(8, True), *weights, replace(attending, starts=torch.tensor([5, 0])))
    x = torch.randn(2, 8)
    torch.testing.assert_close(Steps([part])(x), reference.step(x, part))


def test_several_new_tokens_of_a_row_meet_each_other(instruction_set: str) -> None:
    """Three of row 1 and one of row 0, against one step each; a row that the cache lacks is named."""
    torch.manual_seed(7)
    H, G, E, D, rows, starts = 4, 2, 16, 24, [1, 1, 1, 0], [9, 10, 11, 20]
    weights = [matrix(n * E, D) for n in (H, G, G)] + [matrix(D, H * E)]
    cache, rotary = [torch.randn(2, S, G, E) for _ in range(2)], tables(E // 2)
    plain, x = norm(D, True), torch.randn(4, D)

    def step(chosen: slice, rows: list[int]) -> Tensor:
        place = torch.tensor(starts[chosen])
        attending = Attending(
            *cache, E**-0.5, torch.ones_like(place), place, None, place, *rotary, rows=torch.tensor(rows[chosen])
        )
        return Steps([SelfAttentionPart(plain, *weights, attending)])(x[chosen])

    one_by_one = torch.cat([step(slice(n, n + 1), rows) for n in range(4)])
    for part in cache:
        part[1, 9:12] = part[0, 20] = torch.nan  # whatever was guessed before
    assert torch.equal(step(slice(0, 4), rows), one_by_one)
    with pytest.raises(ValueError, match="row 2 of the cache; it has 2"):
        step(slice(0, 4), [1, 1, 2, 0])


def test_places_outside_are_named() -> None:
    torch.manual_seed(5)
    weights = [matrix(16, 8), matrix(16, 8), matrix(16, 8), matrix(8, 16)]
    attending = self_attending((2, 2, 2, 8), torch.float32, 4, False)
    x, plain = torch.randn(2, 8), norm(8, True)
    for change, message in (
        ({"starts": torch.tensor([5, S])}, f"row 1 attends .* the cache holds {S}"),
        ({"starts": torch.tensor([5, -2])}, "row 1 attends"),
        ({"starts": torch.tensor([5, -1])}, "row 1 attends"),
        ({"begins": torch.tensor([0, -1])}, "row 1 attends"),
        ({"positions": torch.tensor([0, POSITIONS])}, f"cos has {POSITIONS} positions"),
        ({"starts": None}, r"starts is None; expected \[2\]"),
        ({"starts": torch.tensor([1])}, r"starts has shape \(1,\); expected \[2\]"),
        ({"values": attending.values[:, 1:]}, "expected q"),
        ({"sin": None}, "given together"),
        ({"valid": torch.ones(2, 1, dtype=torch.bool)}, "valid has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            Steps([SelfAttentionPart(plain, *weights, replace(attending, **change))])(x)
    for place in range(4):
        wrong = [*weights[:place], matrix(9, 9), *weights[place + 1 :]]
        with pytest.raises(ValueError, match="expected"):
            Steps([SelfAttentionPart(plain, *wrong, attending)])
    with pytest.raises(ValueError, match=r"down has weight \(8, 9\)"):
        Steps([FeedForwardPart(plain, None, matrix(10, 8), matrix(8, 9), "gelu")])
    part = SelfAttentionPart(plain, *weights, attending)
    with pytest.raises(ValueError, match=r"x has shape \(3, 8\); expected \[2, 8\]"):
        Steps([part])(torch.randn(3, 8))
    with pytest.raises(ValueError, match=r"attend \[1, 2\] rows"):
        Steps([part, replace(part, attending=self_attending((1, 2, 2, 8), torch.float32, 4, False))])
    with pytest.raises(ValueError, match=r"the norm has weight \(9,\); expected \[8\]"):
        Steps([replace(part, norm=norm(9, True))])
    ffn = FeedForwardPart(plain, matrix(10, 8), matrix(10, 8), matrix(8, 10), "gelu")
    for wrong_gate in (ffn, replace(ffn, gate=None, activation="swiglu")):
        with pytest.raises(ValueError, match="swiglu has a gate"):
            Steps([wrong_gate])
    for first, last in ((0, 2), (-1, None), (1, None), (0, 0)):
        with pytest.raises(ValueError, match=r"there are 1"):
            Steps([part])(x, first, last)
    with pytest.raises(ValueError, match="no parts"):
        Steps([])


def test_what_is_not_packed_is_pytorchs() -> None:
    torch.manual_seed(7)
    x, plain = torch.randn(3, 16), norm(16, True)
    up, down = matrix(10, 16, torch.int8), matrix(16, 10, torch.int8)
    for part in (
        FeedForwardPart(Norm(torch.rand(32)[::2], None, 1e-5, True), None, up, down, "gelu"),
        FeedForwardPart(plain, None, replace(up, scale=up.scale.bfloat16()), down, "gelu"),  # type: ignore[union-attr]
        FeedForwardPart(plain, None, replace(up, bias=torch.randn(20)[::2]), down, "gelu"),
    ):
        assert torch.equal(Steps([part])(x), reference.step(x, part))


def test_parts_in_a_row_are_each_after_the_other() -> None:
    """All at once, in two calls, and with other values in the same memory."""
    torch.manual_seed(6)
    D = 24
    attending = self_attending((3, 4, 2, 16), torch.float32, 8, False)
    weights = [matrix(n, D) for n in (64, 32, 32)] + [matrix(D, 64)]
    reading = Attending(torch.randn(3, 9, 2, 16), torch.randn(3, 9, 2, 16), 0.2)
    parts: list[Part] = [SelfAttentionPart(norm(D, False), *weights, attending)]
    parts += [CrossAttentionPart(norm(D, True), matrix(64, D), matrix(D, 64), reading)]
    parts += [FeedForwardPart(norm(D, False), None, matrix(50, D), matrix(D, 50), "gelu")]
    steps = Steps(parts)
    for _ in range(3):
        x = torch.randn(3, D)
        apart = x
        for part in parts:
            apart = Steps([part])(apart)
        assert torch.equal(steps(steps(x, 0, 1), 1), apart)
        assert torch.equal(steps(x), apart)
        attending.starts.random_(4, S)  # type: ignore[union-attr]
        reading.keys.normal_()


class Layer(nn.Module):
    """A module that keeps its `Steps`, as a model that is not ours may."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 50), nn.Linear(50, 24)
        self.q, self.k, self.v, self.out = (nn.Linear(n, m) for n, m in ((24, 64), (24, 32), (24, 32), (64, 24)))
        self.norm = nn.LayerNorm(24)
        attending = self_attending((3, 4, 2, 16), torch.float32, 8, False)
        self.steps = Steps(self.parts(attending))

    def parts(self, attending: Attending) -> list[Part]:
        plain = Norm(self.norm.weight, self.norm.bias, 1e-5, False)
        weights = [Matrix(m.weight, m.bias) for m in (self.q, self.k, self.v, self.out, self.up, self.down)]
        return [SelfAttentionPart(plain, *weights[:4], attending), FeedForwardPart(plain, None, *weights[4:], "gelu")]

    def attending(self) -> Attending:
        part = self.steps.parts[0]
        assert isinstance(part, SelfAttentionPart)
        return part.attending


def replaced(layer: Layer) -> None:
    for parameter in layer.parameters():
        parameter.data = parameter.data * 2 + 1


def shared(layer: Layer) -> None:
    layer.share_memory()
    for tensor in vars(layer.attending()).values():
        if isinstance(tensor, Tensor):
            tensor.share_memory_()
    _ = [torch.full((50, 24), 9.0) for _ in range(50)]  # takes the memory that was given back


def optimized(layer: Layer) -> None:
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(layer.parameters(), 0.1).step()


def turned(layer: Layer) -> None:
    """The same memory, read in another order."""
    weight = layer.q.weight.data
    layer.q.weight.data = weight.as_strided((64, 24), (1, 64) if weight.is_contiguous() else (24, 1))


def given_another_cache(layer: Layer) -> None:
    layer.attending().keys.data = torch.randn(3, S, 2, 16)


CHANGES = [
    replaced,
    shared,
    optimized,
    turned,
    given_another_cache,
    lambda layer: layer.to(torch.bfloat16),
    lambda layer: layer.half().to(torch.bfloat16),
    lambda layer: layer.double(),
    lambda layer: layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()}),
]


@pytest.mark.parametrize("change", CHANGES, ids=range(len(CHANGES)))
@torch.no_grad()
def test_what_is_remembered_follows_the_weights(instruction_set: str, change: Callable[[Layer], object]) -> None:
    """Whatever gives weights or cache other memory, another type or other values, once and again."""
    torch.manual_seed(8)
    layer = Layer()
    for _ in range(2):
        x = torch.randn(3, 24)
        layer.steps(x)
        change(layer)
        x = x.to(layer.q.weight.dtype)
        found = layer.steps(x)
        assert torch.equal(found, Steps(layer.parts(layer.attending()))(x))
        narrow = layer.q.weight.dtype == torch.bfloat16
        exact = Steps([wide(part) for part in layer.parts(layer.attending())])(x.double())  # type: ignore[misc]
        torch.testing.assert_close(
            found.double(), exact, rtol=0, atol=float(exact.abs().max()) * (2e-2 if narrow else 1e-5)
        )


@torch.no_grad()
def test_copies_are_made_of_the_parts() -> None:
    torch.manual_seed(9)
    layer, x = Layer(), torch.randn(3, 24)
    expected = layer.steps(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin.steps(x), expected)
        replaced(twin)  # the copy's weights are its own, and its steps read them
        assert torch.equal(twin.steps(x), Steps(twin.parts(twin.attending()))(x))
        assert not torch.equal(twin.steps(x), expected)
        assert torch.equal(layer.steps(x), expected)


def test_a_gradient_is_refused_not_lost() -> None:
    torch.manual_seed(10)
    layer, x = Layer(), torch.randn(3, 24)
    with pytest.raises(RuntimeError, match="has no gradient\n.*\n.*torch.no_grad"):
        layer.steps(x)
    layer.requires_grad_(False)
    layer.steps(x)
    with pytest.raises(RuntimeError, match="has no gradient"):
        layer.steps(x.requires_grad_())
    with torch.no_grad():
        layer.steps(x)
    with pytest.raises(RuntimeError, match="dual number"):
        torch.func.jvp(layer.steps, (x.detach(),), (x.detach(),))
