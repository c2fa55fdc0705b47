"""Drafts: what they propose, and that the tokens with them are those without, bit for bit where C++ computes."""

from typing import Any

import pytest
import torch
from helpers import small_inputs, small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_engine.data.store import Store
from retro_engine.generate import drafts
from retro_engine.generate.drafts import KEY, MOST_ROWS, ROW, Drafts, worthwhile
from retro_engine.generate.engine import Engine
from retro_engine.generate.generator import Generator
from retro_engine.generate.request import Generation, Request
from retro_engine.generate.sampling import Sampling
from retro_engine.model.decode_cache import new_cache
from retro_engine.model.decoding import decode_one, prefill
from retro_engine.model.quantize import use_weights
from retro_engine.model.retro import RetroModel
from retro_engine.retrieval.search import Retriever

M = 16
SAMPLED = Sampling(greedy=False, temperature=1.5, seed=3)


def proposed(drafts: Drafts, tokens: list[int], most: int) -> list[int]:
    return [token for token, _ in drafts.propose(tokens, most)]


def test_what_followed_the_longest_run_is_proposed() -> None:
    assert proposed(Drafts(), [7, 1, 2, 3, 4, 8, 2, 3, 5, 7, 1, 2, 3], 2) == [4, 8]  # two agree at 8 2 3, four here
    drafts = Drafts()
    drafts.read([[1, 2, 3, 6], [1, 2, 3, 7]])
    assert proposed(drafts, [9, 1, 2, 3], 5) == [6]  # the best neighbor's word counts first
    drafts.read([[9, 1, 2, 3, 6, 8]])  # what one ends with goes on in another
    assert proposed(drafts, [9, 1, 2, 3, 6], 5) == [8]
    assert proposed(Drafts(), [1, 2, 3, 4, 1, 2, 3, 4, 1, 2], 7) == [3, 4, 1, 2, 3, 4, 1]  # what is repeated, on and on
    assert proposed(Drafts(), [1, 2, 3, 4], 7) == proposed(Drafts(), [1], 7) == []


def test_a_neighbors_end_is_gone_on_with_where_another_says_how() -> None:
    drafts = Drafts()
    drafts.read([[3, 4, 5, 6, 7], [1, 2, 3, 4, 5]])
    assert proposed(drafts, [9, 1, 2, 3], 9) == [4, 5, 6, 7]


def test_longer_runs_are_likelier_and_what_fails_is_trusted_less() -> None:
    text = [1, 2, 3] * 8
    chances = [chance for _, chance in Drafts().propose(text, 8)]
    assert 0.9 < chances[0] < 1
    assert sorted(chances, reverse=True) == chances
    assert Drafts().propose([1, 2, 9, 1, 2], 1)[0][1] < chances[0]
    drafts, tokens = Drafts(), [1, 2, 3]
    for number in range(30):  # two tokens are as before, what comes then never is
        tokens += [1, 2, 100 + number]
        for end in (len(tokens) - 2, len(tokens) - 1, len(tokens)):
            found = drafts.propose(tokens[:end], 8)
    assert not found
    assert not drafts.propose([*tokens, 1, 2], 8), "none while they fail"
    tokens += [1, 2] + [3, 4, 5, 6, 7, 8] * 5
    for end in range(len(tokens) - 24, len(tokens) + 1):
        found = drafts.propose(tokens[:end], 8)
    assert len(found) > 4, "and again where they hold"


@settings(max_examples=40)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 9))
def test_a_proposal_is_a_piece_of_what_was_there(tokens: list[int], most: int) -> None:
    found = proposed(Drafts(), tokens, most)
    assert len(found) <= most
    if found:
        piece = tokens[-KEY:] + found[:1]
        whole = tokens + found
        assert any(whole[i : i + len(piece)] == piece for i in range(len(tokens) - KEY))


def test_guesses_are_taken_that_are_worth_their_rows() -> None:
    assert worthwhile([[0.9, 0.8], [0.2]]) == [2, 0]
    assert worthwhile([[]]) == [0]
    assert worthwhile([[ROW]]) == [0], "it costs what it brings"
    assert worthwhile([[0.99**n for n in range(1, 40)]]) == [MOST_ROWS - 1]
    assert worthwhile([[0.3]]) == [1]
    assert worthwhile([[0.15]]) == [0], "a step with guesses has a price of its own"
    assert worthwhile([[0.3], *[[]] * 7]) == [0] * 8, "rows beside it bring more"
    assert sum(worthwhile([[0.99, 0.98]] * 10)) == MOST_ROWS - 10
    assert worthwhile([[0.9]] * 20) == [0] * 20


