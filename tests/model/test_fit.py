"""Fitted cross-attention: nothing changes at step 0, a token finds itself in a neighbor, and what follows can be read."""

from typing import Any

import pytest
import torch
from torch import Tensor

from retro_engine.config import ModelConfig
from retro_engine.model.fit import fit_cross_attention, unmet
from retro_engine.model.retro import RetroModel

VOCABULARY = 200
DECODERS = {
    "grouped queries, RMSNorm, no biases": {"num_attention_heads": 6, "num_query_groups": 2},
    "as many keys as queries, LayerNorm, biases": {
        "num_attention_heads": 6, "normalization": "layernorm", "bias": True, "activation": "gelu", "position_embedding": "learned",
    },
    "more heads in the encoder": {"num_attention_heads": 4, "encoder_num_attention_heads": 6, "hidden_size": 144},
    "half of a head is rotated, two encoder layers": {"num_attention_heads": 3, "rotary_percentage": 0.5, "enc_num_layers": 2},
}  # fmt: skip


def config(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY, "encoder_seq_length": 64, "chunk_size": 16, "hidden_size": 144, "ffn_hidden_size": 96,
        "dec_num_layers": 3, "dec_cross_attention": [1, 2], "enc_num_layers": 1, "enc_cross_attention": [0],
        "hidden_dropout": 0.0, "attention_dropout": 0.0, "cca_position_embedding": "none", "init_method_std": 0.1,
    }  # fmt: skip
    return ModelConfig(**(values | changes))


def fitted(**changes: Any) -> RetroModel:
    """A decoder of random weights, whose embeddings have a common part as trained ones do, with the circuit."""
    torch.manual_seed(0)
    model = RetroModel(config(**changes)).eval()
    with torch.no_grad():
        model.embedding.weight.add_(0.15 * torch.randn(144))
        for layer in model.layers:
            if layer.is_crossing:
                layer.cross.out.weight.zero_()
    fit_cross_attention(model, [text(seed) for seed in range(8)])
    return model


def text(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (4, 64), generator=generator)
    return tokens, torch.zeros_like(tokens)


@pytest.mark.parametrize("name", DECODERS)
def test_step_zero_is_the_decoder(name: str) -> None:
    model = fitted(**DECODERS[name])
    tokens, _ = text(100)
    with torch.no_grad():
        assert torch.equal(model(tokens, tokens.reshape(4, 2, 1, 32).repeat(1, 2, 1, 1)), model(tokens))


@pytest.mark.parametrize("name", DECODERS)
def test_a_token_finds_itself_and_what_follows(name: str) -> None:
    """On text that the fit has not seen, most attention is at the same token; the value there says which comes next."""
    model = fitted(**DECODERS[name])
    c, cross = model.config, model.layers[1].cross
    tokens, documents = text(100)
    states: list[Tensor] = []
    handle = model.layers[1].ffn_norm.register_forward_pre_hook(
        lambda _, inputs: states.append(model.layers[1].cross_norm(inputs[0]))
    )
    with torch.no_grad():
        model.hidden(tokens, None, None, documents)
        handle.remove()
        q = cross.queries(states[0])[:, 32:63].flatten(0, 1)  # [t, h, e] of the last halves
        neighbors = tokens[:, 32:].reshape(4, 1, 1, 32)
        hidden = torch.zeros(4, 1, c.chunk_size, c.hidden_size)
        pairs = model.encode_neighbors(hidden, None, neighbors, None)
        keys, values = (part.reshape(-1, *part.shape[-2:]) for part in pairs[0])  # [128, g, e]
    owner = torch.arange(128).reshape(4, 32)[:, :31].flatten()
    is_same = tokens[:, 32:].flatten()[None, :] == tokens[:, 32:63].flatten()[:, None]
    weights = torch.softmax(q[:, 0] @ keys[:, 0].T * cross.scale, -1)
    inner = (owner % 32) > 0  # a neighbor's first token has no predecessor
    mass = (weights * is_same).sum(-1)[inner].mean()
    assert mass > 0.5 > 20 * is_same.float().mean(), f"{mass:.2f}"
    following = tokens[:, 32:].flatten()[owner + 1]  # of the token that is matched
    codes = values[owner, 0]  # the code of what follows: alike where the next tokens are
    alike = torch.nn.functional.cosine_similarity(codes[:, None], codes[None], dim=-1)
    same_next = following[:, None] == following[None]
    itself = torch.eye(len(owner), dtype=torch.bool)
    assert alike[same_next & ~itself].mean() > alike[~same_next].mean() + 0.5


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"encoder_hidden_size": 96}, "as wide"),
        ({"num_attention_heads": 2}, "three heads"),
        ({"num_attention_heads": 2, "num_query_groups": 1}, "three heads"),
        ({"num_attention_heads": 2, "encoder_num_attention_heads": 6}, "as wide as a decoder's"),
        ({"encoder_position_embedding": "none"}, "RoPE"),
        ({"rotary_interleaved": True}, "RoPE"),
        ({"num_attention_heads": 12, "rotary_percentage": 0.5}, "12 rotary"),
        ({"cca_position_embedding": "rope"}, "wherever"),
        ({"encoder_seq_length": 16}, "as long as"),
    ],
)
def test_conditions_are_named(changes: dict[str, Any], rule: str) -> None:
    broken = unmet(config(**({"num_attention_heads": 6} | changes)))
    assert broken is not None and rule in broken
    assert unmet(config(num_attention_heads=6)) is None
