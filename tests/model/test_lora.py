"""Adapters: nothing at first, learned beside frozen weights, and merged into them without a trace (float64)."""

import pytest
import torch
from helpers import small_inputs, small_model

from retro_engine.config import LoraConfig
from retro_engine.errors import StoreError
from retro_engine.model.decode_cache import new_cache
from retro_engine.model.decoding import step
from retro_engine.model.linear import Linear
from retro_engine.model.lora import add_adapters, is_adapter, merged
from retro_engine.model.quantize import use_weights
from retro_engine.model.retro import RetroModel

READS = [
    pytest.param({}, id="cross_attention"),
    pytest.param({"reading": "prefix", "sink_id": 3}, id="prefix"),
    pytest.param({"retrieval": False, "activation": "gelu", "bias": True, "num_query_groups": 1}, id="plain"),
]


def adapted(overrides: dict[str, object], is_moved: bool = True, **lora: object) -> tuple[RetroModel, LoraConfig]:
    """A model with adapters on every linear layer of the default names; `is_moved`: as if they had learned."""
    model, settings = small_model(**overrides), LoraConfig(**{"rank": 3, "alpha": 5.0} | lora)  # type: ignore[arg-type]
    add_adapters(model, settings, lambda name: False, seed=1)
    if is_moved:
        torch.manual_seed(2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if is_adapter(name):
                    parameter.normal_(std=0.2)
    return model, settings


def outputs(model: RetroModel) -> torch.Tensor:
    tokens, neighbors = small_inputs(model)
    return model(tokens, neighbors if model.config.retrieval else None)


@pytest.mark.parametrize("overrides", READS)
def test_at_first_the_base_to_the_last_bit(overrides: dict[str, object]) -> None:
    """With gradients, where matrices are stacked, and without."""
    base, (model, _) = small_model(**overrides), adapted(overrides, is_moved=False, dropout=0.5)
    model.train()
    for is_training in (True, False):
        with torch.set_grad_enabled(is_training):
            assert torch.equal(outputs(model), outputs(base))
    names = {name for name, _ in model.named_parameters()} - {name for name, _ in base.named_parameters()}
    assert names
    assert all(is_adapter(name) for name in names)


@pytest.mark.parametrize("overrides", READS)
def test_merged_weights_compute_the_same(overrides: dict[str, object]) -> None:
    model, lora = adapted(overrides)
    plain = RetroModel(model.config).double().eval()
    plain.load_state_dict(merged(model.state_dict(), lora, "it"))
    expected = outputs(model)
    assert (outputs(plain) - expected).abs().max() <= 1e-10
    assert (outputs(small_model(**overrides)) - expected).abs().max() > 1e-2
    with torch.no_grad():
        assert (outputs(model) - expected).abs().max() <= 1e-10, "without gradients"


@pytest.mark.parametrize("overrides", READS[:2])
def test_gradients_come_by_every_way(overrides: dict[str, object]) -> None:
    """Also through neighbors, of which prefix reading's run alone: against differences."""
    model, _ = adapted(overrides)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))
    loss = lambda: outputs(model).square().mean()  # noqa: E731
    loss().backward()  # type: ignore[no-untyped-call]
    torch.manual_seed(3)
    for kind in ("q.adapter.a", "k.adapter.b", "v.adapter.a", "out.adapter.b", "gate.adapter.b", "down.adapter.a"):
        parameter = dict(model.named_parameters())[f"layers.0.{'ffn' if kind[0] in 'gd' else 'attention'}.{kind}"]
        assert parameter.grad is not None
        along = torch.randn_like(parameter)
        with torch.no_grad():
            parameter.add_(1e-6 * along)
            above = loss()
            parameter.sub_(2e-6 * along)
            slope = (above - loss()) / 2e-6
            parameter.add_(1e-6 * along)
        assert float((parameter.grad * along).sum()) == pytest.approx(float(slope), rel=1e-5, abs=1e-8), kind
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if not is_adapter(name))


def test_targets_name_the_layers() -> None:
    """Of what does not learn: the decoder alone, where encoder and cross-attention do."""
    model = small_model()
    add_adapters(model, LoraConfig(rank=2, targets=["q", "up"]), lambda name: "cross" in name or "enc" in name, seed=0)
    found = {name for name, module in model.named_modules() if isinstance(module, Linear) and module.adapter}
    assert found == {f"layers.{i}.{part}" for i in range(3) for part in ("attention.q", "ffn.up")}
    model = small_model()
    add_adapters(model, LoraConfig(rank=2, targets=["k"]), lambda name: False, seed=0)
    found = {name for name, module in model.named_modules() if isinstance(module, Linear) and module.adapter}
    assert {"neighbor_projection.k.0", "encoder.layers.1.attention.k", "layers.2.attention.k"} <= found


def test_adapters_that_fit_nothing() -> None:
    model, lora = adapted({})
    state, key = model.state_dict(), "layers.0.attention.q.adapter"
    for change, why in (
        ({f"{key}.a": torch.zeros(2, 24)}, r"its adapter \(24, 3\) x \(2, 24\) of rank 3"),
        ({f"{key}.b": torch.zeros(3, 24)}, "of rank 3"),
        ({"layers.9.attention.q.adapter.a": torch.zeros(3, 24)}, "layers.9.attention.q is no linear layer"),
        ({"final_norm.adapter.a": torch.zeros(3, 24), "final_norm.adapter.b": torch.zeros(24, 3)}, "final_norm is"),
    ):
        with pytest.raises(StoreError, match=why):
            merged(state | change, lora, "it")
    with pytest.raises(StoreError, match="with both of its matrices"):
        merged({name: value for name, value in state.items() if name != f"{key}.b"}, lora, "it")


def test_adapters_are_never_passed_over() -> None:
    """What takes matrices alone takes none that has something beside it."""
    model, _ = adapted({})
    tokens, neighbors = small_inputs(model, 1, 8)
    cache = new_cache(model, 1, 9)
    with torch.no_grad():
        step(model, cache, tokens, neighbors)
        with pytest.raises(AssertionError, match="merged before a model decodes"):
            step(model, cache, tokens[:, :1])
    with pytest.raises(AssertionError, match="merged before weights are rounded"):
        use_weights(model, "int8")
