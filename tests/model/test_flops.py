"""FLOPs of inference against counts by hand. (Those of a forward pass are counted by tests/train/test_plan.py.)"""

import pytest
import torch
from helpers import small_config
from torch.utils.flop_counter import FlopCounterMode

from retro_engine.config import preset_model
from retro_engine.model.flops import (
    attention_flops,
    encoding_flops,
    forward_flops,
    inference_flops,
    token_flops,
    training_flops,
)  # fmt: skip
from retro_engine.model.retro import RetroModel

# n = 32, m = 4, r = 8, d = 24, F = 32, 3 layers of which 2 cross, 2 encoder layers, V = 50; 16 neighbors of 8 tokens.
T, W = 32, 128
MATRICES = 3 * (8 * 24 * 24 + 2 * 3 * 24 * 32) + 2 * 24 * 50  # q, k, v, out; three of the FFN; the head
CAUSAL = 3 * 2 * 32 * 24


def test_cross_attention_by_hand() -> None:
    c = small_config(enc_cross_attention=[])
    plain = T * (MATRICES + CAUSAL)
    kept = plain + T * 2 * 4 * 24 * 24 + W * 2 * 4 * 4 * 24  # q and out of two layers; four queries meet each key
    encoding = W * (2 * (8 * 24 * 24 + 2 * 3 * 24 * 32 + 4 * 8 * 24) + 2 * 4 * 24 * 24)  # two layers; keys and values
    assert inference_flops(c, T, 0, kept=False) == inference_flops(c, T, 0, kept=True) == plain
    assert inference_flops(c, T, W, kept=True) == kept
    assert encoding_flops(c, T, W) == encoding
    assert inference_flops(c, T, W, kept=False) == forward_flops(c, T, W) == kept + encoding
    assert training_flops(c, T, W) == 3 * (kept + encoding)


def test_neighbors_in_front_by_hand() -> None:
    c = small_config(reading="prefix", sink_id=3)
    kept = T * (MATRICES + CAUSAL) + W * 3 * 4 * 4 * 24  # nothing but attention, in every layer
    encoding = W * 3 * (8 * 24 * 24 + 2 * 3 * 24 * 32 + 2 * 8 * 24)  # through the decoder, without its head
    assert inference_flops(c, T, W, kept=True) == kept
    assert encoding_flops(c, T, W) == encoding
    assert forward_flops(c, T, W) == kept + encoding
    assert attention_flops(c, T, W) == T * CAUSAL + W * 3 * (4 * 4 * 24 + 2 * 8 * 24)


def test_encoding_is_what_a_pass_of_neighbors_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products alone: how many of a core's are counted depends on the kernel."""
    monkeypatch.setenv("RETRO_BACKEND", "reference")
    tokens, lengths = torch.randint(0, 50, (16, 8)), torch.full((16,), 8)
    for overrides in (
        {"enc_cross_attention": []},
        {"reading": "prefix"},
        {"enc_cross_attention": [], "encoder_hidden_size": 36},
    ):
        c = small_config(**overrides)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            RetroModel(c).eval().encode_alone(tokens, lengths)
        counted = counter.get_flop_counts()["Global"]
        products = sum(count for op, count in counted.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
        cores = W * 3 * 2 * 8 * 24 if c.reads_prefix else W * 2 * 4 * 8 * c.encoder_width
        assert products == encoding_flops(c, T, W) - cores, overrides


def test_what_a_token_takes() -> None:
    """Preset small as docs/results.md trains it: with kept encodings little more than its plain decoder."""
    asked = {"vocab_size": 4096, "chunk_size": 32}
    small = token_flops(preset_model("small", **asked, enc_cross_attention=[]))
    plain = token_flops(preset_model("small", **asked, retrieval=False))
    assert plain.keys() == {"training", "inference", "plain"}
    assert plain["inference"] == plain["plain"] == small["plain"] == plain["training"] / 3
    assert small["kept"] <= 1.15 * plain["inference"] < 2 * plain["inference"] < small["inference"]
    assert "kept" not in token_flops(preset_model("small", **asked, enc_cross_attention=[0]))
