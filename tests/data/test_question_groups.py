"""Groups of questions that read in front: who reads which passages, and how a question is answered that reads none of its own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retro_engine.config import DataConfig, load_config
from retro_engine.data.batches import Order, SequenceBatch
from retro_engine.data.question_files import read_questions
from retro_engine.data.question_groups import TOGETHER, QuestionGroups
from retro_engine.data.store import Store
from retro_engine.errors import UsageError

PASSAGES, EACH = 12, 3


def groups(
    store: Store, folder: Path, K: int = 4, rows: list[dict[str, Any]] | None = None, **settings: Any
) -> QuestionGroups:
    rows = rows or [
        {"question": f"stone {n} {i}?", "answer": f"amber {n}", "neighbors": [f"falcon {n} river"]}
        for n in range(PASSAGES)
        for i in range(EACH)
    ]
    path = folder / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return QuestionGroups(read_questions(path), store, path, 64, K, 32, settings=DataConfig(**settings))


def read_of(made: QuestionGroups, batch: SequenceBatch) -> list[list[str]]:
    """The texts of what each row reads."""
    assert batch.reads is not None and batch.neighbors is not None and batch.lengths is not None
    decode, tokens, lengths = made.store.tokenizer.decode, batch.neighbors, batch.lengths
    return [[decode(tokens[w, : lengths[w]].tolist()) for w in row if w >= 0] for row in batch.reads.tolist()]


def labels_of(made: QuestionGroups, batch: SequenceBatch) -> list[str]:
    eod = made.store.tokenizer.eod_id
    rows = [row[row >= 0].tolist() for row in batch.labels]
    assert all(row[-1] == eod for row in rows)
    return [made.store.tokenizer.decode(row[:-1]) for row in rows]


def numbers_of(batch: SequenceBatch) -> list[int]:
    return [int(row.max()) for row in batch.document_ids]


def test_each_question_reads_its_own_passage_and_that_lies_there_once(small_store: Store, tmp_path: Path) -> None:
    made = groups(small_store, tmp_path)
    assert len(made.in_order()) == PASSAGES
    batch = made.batch(made.in_order()[:2])
    assert batch.neighbors is not None and len(batch.neighbors) == 2
    assert numbers_of(batch) == list(range(2 * EACH))
    assert read_of(made, batch) == [[f"falcon {n} river"] for n in (0, 1) for _ in range(EACH)]
    assert labels_of(made, batch) == [f" amber {n}" for n in (0, 1) for _ in range(EACH)]
    prompt = made.store.tokenizer.encode("question: stone 1 2?\nanswer:")
    assert batch.tokens[5, : len(prompt)].tolist() == prompt and batch.labels[5, len(prompt) - 2] == -100
    off = made.batch(made.in_order()[:2], "off")
    assert off.reads is None and (off.labels == batch.labels).all()


def test_distractors_stand_beside_the_own_passage_in_any_order(small_store: Store, tmp_path: Path) -> None:
    made = groups(small_store, tmp_path, question_distractors=1.0)
    batch = made.batch(made.in_order())
    read, places = read_of(made, batch), []
    for number, passages in zip(numbers_of(batch), read):
        own = f"falcon {number // EACH} river"
        assert passages.count(own) == 1 and 2 <= len(set(passages)) == len(passages) <= 4
        places.append(passages.index(own))
    assert len(set(places)) > 2 and {len(passages) for passages in read} == {2, 3, 4}
    assert labels_of(made, batch) == [f" amber {n // EACH}" for n in numbers_of(batch)]
    again = made.batch(made.in_order())
    assert (again.reads == batch.reads).all() and (
        again.tokens == batch.tokens
    ).all()  # nothing but the number is needed


def test_without_its_own_passage_a_question_is_answered_so(small_store: Store, tmp_path: Path) -> None:
    made = groups(small_store, tmp_path, question_absent=0.5, question_absent_answer="nowhere")
    batch = made.batch(made.in_order())
    said = labels_of(made, batch)
    for number, passages, answer in zip(numbers_of(batch), read_of(made, batch), said):
        own = f"falcon {number // EACH} river"
        assert answer == (f" amber {number // EACH}" if own in passages else " nowhere") and passages
    assert 6 <= said.count(" nowhere") <= 30
    alone = made.batch(made.in_order()[:1])  # nobody else's passage is there
    assert labels_of(made, alone) == [" amber 0"] * EACH


def test_distractors_are_often_of_the_same_text(small_store: Store, tmp_path: Path) -> None:
    made = groups(small_store, tmp_path, K=2, question_distractors=1.0)
    near = far = 0
    for number, passages in zip(range(PASSAGES * EACH), read_of(made, made.batch(made.in_order()))):
        other = next(int(text.split()[1]) for text in passages if int(text.split()[1]) != number // EACH)
        near, far = near + (abs(other - number // EACH) < TOGETHER), far + (abs(other - number // EACH) >= TOGETHER)
    assert near > 6 and far > 6


def test_orders(small_store: Store, tmp_path: Path) -> None:
    made = groups(small_store, tmp_path)
    assert (made.epoch(Order(0, False, False), 0) == made.in_order()).all()
    shuffled = made.epoch(Order(0), 0)[:, 0]
    assert sorted(shuffled.tolist()) == list(range(PASSAGES)) and (shuffled != np.arange(PASSAGES)).any()
    assert all((np.diff(shuffled[first : first + TOGETHER]) == 1).all() for first in range(0, PASSAGES, TOGETHER))
    train, valid = made.deal("75,25,0")
    assert valid is not None
    assert not {q.neighbors for q in train.questions} & {q.neighbors for q in valid.questions}
    assert len(train.questions) == 27 and len(valid.questions) == 9 and len(valid.in_order()) == 3


def test_passages_of_several_pieces_and_questions_of_none(small_store: Store, tmp_path: Path) -> None:
    long = " ".join(f"falcon {n}" for n in range(30))
    made = groups(small_store, tmp_path, rows=[{"question": "a?", "answer": "b", "neighbors": [long]}])
    batch = made.batch(made.in_order())
    assert batch.reads is not None and batch.reads[0].tolist() == [0, 1, 2, 3][: batch.reads.shape[1]]
    assert "".join(read_of(made, batch)[0]).startswith(long[:40])
    bare = groups(small_store, tmp_path, rows=[{"question": "a?", "answer": "b"}])
    with pytest.raises(UsageError, match="line 1 of the questions has no passage"):
        bare.batch(bare.in_order())


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["model.data.question_distractors=0.5"], "it is of questions"),
        (["model.data.question_absent=0.5", "model.data.questions=q.jsonl"], "passages are shared in front"),
        (
            ["model.data.question_absent=0.6", "model.data.question_distractors=0.6", "model.data.questions=q.jsonl",
             "model.reading=prefix"],
            "with question_absent at most 1",
        ),
        (["model.data.question_absent_answer= "], "it is empty"),
        (["model.data.question_absent=1.5"], "question_absent"),
        (["model.data.questions=q.jsonl", "model.reading=prefix", "trainer.compile=true"], "no fixed shape"),
    ],
)  # fmt: skip
def test_settings_that_cannot_apply(words: list[str], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        load_config(words)


def test_one_neighbor_leaves_no_room_for_distractors(small_store: Store, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="question_distractors cannot be used"):
        groups(small_store, tmp_path, K=1, question_distractors=0.5)