KINDS: dict[str, dict[str, Any]] = {
    "cross-attention": {},
    "in front": {"reading": "prefix", "sink_id": 3},
    "plain": {"retrieval": False},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", ["fp64", "fp32", "bf16", "int8"])
@torch.no_grad()
def test_a_guess_changes_no_bit(weights: str, kind: str) -> None:
    """Two rows with guesses against one step each, where a chunk ends too; what was guessed wrongly leaves nothing behind."""
    model = small_model(hidden_size=32, num_attention_heads=2, **KINDS[kind])
    if weights != "fp64":
        model = use_weights(model.float(), weights)
    tokens, neighbors = small_inputs(model, n=24)
    given = None if kind == "plain" else neighbors
    pairs = [new_cache(model, 3, 24, 2 * model.config.r) for _ in range(2)]
    for cache in pairs:
        prefill(model, cache.part(0, 1), tokens[:1, :15], None if given is None else given[:1, :3])
        prefill(model, cache.part(1, 2), tokens[1:, :13], None if given is None else given[1:, :3])
    ones, aheads = (cache.part(0, 2) for cache in pairs)
    newest = given[:1, 3] if given is not None else None
    ending = [] if given is None else [0]
    expected = [decode_one(model, ones, tokens[[0, 1], [15, 13]], newest, ending=ending)]
    found = decode_one(model, aheads, tokens[[0, 1], [15, 13]], newest, ending=ending, ahead=[[7, 8], [9]])
    assert torch.equal(aheads.lengths_B, ones.lengths_B)
    assert same(found[[0, 3]], expected[0], weights)
    for place in (16, 17):
        expected.append(decode_one(model, ones, tokens[[0, 1], [place, place - 2]]))
    right = [[int(tokens[0, 17])], [int(tokens[1, 15])]]
    found = decode_one(model, aheads, tokens[[0, 1], [16, 14]], ahead=right)
    assert same(found[0::2], expected[1], weights)
    assert same(found[1::2], expected[2], weights)


def same(one: torch.Tensor, two: torch.Tensor, weights: str) -> bool:
    return torch.allclose(one, two, atol=1e-12) if weights == "fp64" else torch.equal(one, two)


@torch.no_grad()
def test_guesses_beyond_the_cache_are_refused() -> None:
    model = small_model(retrieval=False)
    cache = new_cache(model, 1, 9)
    prefill(model, cache, torch.ones(1, 7, dtype=torch.long))
    with pytest.raises(ValueError, match="the cache holds 9 tokens; 10 were given"):
        decode_one(model, cache, torch.ones(1, dtype=torch.long), ahead=[[1, 1]])


@pytest.fixture(autouse=True)
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several sequences draft, too."""
    monkeypatch.setattr(drafts, "MOST_SEQUENCES", 16)


@pytest.fixture(scope="module")
def repeating(small_store: Store) -> RetroModel:
    """A model that repeats itself, so that drafts hold."""
    return small_model(vocab_size=small_store.vocab_size, chunk_size=M, encoder_seq_length=64, seed=8).float()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens that came of each draft."""
    counts: list[int] = []
    count = Drafts.count
    monkeypatch.setattr(Drafts, "count", lambda self, drafted, came: (counts.append(came), count(self, drafted, came)))
    return counts


def both(model: RetroModel, store: Store, requests: list[Request], **options: Any) -> list[Generation]:
    """With drafts; the same without."""
    found = []
    for is_drafting in (False, True):
        generator = Generator(model, store.tokenizer, Retriever([store]), drafts=is_drafting)
        found.append(generator.generate_all(requests, **options))
    assert found[0] == found[1]
    return found[1]


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("reading", ["retrieved", "given", "off"])
def test_the_tokens_are_those_without(
    repeating: RetroModel, small_store: Store, reading: str, sampling: Sampling, held: list[int]
) -> None:
    """Several sequences at once, across chunk boundaries, a stop string and the most tokens."""
    texts = {"retrieved": None, "given": ["river stone amber lantern river stone"], "off": []}[reading]
    prompts = ("river stone amber", "river stone amber river", "lantern")
    asked = [Request(prompt, 50 - 7 * n, sampling=sampling, neighbors=texts) for n, prompt in enumerate(prompts)]
    asked.append(Request("river stone amber river", 60, sampling=sampling, neighbors=texts, stop=("e",)))
    together = both(repeating, small_store, asked)
    assert sum(held) > 0 or not sampling.greedy, "drafts came, so that there was something to compare"
    assert both(repeating, small_store, asked, deterministic=True) == together
    assert [both(repeating, small_store, [request])[0] for request in asked] == together


@pytest.mark.parametrize("ends_with", ["end of document", "stop string", "most tokens"])
def test_an_end_inside_a_draft(
    repeating: RetroModel, small_store: Store, ends_with: str, held: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was guessed after it is not said, wherever in the draft the end is."""
    tokenizer = small_store.tokenizer
    prompt = "river stone amber lantern " * 3
    whole = both(repeating, small_store, [Request(prompt, 40)])[0]
    inside = [place for place in range(1, 38) if whole.tokens[place] not in whole.tokens[:place]] or [5]
    ends = 0
    for place in {inside[0], 9, 20, 33}:
        token = whole.tokens[place]
        held.clear()
        if ends_with == "end of document":
            if token in tokenizer.encode(prompt):
                continue
            with monkeypatch.context() as patch:
                patch.setattr(type(tokenizer), "end_ids", (token,))
                found = both(repeating, small_store, [Request(prompt, 40)])[0]
            assert found.tokens == whole.tokens[: whole.tokens.index(token)]
            assert found.finish_reason == "stop"
        elif ends_with == "stop string":
            stop = tokenizer.decode(whole.tokens[: place + 1])[-3:]
            found = both(repeating, small_store, [Request(prompt, 40, stop=(stop,))])[0]
            assert found.text == whole.text[: whole.text.index(stop)]
        else:
            found = both(repeating, small_store, [Request(prompt, place)])[0]
            assert found.tokens == whole.tokens[:place]
        ends += sum(held)
    assert ends


def test_drafts_of_several_in_an_engine(repeating: RetroModel, small_store: Store, held: list[int]) -> None:
    """They join, wait for their neighbors and leave at different steps; rows move while guesses are open."""
    asked = [
        Request("river stone amber lantern " * (1 + n % 3), 20 + 9 * n, neighbors=None if n % 2 else [])
        for n in range(5)
    ]
    alone = Generator(repeating, small_store.tokenizer, Retriever([small_store]), drafts=False)
    expected = [alone.generate_all([request])[0] for request in asked]
    generator = Generator(repeating, small_store.tokenizer, Retriever([small_store]))
    with Engine(generator, max_batch=4) as engine:
        found = [stream.result() for stream in [engine.submit(request) for request in asked]]
    assert found == expected
    assert sum(held) > 0
