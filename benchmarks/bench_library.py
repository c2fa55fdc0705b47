"""The live library: acknowledged adds against bare apsw with FTS5, answers while it is written to, opening after a kill.

Documents are passages of 45 words (about one chunk) of Wikipedia, over and over where they do not suffice. RETRO_CHUNKS
sets the size of the library (100,000), RETRO_LIBRARY a folder to keep it in, RETRO_TEXT another JSON lines file.
"""

import functools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import apsw
import numpy as np

from retro_engine.bench.frame import Measured, Options, Spread, at_least, at_most, compared
from retro_engine.bench.machine import ROOT
from retro_engine.data.corpus import Document, Reader
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import MissingInputError
from retro_engine.library.documents import HashEmbedder
from retro_engine.library.library import Library
from retro_engine.retrieval.analyzer import Analyzer

NUM_CHUNKS = int(os.environ.get("RETRO_CHUNKS", "100000"))
WORDS_PER_DOCUMENT = 45
WRITES_PER_S = 50
QUERIES = 300
K = 10
WIKIPEDIA = ROOT.parent / "shared" / "data" / "wikipedia-featured-good.jsonl.zst"


def run(options: Options) -> Measured:
    tokenizer = Tokenizer.train([d.text for d in Texts(200_000).documents(20_000)], 16384)
    measured = Measured([])
    with tempfile.TemporaryDirectory() as name:
        for batch in (1, 100):
            folder = Path(name) / f"adds-{batch}"
            folder.mkdir()
            measure_adds(measured, tokenizer, folder, batch)
        folder = filled(Path(os.environ.get("RETRO_LIBRARY", Path(name) / "library")), tokenizer)
        for mode in ("lexical", "dense", "hybrid"):
            for question, num_terms in (("8-term question", 8), ("64-token chunk", 0)):
                measure_answers(measured, folder, mode, question, num_terms)
        measure_opening(measured, folder)
    return measured


@functools.cache
def passages() -> list[str]:
    """Every passage of the corpus, in order."""
    path = Path(os.environ.get("RETRO_TEXT", WIKIPEDIA))
    if not path.exists():
        raise MissingInputError(f"{path} is not there", "its passages fill the library", "RETRO_TEXT=FILE.jsonl")
    out = []
    for row in Reader().read([path]):
        words = row.text.split() if isinstance(row, Document) else []
        out += [" ".join(words[i : i + WORDS_PER_DOCUMENT]) for i in range(0, len(words), WORDS_PER_DOCUMENT)]
    return out


class Texts:
    """Documents without end from the passage number `first` on."""

    def __init__(self, first: int = 0):
        self.next = first

    def documents(self, count: int) -> list[Document]:
        self.next += count
        numbers = range(self.next - count, self.next)
        return [Document(f"d{n}", "A title", f"{passages()[n % len(passages())]} {n}") for n in numbers]

    def question(self, num_terms: int) -> str:
        """The first terms of the next passage, stop words left out; all of it for 0."""
        (document,) = self.documents(1)
        return " ".join(Analyzer().words(document.text)[:num_terms]) if num_terms else document.text


def filled(path: Path, tokenizer: Tokenizer) -> Path:
    """A library of NUM_CHUNKS chunks with vectors."""
    if not path.exists():
        Library.create(path, tokenizer, 64, embedder=HashEmbedder(tokenizer))
    texts = Texts()
    start = time.perf_counter()
    with Library(path) as library:
        while sum(n["chunks"] for n in library.statistics()["namespaces"].values()) < NUM_CHUNKS:
            library.add(texts.documents(1000))
        print(f"filled in {time.perf_counter() - start:.0f} s: {library.statistics()}")
    return path


class Bare:
    """What one writes with apsw alone: a table and its FTS5 index, upserted in one transaction with the same durability."""

    def __init__(self, path: Path):
        self.connection = apsw.Connection(str(path))
        self.connection.execute("PRAGMA journal_mode = WAL")
        self.connection.execute("PRAGMA synchronous = FULL")
        self.connection.execute(
            "CREATE TABLE documents (key INTEGER PRIMARY KEY, id TEXT UNIQUE, title TEXT, text TEXT);"
            "CREATE VIRTUAL TABLE search USING fts5(text, content='documents', content_rowid='key');"
        )

    def add(self, documents: list[Document]) -> None:
        run = self.connection.execute
        run("BEGIN IMMEDIATE")
        for d in documents:
            old = run("SELECT key, text FROM documents WHERE id = ?", (d.id,)).fetchone()
            if old is not None:
                run("INSERT INTO search (search, rowid, text) VALUES ('delete', ?, ?)", old)
                run("DELETE FROM documents WHERE key = ?", old[:1])
            run("INSERT INTO documents (id, title, text) VALUES (?, ?, ?)", (d.id, d.title, d.text))
            run("INSERT INTO search (rowid, text) VALUES (last_insert_rowid(), ?)", (d.text,))
        run("COMMIT")


