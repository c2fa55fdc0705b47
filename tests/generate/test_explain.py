"""Explanation: what each neighbor changed, against generation's own steps; what cannot be explained is refused."""

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import small_config, small_model

from retro_engine.data.store import Store
from retro_engine.errors import UsageError
from retro_engine.generate.explain import explain, explain_cost, removed_lengths, text_log_probs
from retro_engine.generate.generator import Generator
from retro_engine.generate.request import Request
from retro_engine.generate.sampling import Sampling
from retro_engine.model.decoding import prefill
from retro_engine.model.retro import RetroModel
from retro_engine.retrieval.search import Retriever

PROMPT, TEXT = "river stone amber lantern orchard", " copper thistle meadow falcon river stone"
GIVEN = ["river stone copper", "falcon ember", "tide"]


@pytest.fixture(scope="module")
def generator(small_store: Store) -> Generator:
    model = small_model(vocab_size=small_store.vocab_size, chunk_size=16, encoder_seq_length=64, seed=3)
    return Generator(model, small_store.tokenizer, Retriever([small_store]))


def stepped(generator: Generator, neighbors: list[str]) -> np.ndarray:
    """The text's log-probabilities from generation's own steps."""
    ids = iter(generator.tokenizer.encode(TEXT))
    request = Request(
        PROMPT, len(generator.tokenizer.encode(TEXT)), sampling=Sampling(), neighbors=neighbors, logprobs=0
    )
    with mock.patch("retro_engine.generate.sequence.choose", side_effect=ids):
        (generation,) = generator.generate_all([request])
    assert generation.logprobs is not None
    return np.array([each.logprob for each in generation.logprobs])


def test_log_probabilities_are_those_of_generation(generator: Generator) -> None:
    found = explain(generator, PROMPT, TEXT, GIVEN)
    assert found.log_probs_T == pytest.approx(stepped(generator, GIVEN), abs=1e-9)
    assert found.off_T == pytest.approx(stepped(generator, []), abs=1e-5)  # not padded: fp32 rotary tables elsewhere
    for number in range(3):
        rest = [text for place, text in enumerate(GIVEN) if place != number]
        assert found.without_KT[number] == pytest.approx(stepped(generator, rest), abs=1e-9)
        assert abs(found.token_changes[number]).max() > 1e-4
    assert found.changes == pytest.approx((found.log_probs_T - found.without_KT).sum(1))
    assert "".join(found.pieces) == TEXT


def test_retrieved_neighbors_are_those_of_generation(generator: Generator) -> None:
    found = explain(generator, PROMPT, TEXT)
    assert found.neighbors == generator.generate(PROMPT, 1).neighbors
    assert found.log_probs_T.shape == (len(generator.tokenizer.encode(TEXT)),)
    assert len(explain(generator, PROMPT, TEXT, num_neighbors=1).neighbors) == 1


def test_one_neighbor_and_an_empty_one(generator: Generator) -> None:
    found = explain(generator, PROMPT, TEXT, ["river", ""])
    assert found.without_KT[0] == pytest.approx(found.off_T, abs=1e-12)
    assert np.all(found.token_changes[1] == 0)
    summary = found.summary()
    assert summary["neighbors"][0]["change"] == pytest.approx(summary["log_prob"] - summary["log_prob_off"])
    assert [token["text"] for token in summary["tokens"]] == found.pieces


def test_what_cannot_be_explained(generator: Generator, small_store: Store) -> None:
    for prompt, text, neighbors, message in (
        ("", TEXT, GIVEN, "the prompt is empty"),
        (PROMPT, "", GIVEN, "the text is empty"),
        (PROMPT, TEXT, [], "there are no neighbors"),
    ):
        with pytest.raises(UsageError, match=message):
            explain(generator, prompt, text, neighbors)
    plain = RetroModel(small_config(vocab_size=small_store.vocab_size, retrieval=False))
    with pytest.raises(UsageError, match="plain decoder"):
        explain(Generator(plain, small_store.tokenizer), PROMPT, TEXT, GIVEN)
    with pytest.raises(UsageError, match="there are no neighbors"):
        explain(Generator(generator.model, small_store.tokenizer), PROMPT, TEXT)
    learned = small_config(
        vocab_size=small_store.vocab_size, chunk_size=16, encoder_seq_length=32, position_embedding="learned"
    )
    with pytest.raises(UsageError, match="32 positions"):
        explain(Generator(RetroModel(learned).to(torch.float64), small_store.tokenizer), PROMPT, TEXT * 4, GIVEN)


