"""Rows of different lengths, step by step, against each sequence alone in the full pass (float64)."""

from typing import Any

import pytest
import torch
from helpers import small_inputs, small_model

from retro_engine.model.retro import RetroModel
from retro_engine.model.rows import Rows, new_rows, prefill, step_rows

M = 4
STARTS = (3, 9, 4, 1)  # tokens of the prompts
VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_query_groups": 1, "activation": "gelu"},
    {"cca_bias_everywhere": True, "bias": True, "output_bias": True},
    {"position_embedding": "learned", "cca_position_embedding": "none"},
    {"encoder_hidden_size": 36, "encoder_num_attention_heads": 2, "share_embeddings": False},
    {"mup": True, "mup_base_hidden_size": 12, "mup_base_ffn_hidden_size": 16},
]


def filled(model: RetroModel, tokens: torch.Tensor, neighbors: torch.Tensor, lengths: torch.Tensor) -> Rows:
    rows = new_rows(model, len(STARTS) + 1, 32, 2 * model.config.r)
    for row, start in enumerate(STARTS):
        rows.clear(row, 0)
        logits = prefill(
            model, rows, row, tokens[row, :start], neighbors[row, : start // M], lengths[row, : start // M]
        )
        assert logits.shape == (1, model.config.vocab_size)
    return rows


@pytest.mark.parametrize("overrides", VARIANTS, ids=lambda value: "-".join(value) or "default")
@torch.no_grad()
def test_rows_equal_the_full_pass(overrides: dict[str, Any]) -> None:
    """18 steps; the rows end their chunks at different ones, some neighbors are short or missing; one row moves."""
    model = small_model(**overrides)
    tokens, neighbors = small_inputs(model, batch=4, n=28)
    lengths = torch.randint(0, model.config.r + 1, neighbors.shape[:3], generator=torch.Generator().manual_seed(5))
    exact = model(tokens, neighbors, lengths)
    rows = filled(model, tokens, neighbors, lengths)
    order, worst = [0, 1, 2, 3], 0.0
    for step in range(18):
        if step == 7:  # the first sequence leaves, the last takes its row
            rows.move(3, 0)
            order = [3, 1, 2]
        part = rows.part(0, len(order))
        places = [int(length) for length in part.lengths_B]
        newest = torch.stack([tokens[s, place] for s, place in zip(order, places)])
        ending = [row for row, place in enumerate(places) if place % M == M - 1]
        chunks = [(order[row], places[row] // M) for row in ending]
        found = torch.stack([neighbors[chunk] for chunk in chunks]) if ending else None
        valid = torch.stack([lengths[chunk] for chunk in chunks]) if ending else None
        logits = step_rows(model, part, newest, ending, found, valid)
        for row, (sequence, place) in enumerate(zip(order, places)):
            worst = max(worst, float((logits[row] - exact[sequence, place]).abs().max()))
    assert worst <= 1e-9, worst


@torch.no_grad()
def test_a_row_that_waits_is_as_if_it_had_not_been_there() -> None:
    model = small_model()
    tokens, neighbors = small_inputs(model, batch=4, n=28)
    lengths = torch.full(neighbors.shape[:3], model.config.r)
    rows, twin = (filled(model, tokens, neighbors, lengths) for _ in range(2))
    newest = torch.stack([tokens[s, start] for s, start in enumerate(STARTS)])
    part = rows.part(0, 4)
    for _ in range(3):  # row 0 ends a chunk and waits for its neighbors
        before = part.lengths_B.clone()
        step_rows(model, part, newest, [], advances=torch.tensor([False, False, False, False]))
        assert torch.equal(part.lengths_B, before)
    found = step_rows(model, part, newest, [0], neighbors[:1, 0], lengths[:1, 0])
    expected = step_rows(model, twin.part(0, 4), newest, [0], neighbors[:1, 0], lengths[:1, 0])
    assert torch.equal(found, expected)


@torch.no_grad()
def test_padding_on_the_left_is_not_read() -> None:
    """Rows with different padding equal the full pass over padded sequences."""
    model = small_model()
    tokens, neighbors = small_inputs(model, batch=2, n=20)
    pads = (3, 1)
    documents = torch.zeros_like(tokens)
    for row, pad in enumerate(pads):
        documents[row, :pad] = -1
    lengths = torch.full(neighbors.shape[:3], model.config.r)
    exact = model(tokens, neighbors, lengths, documents)
    rows = new_rows(model, 2, 20, 2 * model.config.r)
    for row, pad in enumerate(pads):
        rows.clear(row, pad)
        for piece in (slice(0, 4), slice(4, 8)):  # a prompt in two pieces
            at = piece.start // M
            prefill(model, rows, row, tokens[row, piece], neighbors[row, at : at + 1], lengths[row, at : at + 1])
    for place in range(8, 20):
        ending = [0, 1] if place % M == M - 1 else []
        logits = step_rows(model, rows, tokens[:, place], ending, neighbors[:, place // M] if ending else None)
        assert (logits - exact[:, place]).abs().max() <= 1e-9


@torch.no_grad()
def test_what_does_not_fit() -> None:
    model = small_model()
    rows = new_rows(model, 1, 2, model.config.r)
    step_rows(model, rows, torch.tensor([1]), [])
    step_rows(model, rows, torch.tensor([1]), [])
    with pytest.raises(ValueError, match="the cache holds 2 tokens"):
        step_rows(model, rows, torch.tensor([1]), [])
    rows = new_rows(model, 1, 8, model.config.r)
    with pytest.raises(ValueError, match="16 neighbor tokens; the cache holds 8"):
        prefill(model, rows, 0, torch.ones(4, dtype=torch.long), torch.ones(1, 2, 8, dtype=torch.long))
