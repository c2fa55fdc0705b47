"""Question files: every field that lacks is named with its line; batches put the loss on the answer and neighbors at its start."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retro_engine.data.batches import Order
from retro_engine.data.questions import Question, Questions, read_questions
from retro_engine.data.store import Store
from retro_engine.errors import StoreError, UsageError


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


@pytest.fixture(scope="module")
def questions(small_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Questions:
    rows = [
        {
            "question": f"river stone {n}?",
            "answers": [f"amber {n}", "tide"],
            "documents": [f"d{n}"],
            "neighbors": [f"falcon {n}"],
        }
        for n in range(10)
    ]
    path = write(tmp_path_factory.mktemp("q") / "q.jsonl", *rows)

    def search(texts: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.zeros((len(texts), k, 32), np.int64)
        for row, text in enumerate(texts):
            ids = small_store.tokenizer.encode(f"found for {text}")[:32]
            tokens[row, 0, : len(ids)] = ids
        return tokens, (tokens > 0).sum(-1)

    return Questions(read_questions(path), small_store, path, 64, 2, 32, "data", search)


def test_the_loss_is_on_the_answer_and_neighbors_begin_at_the_prompts_end(
    questions: Questions, small_store: Store
) -> None:
    tokenizer = small_store.tokenizer
    batch = questions.batch(questions.in_order()[:3])
    for row in range(3):
        prompt = tokenizer.encode(f"question: river stone {row}?\nanswer:")
        answer = [*tokenizer.encode(f" amber {row}"), tokenizer.eod_id]
        start = -(-len(prompt) // 16) * 16
        labels = np.flatnonzero(batch.labels[row] >= 0)
        assert labels.tolist() == list(range(start - 1, start - 1 + len(answer)))
        assert batch.labels[row][labels].tolist() == answer
        assert batch.tokens[row, start - len(prompt) : start].tolist() == prompt
        assert batch.tokens[row, start : start + len(answer) - 1].tolist() == answer[:-1]
        is_token = np.flatnonzero(batch.document_ids[row] == row)
        assert is_token.tolist() == list(range(start - len(prompt), start + len(answer) - 1))
        assert batch.lengths is not None
        assert (batch.lengths[row, : start // 16 - 1] == 0).all(), "chunks before the prompt's last have none"
        assert (batch.lengths[row, start // 16 - 1 :, 0] > 0).all()
    off = questions.batch(questions.in_order()[:3], "off")
    assert off.neighbors is None
    assert np.array_equal(off.labels, batch.labels)


def test_which_neighbors_are_read(questions: Questions, small_store: Store) -> None:
    decode = small_store.tokenizer.decode

    def texts(source: str, mode: str, number: int = 1) -> list[str]:
        questions.source = source
        tokens, lengths = questions.neighbors([number], mode)
        return [decode(tokens[0, k, : lengths[0, k]]) for k in range(2) if lengths[0, k]]

    own = texts("data", "on")
    assert own[0] == "falcon 1"
    assert own[1].startswith("Document doc1.")
    assert texts("retrieval", "gold") == own
    assert texts("retrieval", "on") == ["found for river stone 1?"] == texts("data", "retrieved")
    assert texts("both", "on") == own, "the row's come first, and there is room for two"
    assert texts("data", "random") == texts("data", "on", 6)
    questions.source = "data"


def test_the_own_passages_among_retrieved_ones(questions: Questions, small_store: Store) -> None:
    """Always there, at any place, the same for the same question; a copy of it that was found counts once."""
    decode, places = small_store.tokenizer.decode, []
    for number in range(10):
        tokens, lengths = questions.neighbors([number], "among")
        read = [decode(tokens[0, k, : lengths[0, k]].tolist()) for k in range(2) if lengths[0, k]]
        assert read.count(f"falcon {number}") == 1
        places.append(read.index(f"falcon {number}"))
        again, _ = questions.neighbors([number], "among")
        assert (again == tokens).all()
    assert set(places) == {0, 1}


def test_epochs_shares_and_left_out(questions: Questions, small_store: Store) -> None:
    seen = [questions.training_batch(step, 4, Order(7)).document_ids.max(1).tolist() for step in range(5)]
    flat = [number for batch in seen for number in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    with pytest.raises(StopIteration):
        questions.training_batch(2, 4, Order(7, is_cyclic=False))
    train, valid = questions.deal("80,20,0")
    assert valid is not None
    assert (train.num_documents, valid.num_documents) == (8, 2)
    assert not {q.id for q in train.questions} & {q.id for q in valid.questions}
    long = Question("y", "river " * 60, "", ("x",), (), (), 2)
    mixed = Questions([questions.questions[0], long], small_store, "q", 64, 2, 32)
    assert (mixed.num_left_out, mixed.num_documents) == (1, 1)
    with pytest.raises(StoreError, match="every question of q is longer"):
        Questions([long], small_store, "q", 64, 2, 32)


def test_what_cannot_be_used(small_store: Store) -> None:
    row = Question("1", "a", "a", ("x",), (), ("nobody",), 7)
    with pytest.raises(StoreError, match="q.jsonl:7 names document nobody"):
        Questions([row], small_store, "q.jsonl", 64, 2, 32)
    plain = Question("1", "a", "a", ("x",), (), (), 7)
    for source, message in (("retrieval", "nothing to retrieve from"), ("neither", "is not known")):
        with pytest.raises(UsageError, match=message):
            Questions([plain], small_store, "q", 64, 2, 32, source)
    with pytest.raises(UsageError, match="nothing to retrieve from"):
        Questions([plain], small_store, "q", 64, 2, 32).neighbors([0], "retrieved")
