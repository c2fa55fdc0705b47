"""Does a small model read the passages that it is given? A shipped reader, or one of yours, on SQuAD's questions.

Takes `--text FILE`: questions with their contexts that no training saw (SQuAD's dev-v1.1.json, or rows like its), and
`--run READER`, a reader's name or folder (default: the package's own). QUESTIONS of them (1,000), spread evenly, are answered
from their own passage, from it among the best of BM25 over all passages of the file, from those alone (in front, and in the
prompt of the same weights: attention among the passages too, and nothing of them kept), from another article's passage, and
from nothing. Then the time to the first token with kept passages, in turns with the same passages in the prompt; and `retro ask`
over PAGES pages (1,000, of 3,000 characters) of the installed Python's documentation and of generated people, its command as a process of its own.
`--parts` names some of these cases; `--parts facts` trains the facts demo instead (minutes) and asks it in unseen wordings.
"""

import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import facts_seeds
import torch

from retro_engine.bench.frame import Measured, Options, Row, Spread, Target, at_least, at_most, time_in_turns
from retro_engine.data.builtin import make_entities, python_docs
from retro_engine.data.prepare import prepare
from retro_engine.data.question_files import Question, read_questions
from retro_engine.data.questions import Questions
from retro_engine.data.store import Store
from retro_engine.demo.facts import CHUNK_SIZE, STEPS
from retro_engine.errors import UsageError, nearest
from retro_engine.evaluate.questions import Answers, answer_questions
from retro_engine.generate.open_model import OpenedModel
from retro_engine.model.decoding import decode
from retro_engine.model.encodings import Encodings
from retro_engine.readers.bases import base_path
from retro_engine.readers.reader import open_reader
from retro_engine.readers.reader_file import Reader, find_reader
from retro_engine.train.run_data import question_search

QUESTIONS = int(os.environ.get("QUESTIONS", 1000))
KEPT_BYTES = 2 << 30
BATCH = 16
CASES = {  # name: what is read, passages at most, and whether one of them is chosen, as `retro ask` does
    "own passage": ("gold", 4, False),
    "one right of 4": ("among", 4, True),
    "one right of 8": ("among", 8, True),
    "one right of 8, together": ("among", 8, False),
    "best 4": ("retrieved", 4, True),
    "best 4 in the prompt": ("prompt", 4, False),
    "wrong passage": ("random", 4, False),
    "nothing": ("off", 1, False),
}
FIRST_TOKEN, ASK, FACTS = "first token", "ask", "facts"
PARTS = (*CASES, FIRST_TOKEN, ASK)  # FACTS is asked for by name
PAGES, PAGE = int(os.environ.get("PAGES", 1000)), 3000  # characters
ASKED = (
    "What does a generator return?",
    "Which function joins paths?",
    "How is a thread started?",
    "What is the default encoding of a file?",
    "Who was the first emperor of Rome?",
)
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
        return Questions(
            self.rows,
            self.store,
            path=self.path,
            sequence_length=1 << 20,
            num_neighbors=K,
            retrieved_length=r,
            source="data",
            search=search,
        )


def run(options: Options) -> Measured:
    if options.parts is not None and tuple(options.parts) == (FACTS,):
        return _facts()
    if options.text is None:
        why = "it asks questions about passages that no training saw"
        raise UsageError("reader has no questions", why, "--text dev-v1.1.json (SQuAD's)")
    parts = options.parts or PARTS
    if wrong := [name for name in parts if name not in PARTS]:
        known = (*PARTS, f"{FACTS} (alone)")
        raise UsageError(f"{wrong[0]} is not of bench reader", nearest(wrong[0], list(PARTS)), ", ".join(known))
    reader = find_reader(options.run)
    opened = open_reader(reader, base_path(reader))
    rows = [replace(row, documents=()) for row in read_questions(options.text, reader.template, print)]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(reader, opened, rows, _store_of(rows, opened, reader, Path(folder)), options.text)
        return _measure(bench, parts)


