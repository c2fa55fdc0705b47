"""Weights of a byte or two: close to fp32 in outputs and in perplexity."""

import pytest
import torch
import torch.nn.functional as F
from helpers import small_config, small_inputs

from retro_engine.errors import UsageError
from retro_engine.model.decode_cache import new_cache
from retro_engine.model.decoding import step
from retro_engine.model.quantize import use_weights
from retro_engine.model.retro import RetroModel


def trained() -> RetroModel:
    """A model that has learned a pattern: perplexity far below the vocabulary's 50."""
    torch.manual_seed(0)
    model = RetroModel(small_config(hidden_size=48, ffn_hidden_size=96, num_attention_heads=3))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for number in range(120):
        loss = loss_of(model, number)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def loss_of(model: RetroModel, seed: int, batch: int = 8) -> torch.Tensor:
    """Sequences that count up by a step of 1, 2 or 3 with noise."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 4, (batch, 1), generator=generator)
    tokens = (torch.randint(0, 50, (batch, 1), generator=generator) + steps * torch.arange(32)) % 50
    noise = torch.rand(tokens.shape, generator=generator) < 0.1
    tokens = torch.where(noise, torch.randint(0, 50, tokens.shape, generator=generator), tokens)
    _, neighbors = small_inputs(model, batch, 32, seed=seed)
    logits = model(tokens, neighbors)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def test_perplexity() -> None:
    """int8 and bf16 change the perplexity of held-out sequences by less than 1 %, int4 by less than 4 %."""
    model = trained()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        exact = loss_of(model, 10_000, 64).exp()
        assert exact < 15
        assert RetroModel(model.config).num_parameters == sum(p.numel() for p in model.parameters())
        for weights, most in (("int8", 0.01), ("bf16", 0.01), ("int4", 0.04)):
            other = RetroModel(model.config).eval()
            other.load_state_dict(state)
            found = loss_of(use_weights(other, weights), 10_000, 64).exp()
            assert abs(found / exact - 1) < most, f"{weights}: {found:.3f} against {exact:.3f}"
            assert found != exact


@pytest.mark.parametrize(("weights", "error"), [("int8", 0.05), ("int4", 0.3)])
def test_every_matrix_is_quantised_and_decodes(weights: str, error: float) -> None:
    for overrides in ({}, {"share_embeddings": False, "output_bias": True, "bias": True}):
        model = RetroModel(small_config(**overrides), torch.Generator().manual_seed(0)).eval()
        with torch.no_grad():
            tokens, neighbors = small_inputs(model, 1, 9)
            exact = model(tokens, neighbors)[:, -1]
            use_weights(model, weights)
            assert not any(isinstance(module, torch.nn.Linear) for module in model.modules())
            full = model(tokens, neighbors)[:, -1]
            cache = new_cache(model, 1, 9)
            step(model, cache, tokens[:, :8], neighbors)
            found = step(model, cache, tokens[:, 8:])[:, -1]
        assert (found - exact).norm() / exact.norm() < error
        assert (found - full).norm() / exact.norm() < 0.02  # the cache is bf16
        is_shared = weights == "int4" and not overrides
        assert is_shared == (model.head.weight.data_ptr() == model.embedding.weight.data_ptr())  # type: ignore[union-attr]
        assert model.num_parameters == RetroModel(model.config).num_parameters
    with pytest.raises(UsageError, match="dtype='fp8' does not exist"):
        use_weights(model, "fp8")
