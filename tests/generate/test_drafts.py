"""Drafts: what they propose, and that the tokens with them are those without, bit for bit where C++ computes."""

from typing import Any

import pytest
import torch
from helpers import small_model
from hypothesis import given
from hypothesis import strategies as st

from retro_engine.data.store import Store
from retro_engine.generate.drafts import KEY, LONGEST, Drafts
from retro_engine.generate.generator import Generator
from retro_engine.generate.request import Request
from retro_engine.generate.sampling import Sampling
from retro_engine.model.decode_cache import new_cache
from retro_engine.model.decoding import decode_ahead, decode_one, prefill
from retro_engine.model.quantize import use_weights
from retro_engine.retrieval.search import Retriever

M = 16


def test_what_followed_before_is_proposed() -> None:
    drafts = Drafts()
    assert drafts.propose([1, 2, 3, 4, 5, 1, 2, 3], 3) == [4, 5, 1]
    drafts.read([[9, 1, 2, 3, 8], [1, 2, 3, 7]])  # the best neighbor's word counts before another's, and the text's
    assert drafts.propose([1, 2, 3, 4, 5, 1, 2, 3], 3) == [8]
    drafts.read([])
    assert drafts.propose([1, 2, 3, 4, 5, 1, 2, 3], 6) == [4, 5, 1, 2, 3, 4]  # what is repeated, on and on
    assert drafts.propose([1, 2, 3, 4, 5, 1, 2, 3, 6], 9) == []


def test_what_fails_is_tried_less() -> None:
    drafts, text = Drafts(), [1, 2, 3] * 20
    assert len(drafts.propose(text, 50)) == LONGEST
    drafts.note(LONGEST, 3)
    assert len(drafts.propose(text, 50)) == 3
    for _ in range(3):
        drafts.note(1, 0)
    waits = 0
    while not drafts.propose(text, 50):
        waits += 1
    assert waits == 8
    drafts.note(1, 1)
    assert len(drafts.propose(text, 50)) == 2
    assert (drafts.drafted, drafts.accepted) == (LONGEST + 4, 4)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 9))
def test_a_proposal_is_a_piece_of_what_was_there(tokens: list[int], most: int) -> None:
    found = Drafts().propose(tokens, most)
    assert len(found) <= min(most, LONGEST)
    if found:
        key = tokens[-KEY:]
        whole = tokens + found
        assert any(whole[i : i + KEY + len(found)] == key + found for i in range(len(tokens) - KEY))


@pytest.mark.parametrize("kind", ["cross-attention", "in front", "plain"])
@pytest.mark.parametrize("weights", ["fp64", "fp32", "bf16", "int8"])
@torch.no_grad()
def test_a_guess_changes_no_bit(weights: str, kind: str) -> None:
    """Logits after tokens that are read ahead, against one step each; what was guessed wrongly leaves nothing behind."""
    kinds: dict[str, dict[str, Any]] = {"in front": {"reading": "prefix", "sink_id": 3}, "plain": {"retrieval": False}}
    model = small_model(hidden_size=32, num_attention_heads=2, **kinds.get(kind, {}))
    if weights != "fp64":
        model = model.float()
        use_weights(model, weights)
    tokens = torch.randint(4, 50, (1, 24), generator=torch.Generator().manual_seed(1))
    neighbors = None if kind == "plain" else torch.randint(4, 50, (1, 4, 2, model.config.r))
    caches = [new_cache(model, 2, 24, 2 * model.config.r) for _ in range(2)]
    for cache in caches:
        prefill(model, cache.part(0, 1), tokens[:, :16], neighbors)
    ones = [decode_one(model, caches[0].part(0, 1), tokens[:, place])[0] for place in range(16, 19)]
    ahead = decode_ahead(model, caches[1], 0, [int(tokens[0, 16]), 7, 8])
    assert same(ahead[0], ones[0], weights)
    assert int(caches[1].lengths_B[0] - caches[1].origin) == 17
    again = decode_ahead(model, caches[1], 0, tokens[0, 17:19].tolist())
    assert all(same(one, two, weights) for one, two in zip(again, ones[1:]))


def same(one: torch.Tensor, two: torch.Tensor, weights: str) -> bool:
    return torch.allclose(one, two, atol=1e-12) if weights == "fp64" else torch.equal(one, two)


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(greedy=False, temperature=1.5, seed=3)], ids=["greedy", "sampled"]
)
@pytest.mark.parametrize("reading", ["retrieved", "given", "off"])
def test_the_tokens_are_those_without(
    small_store: Store, reading: str, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Across chunk boundaries, a stop string and the end of the document; the small model repeats itself, so drafts hold."""
    model = small_model(vocab_size=small_store.vocab_size, chunk_size=M, encoder_seq_length=64, seed=8).float()
    texts = {"retrieved": None, "given": ["river stone amber lantern river stone"], "off": []}[reading]
    asked = [Request("river stone amber", 60, sampling=sampling, neighbors=texts)]
    asked.append(Request("river stone amber river", 60, sampling=sampling, neighbors=texts, stop=("e",)))
    held: list[int] = []
    note = Drafts.note
    monkeypatch.setattr(Drafts, "note", lambda self, drafted, came: (held.append(came), note(self, drafted, came)))
    for request in asked:
        both = []
        for drafts in (False, True):
            generator = Generator(model, small_store.tokenizer, Retriever([small_store]), drafts=drafts)
            sequence = generator.open(request)
            both.append(generator.generate_all([request])[0])
            assert (sequence.drafts is not None) == drafts
        assert both[0] == both[1]
    assert sum(held) > 0 or not sampling.greedy, "drafts came, so that there was something to compare"