def _facts() -> Measured:
    """The demo's model, trained anew, in its own wordings and in such as no training text has."""
    found = facts_seeds.run("retrieval_ready", 0, CHUNK_SIZE, STEPS)
    row = Row(case="facts demo, training", implementation="reader", median_s=found["trained_s"], low_s=found["trained_s"], high_s=found["trained_s"])  # fmt: skip
    targets = [
        at_least("value tokens right, unseen wordings", found["value_accuracy_unseen_on"], 0.8),
        at_least("value tokens right, trained wordings", found["value_accuracy_on"], 0.97),
    ]
    return Measured([row], targets, found)


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
    for name, (mode, K, is_alone) in CASES.items():
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
            is_alone=is_alone,
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
    del encodings
    asked, targets = _ask(bench.reader) if ASK in parts else ([], [])
    return Measured(rows + timed + asked, _targets(answers, share) + targets, facts)


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
            decode(
                model,
                [[*read, *questions.prompts[number]]],
                neighbors_BKR=None,
                lengths_BK=None,
                max_new_tokens=1,
                stop_ids=[],
                pad_id=tokenizer.pad_id,
            )

    works: dict[str, Callable[[], None]] = {"kept passages": kept, "in the prompt": in_prompt}
    found = {
        name: tuple(value / len(numbers) for value in spread) for name, spread in time_in_turns(works, rounds=5).items()
    }
    rows = [
        Row(case="time to the first token, 4 passages", implementation=name, median_s=m, low_s=low, high_s=high)
        for name, (m, low, high) in found.items()
    ]
    return rows, found["kept passages"][0] / found["in the prompt"][0]


def _ask(reader: Reader) -> tuple[list[Row], list[Target]]:
    """Seconds of the first answer over many pages, of a later command, and of a later question to one that stays open."""
    with tempfile.TemporaryDirectory() as folder:
        pages = _write_pages(Path(folder) / "pages")
        home = {**os.environ, "RETRO_HOME": str(Path(folder) / "home")}
        bases = Path(home["RETRO_HOME"]) / "bases"  # as `retro fetch` would have put it
        bases.mkdir(parents=True)
        (bases / reader.base.file).symlink_to(base_path(reader))
        flags = ["--reader", str(reader.folder), "--json", "--quiet"]
        command = [sys.executable, "-m", "retro_engine.cli", "ask", str(pages), *flags]
        times = []
        for question in ASKED:
            start = time.perf_counter()
            subprocess.run([*command, question], check=True, env=home, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - start)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        questions = "\n".join(ASKED) + "\n"
        found = subprocess.run(
            [*command, "-i"], check=True, env=home, input=questions, stdout=subprocess.PIPE, text=True
        )
        open_times = [json.loads(line)["seconds"] for line in found.stdout.splitlines() if line.startswith("{")]
    case, name = f"retro ask, {PAGES} pages", "reader"
    spreads = {"first": Spread.of(times[:1]), "later": Spread.of(times[1:]), "later, open": Spread.of(open_times[1:])}
    rows = [Row(case=f"{case}: {key}", implementation=name, median_s=s.median, low_s=s.low, high_s=s.high)
            for key, s in spreads.items()]  # fmt: skip
    rows[0].peak_mib = peak
    return rows, [
        at_most(f"{case}: seconds of the first answer", spreads["first"].median, 60),
        at_most(f"{case}: seconds of a later command", spreads["later"].median, 2),
        at_most(f"{case}: seconds of a later question (-i)", spreads["later, open"].median, 2),
        at_most(f"{case}: MiB of the command at most", peak, 1.5e9 / 2**20),
    ]


def _write_pages(folder: Path) -> Path:
    """PAGES * PAGE characters of documentation in files, and of generated people where it ends."""
    folder.mkdir()
    left = PAGES * PAGE
    people = (" ".join([entity.document, *entity.notes]) for entity in make_entities(6 * PAGES, 0))
    for number, text in enumerate(itertools.chain((document.text for document in python_docs()), people)):
        text = text[:left]
        (folder / f"{number:04}.txt").write_text(text)
        left -= len(text)
        if left <= 0:
            return folder
    raise AssertionError("a person has more than 500 characters")
