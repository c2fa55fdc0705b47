"""Does a small model read the passages that it is given? A shipped reader, or one of yours, on SQuAD's questions.

Takes `--text FILE`: questions with their contexts that no training saw (SQuAD's dev-v1.1.json, or rows like its), and
`--run READER`, a reader's name or folder (default: the package's own). QUESTIONS of them (1,000), spread evenly, are answered
from their own passage, from it among the best of BM25 over all passages of the file, from those alone (in front, and in the
prompt of the same weights: attention among the passages too, and nothing of them kept), from another article's passage, and
from nothing. Then the time to the first token with kept passages, in turns with the same passages in the prompt. `--parts`
names some of these cases.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from retro_engine.bench.frame import Measured, Options, Row, Target, at_least, at_most, time_in_turns
from retro_engine.data.prepare import prepare
from retro_engine.data.question_files import Question, read_questions
from retro_engine.data.questions import Questions
from retro_engine.data.store import Store
from retro_engine.errors import UsageError, nearest
from retro_engine.evaluate.questions import Answers, answer_questions
from retro_engine.generate.open_model import OpenedModel
from retro_engine.model.decoding import decode
from retro_engine.model.encodings import Encodings
from retro_engine.readers.reader import base_path, open_reader
from retro_engine.readers.reader_file import Reader, find_reader
from retro_engine.train.run_data import question_search

QUESTIONS = int(os.environ.get("QUESTIONS", 1000))
KEPT_BYTES = 2 << 30
BATCH = 16
CASES = {  # name: what is read, passages at most
    "own passage": ("gold", 4),
    "one right of 4": ("among", 4),
    "one right of 8": ("among", 8),
    "best 4": ("retrieved", 4),
    "best 4 in the prompt": ("prompt", 4),
    "wrong passage": ("random", 4),
    "nothing": ("off", 1),
}
FIRST_TOKEN = "first token"
TIMED = 8  # questions


@dataclass
class Bench:
    """A reader, opened, and the questions that it is asked."""

    reader: Reader
    opened: OpenedModel
    rows: list[Question]
    store: Store
    path: str

    def questions(self, K: int) -> Questions:
        r = self.reader.reading.retrieved_length
        search = question_search([self.store], "bm25", r)
        return Questions(self.rows, self.store, self.path, 1 << 20, K, r, "data", search)


def run(options: Options) -> Measured:
    if options.text is None:
        why = "it asks questions about passages that no training saw"
        raise UsageError("reader has no questions", why, "--text dev-v1.1.json (SQuAD's)")
    parts = options.parts or [*CASES, FIRST_TOKEN]
    if wrong := [name for name in parts if name not in (*CASES, FIRST_TOKEN)]:
        known = [*CASES, FIRST_TOKEN]
        raise UsageError(f"{wrong[0]} is not of bench reader", nearest(wrong[0], known), ", ".join(known))
    reader = find_reader(options.run)
    opened = open_reader(reader, base_path(reader))
    rows = [replace(row, documents=()) for row in read_questions(options.text, reader.template, print)]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(reader, opened, rows, _store_of(rows, opened, reader, Path(folder)), options.text)
        return _measure(bench, parts)


def _store_of(rows: Sequence[Question], opened: OpenedModel, reader: Reader, folder: Path) -> Store:
    """All passages of the questions, as documents."""
    texts = list(dict.fromkeys(text for row in rows for text in row.neighbors))
    if not texts:
        raise UsageError("the questions have no passages", "each is asked about its context", "SQuAD's dev-v1.1.json")
    documents = folder / "passages.jsonl"
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "tokenizer.json").write_text(opened.tokenizer.json)
    return prepare([documents], folder / "store", str(folder / "tokenizer.json"), chunk_size=reader.reading.chunk_size)


def _measure(bench: Bench, parts: Sequence[str]) -> Measured:
    encodings = Encodings(bench.opened.model, KEPT_BYTES)
    answers: dict[str, Answers] = {}
    rows = []
    for name, (mode, K) in CASES.items():
        if name not in parts:
            continue
        start = time.perf_counter()
        found = answer_questions(
            bench.opened.model,
            bench.questions(K),
            mode,
            max_new_tokens=bench.reader.max_new_tokens,
            batch_size=BATCH,
            limit=QUESTIONS,
            absent=bench.reader.absent,
            encode=encodings.of,
        )
        answers[name] = found
        seconds = (time.perf_counter() - start) / len(found.texts)
        note = f"exact match {100 * found.exact.mean():.1f}, F1 {100 * found.f1.mean():.1f}, absent {100 * (found.absent or 0):.1f} %"
        rows.append(Row(case=name, implementation="reader", median_s=seconds, low_s=seconds, high_s=seconds, note=note))
        print(f"{name}: {note}")
    facts = {name: found.summary() for name, found in answers.items()}
    if {"nothing", "own passage"} <= answers.keys():
        right = answers["nothing"].exact > 0
        facts["right without reading, destroyed by reading"] = {
            "questions": int(right.sum()), "wrong then": int((answers["own passage"].exact[right] == 0).sum())
        }  # fmt: skip
    timed, share = _first_token(bench, encodings) if FIRST_TOKEN in parts else ([], None)
    return Measured(rows + timed, _targets(answers, share), facts)


def _targets(answers: dict[str, Answers], share: float | None) -> list[Target]:
    """None of what was not asked for."""

    def exact(name: str) -> float | None:
        return 100 * float(answers[name].exact.mean()) if name in answers else None

    def more(name: str, other: str) -> float | None:
        one, two = exact(name), exact(other)
        return None if one is None or two is None else one - two

    def absent(name: str) -> float | None:
        return answers[name].absent if name in answers else None

    own = answers.get("own passage")
    return [
        at_least("exact match, own passage", exact("own passage"), 50),
        at_least("F1, own passage", None if own is None else 100 * float(own.f1.mean()), 62),
        at_least("exact match of the best 4, above the same in the prompt", more("best 4", "best 4 in the prompt"), -3),
        at_most("exact match lost, one right of eight", more("own passage", "one right of 8"), 10),
        at_least("said to be absent, wrong passage", absent("wrong passage"), 0.8),
        at_most("said to be absent, own passage", absent("own passage"), 0.1),
        at_most("time to the first token with kept passages, against in the prompt", share, 0.2),
    ]


def _first_token(bench: Bench, encodings: Encodings) -> tuple[list[Row], float]:
    """Seconds from question to first token: four kept passages in front, and in the prompt of the same weights."""
    questions, model, tokenizer = bench.questions(4), bench.opened.model, bench.opened.tokenizer
    numbers = list(range(0, len(questions.questions), -(-len(questions.questions) // TIMED)))
    tokens, lengths = (torch.from_numpy(part) for part in questions.neighbors(numbers, "among"))

    def kept() -> None:
        for row, number in enumerate(numbers):
            given = tokens[row : row + 1], lengths[row : row + 1]
            decode(model, [questions.prompts[number]], *given, 1, [], tokenizer.pad_id, encode=encodings.of)

    def in_prompt() -> None:
        for row, number in enumerate(numbers):
            read = [t for of, n in zip(tokens[row].tolist(), lengths[row].tolist()) for t in of[:n]]
            decode(model, [[*read, *questions.prompts[number]]], None, None, 1, [], tokenizer.pad_id)

    works: dict[str, Callable[[], None]] = {"kept passages": kept, "in the prompt": in_prompt}
    found = {
        name: tuple(value / len(numbers) for value in spread) for name, spread in time_in_turns(works, rounds=5).items()
    }
    rows = [
        Row(case="time to the first token, 4 passages", implementation=name, median_s=m, low_s=low, high_s=high)
        for name, (m, low, high) in found.items()
    ]
    return rows, found["kept passages"][0] / found["in the prompt"][0]
