"""The facts measure: a model that reads its neighbors scores, one that cannot does not."""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from retro_engine.data.batches import MODES, Sequences
from retro_engine.data.neighbor_table import NeighborTable
from retro_engine.demo.facts import facts_data
from retro_engine.evaluate.facts import evaluate_facts
from retro_engine.progress import Reporter


class Reader(torch.nn.Module):
    """Says the right value token where a neighbor of its chunk states it (it is shown the labels), else 0."""

    def __init__(self, m: int, vocab_size: int):
        super().__init__()
        self.m, self.vocab_size = m, vocab_size
        self.embedding, self.device = torch.nn.Embedding(1, 1), torch.device("cpu")

    def forward(self, tokens, neighbors, lengths, documents, labels, reads, is_each):
        logits = self.logits(tokens, neighbors)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
        return losses.view_as(labels), logits.argmax(-1)

    def logits(self, tokens, neighbors):
        logits = torch.zeros(*tokens.shape, self.vocab_size)
        if neighbors is None:
            return logits
        for b in range(tokens.shape[0]):
            for t in range(self.m - 1, tokens.shape[1] - 1):
                label = tokens[b, t + 1]
                seen = neighbors[b, (t + 1) // self.m - 1]
                if bool((seen == label).any()):
                    logits[b, t, label] = 9.0
        return logits


def test_a_perfect_reader(tmp_path: Path) -> None:
    data = facts_data(tmp_path, 400, 24, 1, Reporter("quiet"))
    table = NeighborTable(data.heldout.folder / "neighbors" / "bm25", data.heldout)
    sequences = Sequences(data.heldout, np.arange(24), 128, table, 2, 64)
    results = evaluate_facts(Reader(32, data.heldout.vocab_size), sequences, data.heldout_path)  # type: ignore[arg-type]
    assert set(results) == set(MODES)
    assert results["on"].value_accuracy > 0.9, "the notes state the values"
    assert results["off"].value_accuracy < 0.05
    assert results["random"].value_accuracy < 0.7
    assert results["one_right"].value_accuracy > 0.9, "values that the right note does not state are left out"
    assert 0 < results["one_right"].tokens.sum() < results["on"].tokens.sum()
    assert 4 < results["on"].values.sum() / 24 <= 6
    summary = results["on"].summary()
    assert summary["value_accuracy_interval"][0] <= summary["value_accuracy"] <= summary["value_accuracy_interval"][1]
    assert summary["entities"] == 24


@pytest.mark.parametrize("seed", [1, 2])
def test_the_generator(seed: int) -> None:
    """Values stand where the spans say; notes state six facts, each once; held-out values are new."""
    from retro_engine.data.builtin import FACTS_PER_DOCUMENT, make_entities

    entities, again = make_entities(50, seed), make_entities(50, seed)
    assert entities == again
    assert make_entities(50, seed + 10) != entities
    for entity in entities:
        stated = [entity.document[start:end] for start, end in entity.spans]
        assert len(stated) == FACTS_PER_DOCUMENT
        assert set(stated) <= set(entity.values.values())
        for value in stated:
            assert sum(value in note for note in entity.notes) >= 1
        assert all(entity.name in note for note in entity.notes)
    assert len({entity.name for entity in entities}) == 50


def test_sentences_of_any_words_are_no_unseen_wordings() -> None:
    """Both sides of a fact are told freely, or none; what is held out is told in the wordings alone, in as much room."""
    from retro_engine.data import builtin

    def words(texts: Iterable[str]) -> set[str]:
        return set(re.findall("[a-z]+", " ".join(texts).lower()))

    def known(wordings: dict[str, tuple[tuple[str, ...], tuple[str, ...]]]) -> set[str]:
        return words(text for both in wordings.values() for side in both for text in side)

    unseen = known(builtin._UNSEEN_WORDINGS) | words(builtin._UNSEEN_OPENINGS)
    assert not unseen & set(builtin._FREE_WORDS)
    allowed = known(builtin._WORDINGS) | words(builtin._OPENINGS)
    names = {word for e in builtin.make_entities(40, 3) for word in words([e.name, *e.values.values()])}
    assert words(e.document for e in builtin.make_entities(40, 3)) <= allowed | names
    free = builtin.make_entities(400, 3, free_share=0.5)
    told_freely = []
    for entity in free:
        for begin, end in entity.spans:
            value = entity.document[begin:end]
            sentence = next(s for s in entity.document.split(".") if value in s)
            note = next(s for n in entity.notes for s in n.split(".") if value in s)
            is_free = [bool(words([s]) & set(builtin._FREE_WORDS) - allowed) for s in (sentence, note)]
            told_freely.append(is_free[0] or is_free[1])
    assert 0.4 < np.mean(told_freely) < 0.55
    length = [
        np.mean([len(e.document) for e in builtin.make_entities(200, 5, is_unseen)]) for is_unseen in (False, True)
    ]
    assert 0.7 < length[1] / length[0] < 0.85  # of characters; their words take more tokens, which were never seen