def test_pieces_change_nothing(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts and prompts of several pieces, and neighbors that fill a piece alone: as in one."""
    prompt, text = "amber river lantern " * 23, TEXT * 5
    whole = explain(generator, prompt, text, GIVEN)
    monkeypatch.setattr("retro_engine.generate.explain.PIECE_CHUNKS", 1)
    monkeypatch.setattr("retro_engine.generate.explain.POSITIONS", 3)
    pieces = explain(generator, prompt, text, GIVEN)
    np.testing.assert_allclose(pieces.without_KT, whole.without_KT, atol=1e-9)
    np.testing.assert_allclose(pieces.off_T, whole.off_T, atol=1e-9)


@pytest.mark.parametrize("chunk_size", [4, 8])
@pytest.mark.parametrize("pieces", [1, 4])
@torch.no_grad()
def test_log_probabilities_are_those_of_the_full_pass(
    chunk_size: int, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding of every length, texts that end in and at a chunk, neighbors of every length."""
    monkeypatch.setattr("retro_engine.generate.explain.PIECE_CHUNKS", pieces)
    model = small_model(chunk_size=chunk_size, encoder_seq_length=64)
    numbers, R, M = np.random.default_rng(chunk_size), model.config.r, chunk_size
    for length, text_length, K in (
        (1, 1, 1),
        (M, M, 2),
        (M + 1, 3 * M + 1, 3),
        (2 * M - 1, M - 1, 2),
        (5 * M - 2, 2, 1),
    ):
        prompt, text = numbers.integers(2, 50, length).tolist(), numbers.integers(2, 50, text_length).tolist()
        tokens_KR, lengths_K = numbers.integers(2, 50, (K, R)), numbers.integers(1, R + 1, K)
        rows = text_log_probs(model, prompt, text, tokens_KR, lengths_VK=removed_lengths(lengths_K), pad_id=1)
        pad = -length % M
        first = pad + length
        ids = torch.tensor([[1] * pad + prompt + text])
        documents = torch.where(torch.arange(ids.shape[1]) < pad, -1, 0)[None]
        chunks = ids.shape[1] // M
        for row, kept_K in zip(rows, removed_lengths(lengths_K), strict=True):
            lengths = torch.from_numpy(kept_K).expand(1, chunks, K).clone()
            lengths[:, : first // M - 1] = 0
            logits = model(ids, torch.from_numpy(tokens_KR).expand(1, chunks, K, R), lengths, documents)[0]
            exact = logits[first - 1 : -1].log_softmax(-1)[range(text_length), text]
            np.testing.assert_allclose(row, exact.numpy(), atol=1e-12)


def test_memory_is_that_of_a_piece(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor has an entry for every position, entry of the vocabulary and removed neighbor."""
    largest = 0

    def seen_prefill(
        model: RetroModel, cache: Any, tokens: torch.Tensor, neighbors: torch.Tensor | None = None, *rest: Any
    ) -> torch.Tensor:
        nonlocal largest
        logits = prefill(model, cache, tokens, neighbors, *rest)
        largest = max(largest, logits.numel(), 0 if neighbors is None else neighbors.numel())
        return logits

    monkeypatch.setattr("retro_engine.generate.explain.prefill", seen_prefill)
    monkeypatch.setattr(RetroModel, "hidden", lambda *_: pytest.fail("the full pass keeps every position"))
    found = explain(generator, PROMPT, TEXT * 14, ["river stone"] * 4)
    size, M = generator.model.config.vocab_size, generator.model.config.chunk_size
    assert found.without_KT.shape[1] > 4 * M
    assert 0 < largest <= 4 * M * size


def test_it_ends_when_nobody_waits(generator: Generator) -> None:
    class Left(Exception):
        pass

    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Left

    with pytest.raises(Left):
        explain(generator, PROMPT, TEXT * 20, GIVEN, check=check)
    assert calls == 3


def test_the_cost_is_known_before(generator: Generator) -> None:
    config = generator.model.config
    assert explain_cost(config, 100, 16, 0) == 100 + 2 * 32
    assert explain_cost(config, 100, 16, 2) == 100 + 4 * (32 + 2 * 2 * config.r)