@dataclass(frozen=True)
class TokenizerAlone:
    """What no library of tokens can be faster than: the documents' tokens, written nowhere."""

    tokenizer: Tokenizer

    def add(self, documents: list[Document]) -> None:
        self.tokenizer.encode_batch([d.text for d in documents])


def measure_adds(measured: Measured, tokenizer: Tokenizer, folder: Path, batch: int) -> None:
    """The same documents to each in turns, so that what else the machine does falls on all alike."""
    texts = Texts(100_000)
    adders: dict[str, Bare | TokenizerAlone | Library] = {
        "apsw with FTS5": Bare(folder / "bare.sqlite"),
        "tokenizer alone": TokenizerAlone(tokenizer),
    }
    libraries = {"lexical": None, "with hash vectors": HashEmbedder(tokenizer)}
    for name, embedder in libraries.items():
        Library.create(folder / name, tokenizer, 64, embedder=embedder)
        adders[name] = Library(folder / name)
    times: dict[str, list[float]] = {name: [] for name in adders}
    for _ in range(410 if batch == 1 else 70):
        documents = texts.documents(batch)
        for name, adder in adders.items():
            start = time.perf_counter()
            adder.add(documents)
            times[name].append(time.perf_counter() - start)
    for adder in adders.values():
        if isinstance(adder, Library):
            adder.close()
    case = f"acknowledged adds of {batch}"
    rows = compared(case, {name: Spread.of(each[10:]) for name, each in times.items()}, ours=libraries)
    for row in rows:
        row.note = f"{batch / row.median_s:,.0f} documents/s"
        if row.ratios:
            share = row.ratios["apsw with FTS5"]
            measured.targets.append(at_least(f"{case}, {row.implementation}: share of bare apsw's rate", share, 0.5))
    measured.rows += rows


def measure_answers(measured: Measured, folder: Path, mode: str, question: str, num_terms: int) -> None:
    texts, more = Texts(230_000), Texts(10_000_000 * (1 + num_terms))
    is_over = threading.Event()
    written = 0
    with Library(folder) as library:

        def write() -> None:
            nonlocal written
            start = time.perf_counter()
            while not is_over.is_set():
                library.add(more.documents(1))
                written += 1
                time.sleep(max(0.0, start + written / WRITES_PER_S - time.perf_counter()))

        for _ in range(20):
            library.search(texts.question(num_terms), K, mode)
        writer = threading.Thread(target=write)
        writer.start()
        start = time.perf_counter()
        times = []
        for _ in range(QUERIES):
            time.sleep(0.01)
            asked = texts.question(num_terms)
            times.append(timed(lambda asked=asked: library.search(asked, K, mode)))
        seconds = time.perf_counter() - start
        is_over.set()
        writer.join()
    (row,) = compared(f"{question} beside {WRITES_PER_S} adds a second", {mode: Spread.of(times)})
    row.note = f"p99 {1e3 * float(np.quantile(times, 0.99)):.1f} ms, {written / seconds:.0f} adds a second"
    measured.rows.append(row)
    measured.targets.append(at_most(f"{row.case}, {mode}: p50 in ms", 1e3 * row.median_s, 15))


WRITER = """
import sys
sys.path += sys.argv[2:]
from bench_library import Texts
from retro_engine.library.library import Library
texts = Texts(50_000_000)
with Library(sys.argv[1]) as library:
    print("open", flush=True)
    while True:
        library.add(texts.documents(20))
"""


def measure_opening(measured: Measured, folder: Path) -> None:
    here = Path(__file__).parent

    def kill_a_writer() -> None:
        command = [sys.executable, "-c", WRITER, str(folder), str(here)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n"
            time.sleep(2)
            os.kill(process.pid, signal.SIGKILL)

    def open_and_ask() -> None:
        with Library(folder) as library:
            assert library.search(Texts(230_000).question(8), K)

    times = []
    for _ in range(3):
        kill_a_writer()
        times.append(timed(open_and_ask))
    rows = compared("open after a kill, and answer", {"ours": Spread.of(times)})
    measured.rows += rows
    measured.targets.append(at_most("open after a kill, and answer: seconds", rows[0].median_s, 10))


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
