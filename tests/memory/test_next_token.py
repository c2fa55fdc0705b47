"""The next token beside a memory: the probabilities are those that evaluation gives each token."""

from pathlib import Path

import numpy as np
import pytest
import torch

from retro_engine.data.store import Store
from retro_engine.memory import next_token
from retro_engine.memory.mixture import SHAPE, Mixture
from retro_engine.memory.next_token import MemoryBeside
from retro_engine.memory.ngram_memory import build_ngram_memory, document_tokens
from retro_engine.memory.suffix_order import LONGEST


def test_probabilities_are_those_of_evaluation(
    small_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = int(small_store.documents[:, 1].sum())
    memory = build_ngram_memory(small_store, tmp_path / "ngram", size // 2)
    rng = np.random.default_rng(0)
    mixture = Mixture(rng.random(SHAPE))
    beside = MemoryBeside(memory, mixture)
    text = next(document_tokens(small_store, 7, 8))[:30]
    text[9] = text[20]  # what never stood there
    logits = torch.randn(len(text), small_store.vocab_size + 3, generator=torch.Generator().manual_seed(0))
    p = logits.double().softmax(-1).numpy()
    before = np.array([p[place, text[place + 1]] for place in range(len(text) - 1)])
    expected = mixture.probabilities(before, memory.guesses(text))
    for place in range(len(text) - 1):
        found = beside(logits[place], text[: place + 1].tolist()).double().exp()
        assert abs(float(found.sum()) - 1) < 1e-5
        monkeypatch.setattr(next_token, "LEAST_WEIGHT", 0)
        exact = beside(logits[place], text[: place + 1].tolist()).double().exp()
        monkeypatch.undo()
        np.testing.assert_allclose(float(exact[text[place + 1]]), expected[place], rtol=1e-4)
        assert float((found - exact).abs().sum()) < 0.02  # what says next to nothing is passed over
    direct = beside(logits[3], text[:4].tolist())
    monkeypatch.setattr(next_token, "FEW", 0)  # what came after every suffix is kept: the same
    for _ in range(2):
        np.testing.assert_allclose(beside(logits[3], text[:4].tolist()), direct, rtol=1e-4)
    monkeypatch.setattr(next_token, "SEEN", 8)
    few = MemoryBeside(memory, mixture)(logits[3], text[:4].tolist()).double().exp()
    assert abs(float(few.sum()) - 1) < 1e-5  # also of places that are a sample
    long = [5] * 40 + text.tolist()
    of_last = beside(logits[0], long[-LONGEST:])
    torch.testing.assert_close(of_last, beside(logits[0], long), rtol=0, atol=0)


def test_a_memory_without_some_documents_is_refused(small_store: Store, tmp_path: Path) -> None:
    """What came after a suffix is counted in all documents."""
    memory = build_ngram_memory(small_store, tmp_path / "ngram").without(small_store.contents[:2])[0]
    with pytest.raises(ValueError, match="left out"):
        MemoryBeside(memory, Mixture.even(0.3))
