"""The live library: acknowledged adds against bare apsw with FTS5, answers while it is written to, opening after a kill.

Documents are passages of 45 words (about one chunk) of Wikipedia, over and over where they do not suffice. RETRO_CHUNKS
sets the size of the library (100,000), RETRO_LIBRARY a folder to keep it in, RETRO_TEXT another JSON lines file.
"""

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import apsw
import numpy as np
import pytest
from helpers import shared

from retro_engine.data.corpus import Document, Reader
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.library.documents import HashEmbedder
from retro_engine.library.library import Library
from retro_engine.retrieval.analyzer import Analyzer

NUM_CHUNKS = int(os.environ.get("RETRO_CHUNKS", "100000"))
WORDS_PER_DOCUMENT = 45
WRITES_PER_S = 50
QUERIES = 300
K = 10


@functools.cache
def passages() -> list[str]:
    """Every passage of the corpus, in order."""
    out = []
    path = os.environ.get("RETRO_TEXT") or shared("data/wikipedia-featured-good.jsonl.zst")
    for row in Reader().read([Path(path)]):
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


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([d.text for d in Texts(200_000).documents(20_000)], 16384)


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library of NUM_CHUNKS chunks with vectors."""
    path = Path(os.environ.get("RETRO_LIBRARY", tmp_path_factory.mktemp("library") / "library"))
    if not path.exists():
        Library.create(path, tokenizer, 64, embedder=HashEmbedder(tokenizer))
    texts = Texts()
    start = time.perf_counter()
    with Library(path) as library:
        while sum(n["chunks"] for n in library.statistics()["namespaces"].values()) < NUM_CHUNKS:
            library.add(texts.documents(1000))
        print(f"\nfilled in {time.perf_counter() - start:.0f} s: {library.statistics()}")
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


@pytest.mark.benchmark(group="acknowledged adds")
@pytest.mark.parametrize("batch", [1, 100])
def test_adds(benchmark, tokenizer: Tokenizer, tmp_path: Path, batch: int) -> None:
    """The same documents to each in turns, so that what else the machine does falls on all alike."""
    texts = Texts(100_000)
    targets: dict[str, Bare | TokenizerAlone | Library] = {
        "apsw_with_fts5": Bare(tmp_path / "bare.sqlite"),
        "tokenizer_alone": TokenizerAlone(tokenizer),
    }
    for name, embedder in (("lexical", None), ("lexical_and_hash_vectors", HashEmbedder(tokenizer))):
        Library.create(tmp_path / name, tokenizer, 64, embedder=embedder)
        targets[name] = Library(tmp_path / name)
    times: dict[str, list[float]] = {name: [] for name in targets}

    def add_to_all() -> None:
        documents = texts.documents(batch)
        for name, target in targets.items():
            start = time.perf_counter()
            target.add(documents)
            times[name].append(time.perf_counter() - start)

    benchmark.pedantic(add_to_all, rounds=400 if batch == 1 else 60, warmup_rounds=10)
    medians = {name: float(np.median(each[10:])) for name, each in times.items()}
    for name, seconds in medians.items():
        benchmark.extra_info[f"{name}_documents_per_s"] = batch / seconds
        benchmark.extra_info[f"{name}_ratio"] = medians["apsw_with_fts5"] / seconds
    for target in targets.values():
        if isinstance(target, Library):
            target.close()


@pytest.mark.benchmark(group="answers while 50 documents/s are added")
@pytest.mark.parametrize("mode", ["lexical", "dense", "hybrid"])
@pytest.mark.parametrize("num_terms", [8, 0], ids=["8-term question", "64-token chunk"])
def test_answers(benchmark, folder: Path, mode: str, num_terms: int) -> None:
    texts, more = Texts(230_000), Texts(10_000_000 * (1 + num_terms))
    is_over = threading.Event()
    written = [0]
    with Library(folder) as library:

        def write() -> None:
            start = time.perf_counter()
            while not is_over.is_set():
                library.add(more.documents(1))
                written[0] += 1
                time.sleep(max(0.0, start + written[0] / WRITES_PER_S - time.perf_counter()))

        for _ in range(20):
            library.search(texts.question(num_terms), K, mode)
        writer = threading.Thread(target=write)
        writer.start()
        start = time.perf_counter()
        benchmark.pedantic(
            library.search,
            setup=lambda: (time.sleep(0.01), ((texts.question(num_terms), K, mode), {}))[1],
            rounds=QUERIES,
        )
        seconds = time.perf_counter() - start
        is_over.set()
        writer.join()
    times = np.sort(benchmark.stats.stats.data) * 1e3
    benchmark.extra_info |= {
        "p50_ms": float(np.median(times)),
        "p99_ms": float(times[int(0.99 * len(times))]),
        "writes_per_s": written[0] / seconds,
    }


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


@pytest.mark.benchmark(group="open after a kill, and answer")
def test_ready_after_a_kill(benchmark, folder: Path) -> None:
    here = Path(__file__).parent

    def kill_a_writer() -> None:
        command = [sys.executable, "-c", WRITER, str(folder), str(here), str(here.parent / "tests")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n"
            time.sleep(2)
            os.kill(process.pid, signal.SIGKILL)

    def open_and_ask() -> None:
        with Library(folder) as library:
            assert library.search(Texts(230_000).question(8), K)

    benchmark.pedantic(open_and_ask, setup=kill_a_writer, rounds=3)
