"""Neighbors in front of a decoder's own keys, against prompts that hold them as text (float64)."""

import dataclasses
from typing import Any

import pytest
import torch
from helpers import small_config

from retro_engine.errors import UsageError
from retro_engine.model.decode_cache import new_cache
from retro_engine.model.decoding import step
from retro_engine.model.prefix import order_in_front, segments
from retro_engine.model.retro import RetroModel

M, R = 4, 7


def decoder(**overrides):  # type: ignore[no-untyped-def]
    settings = {"reading": "prefix", "sink_id": 3, "retrieved_length": R, "num_neighbors": 2} | overrides
    config = small_config(**settings)
    torch.manual_seed(0)
    return RetroModel(config).double().eval()


def inputs(model: RetroModel, batch: int, n: int, K: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, model.config.vocab_size, (batch, n), generator=random)
    neighbors = torch.randint(4, model.config.vocab_size, (batch, n // M, K, R), generator=random)
    lengths = torch.randint(0, R + 1, (batch, n // M, K), generator=random)
    return tokens, neighbors, lengths


def plain(model: RetroModel, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens)


WINDOW = {"max_position_embeddings": R + 6, "encoder_seq_length": 5}  # what a sliding window is bounded to


@pytest.mark.parametrize("sink_id", [None, 3])
@pytest.mark.parametrize(
    "positions",
    [
        {},
        {"position_embedding": "learned", "max_position_embeddings": 64},
        {"position_embedding": "none"},
        WINDOW,
        {"rotary_factors": [1.0, 2.5, 8.0, 8.0]},
        {"rotary_percentage": 0.5, "rotary_interleaved": True},
    ],
    ids=str,
)
def test_one_neighbor_is_the_prompt_with_it(positions: dict[str, Any], sink_id: int | None) -> None:
    """The tokens that read one whole neighbor, given from the text's first token on, get what the prompt gives."""
    sinks = 0 if sink_id is None else 1
    model = decoder(sink_id=sink_id, chunk_size=1, num_neighbors=1, **positions)
    tokens, neighbors, _ = inputs(model, 2, 5, K=1)
    neighbors = neighbors[:, :1].repeat(1, 5, 1, 1)  # the same one at every token
    got = model(tokens, neighbors)
    prompt = torch.cat((torch.full((2, sinks), 3), neighbors[:, 0, 0], tokens), 1)
    assert torch.allclose(got, model(prompt)[:, sinks + R :], atol=1e-12)


@pytest.mark.parametrize(
    "overrides", [{}, {"sink_id": None}, {"position_embedding": "learned"}, {"num_query_groups": 1}]
)
@torch.no_grad()
def test_cached_equals_the_full_pass(overrides) -> None:  # type: ignore[no-untyped-def]
    """Blocks of several sizes, then token by token: neighbors are exchanged where chunks end, the text's keys stay."""
    model = decoder(max_position_embeddings=64, **overrides)
    tokens, neighbors, lengths = inputs(model, 2, 30)
    exact = model(tokens, neighbors, lengths)
    cache = new_cache(model, 2, 30, 2 * R, None)
    at, got = 0, []
    for size in (3, 6, 1, 9, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1):
        chunks = slice(at // M, (at + size) // M)
        given = (neighbors[:, chunks], lengths[:, chunks]) if chunks.stop > chunks.start else (None, None)
        got.append(step(model, cache, tokens[:, at : at + size], *given))
        at += size
    assert torch.allclose(torch.cat(got, 1), exact, atol=1e-5)  # tables of angles are float32


@torch.no_grad()
def test_padding_on_the_left_changes_nothing() -> None:
    """In the full pass, and in a cache whose rows have different padding."""
    model = decoder()
    tokens, neighbors, lengths = inputs(model, 1, 24)
    exact = model(tokens, neighbors, lengths)
    pad = 8  # whole chunks, so that the others stay what they are
    padded = torch.cat((torch.zeros(1, pad, dtype=torch.long), tokens), 1)
    documents = torch.cat((torch.full((1, pad), -1), torch.zeros(1, 24, dtype=torch.long)), 1)
    more = (torch.cat((part[:, :2], part), 1) for part in (neighbors, lengths))
    assert torch.allclose(model(padded, *more, documents)[:, pad:], exact, atol=1e-12)
    cache = new_cache(model, 2, 40, 2 * R)
    both = torch.cat((padded, torch.cat((tokens, tokens[:, :pad]), 1)))
    given = tuple(
        torch.cat((torch.cat((part[:, :2], part), 1), torch.cat((part, part[:, :2]), 1)))
        for part in (neighbors, lengths)
    )
    got = step(model, cache, both, *given, is_token_BT=torch.cat((documents >= 0, torch.ones(1, 32, dtype=torch.bool))))
    assert torch.allclose(got[:1, pad:], exact, atol=1e-12)
    assert torch.allclose(got[1:, :24], exact, atol=1e-12)


@torch.no_grad()
def test_off_is_the_plain_decoder() -> None:
    model = decoder()
    tokens, _, _ = inputs(model, 1, 24)
    other = RetroModel(dataclasses.replace(model.config, retrieval=False)).double().eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(tokens), other(tokens))
    cache = new_cache(model, 1, 24, 0)
    assert torch.equal(step(model, cache, tokens), step(other, new_cache(other, 1, 24, 0), tokens))


def test_gradients_flow_through_what_is_read() -> None:
    model = decoder().train()
    tokens, neighbors, lengths = inputs(model, 2, 16)
    model(tokens, neighbors, lengths).sum().backward()
    read = set(neighbors[lengths > 0].flatten().tolist()) - set(tokens.flatten().tolist())
    gradient = model.embedding.weight.grad
    assert gradient is not None
    assert read
    assert all(gradient[token].abs().sum() > 0 for token in read)


def test_what_cannot_apply_is_refused() -> None:
    with pytest.raises(UsageError, match="reading=prefix"):
        decoder().set_recompute("full")
    with pytest.raises(UsageError, match="partial_chunk"):
        decoder(partial_chunk="first")
    with pytest.raises(UsageError, match="sink_id"):
        decoder(sink_id=1000)
    model = decoder(max_position_embeddings=20, position_embedding="learned")
    tokens, neighbors, lengths = inputs(model, 1, 8)
    with pytest.raises(UsageError, match="20 positions"):
        model(tokens, neighbors, lengths)
    model = decoder(**WINDOW, num_neighbors=1)  # another neighbor than it has positions for
    assert model(tokens[:, :5], neighbors[:, :1, :1]).shape[1] == 5
    with pytest.raises(UsageError, match="13 positions"):
        model(tokens[:, :5], neighbors[:, :1])


def test_runs_of_tokens_that_read_the_same() -> None:
    assert list(segments(10, 4)) == [(-1, 0, 3), (0, 3, 7), (1, 7, 10)]
    assert list(segments(3, 4, 6)) == [(0, 0, 1), (1, 1, 3)]
    order, used = order_in_front(torch.tensor([[2, 1], [0, 3]]), 3, 1)
    assert used.tolist() == [4, 4]
    assert order[:, -4:].tolist() == [[0, 4, 1, 2], [0, 4, 5, 6]]


@torch.no_grad()
def test_texts_side_by_side_are_those_texts_alone() -> None:
    model = decoder()
    tokens, neighbors, lengths = inputs(model, 2, 12)
    exact = model(tokens, neighbors, lengths)
    documents = torch.tensor([[0] * 12 + [1] * 12])
    got = model(tokens.view(1, 24), neighbors.flatten(0, 1)[None], lengths.flatten(0, 1)[None], documents)
    assert torch.allclose(got.view(2, 12, -1), exact, atol=1e-12)
