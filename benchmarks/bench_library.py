"""The live library: acknowledged adds against bare apsw with FTS5, answers while it is written to, opening after a kill.

RETRO_CHUNKS sets the size (100,000; a million takes a quarter of an hour). Documents are sentences of invented words
whose frequencies follow Zipf's law, one chunk each on average.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import apsw
import numpy as np
import pytest

from retro_engine.data.corpus import Document
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.retrieval.library import Library
from retro_engine.retrieval.library_documents import HashEmbedder

NUM_CHUNKS = int(os.environ.get("RETRO_CHUNKS", "100000"))
NUM_WORDS, WORDS_PER_DOCUMENT = 30_000, 45
WRITES_PER_S = 50
QUERIES = 300
K = 10


class Texts:
    """Documents without end, the same ones each time."""

    def __init__(self, seed: int = 0):
        self.rng = np.random.default_rng(seed)
        parts = [a + b for a in "bcdfglmnprstvz" for b in "aeiou"]
        lengths = np.random.default_rng(1).integers(2, 5, NUM_WORDS)
        draw = np.random.default_rng(2)
        self.words = np.array(["".join(draw.choice(parts, n)) for n in lengths])
        shares = 1 / np.arange(3, NUM_WORDS + 3)
        self.ends = np.cumsum(shares / shares.sum())
        self.count = 0

    def words_of(self, count: int) -> str:
        return " ".join(self.words[np.searchsorted(self.ends, self.rng.random(count))].tolist())

    def documents(self, count: int) -> list[Document]:
        self.count += count
        names = range(self.count - count, self.count)
        return [Document(f"d{name}", "A title", self.words_of(WORDS_PER_DOCUMENT)) for name in names]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([d.text for d in Texts(3).documents(3000)], 8192)


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


@pytest.mark.benchmark(group="acknowledged adds")
@pytest.mark.parametrize("batch", [1, 100])
@pytest.mark.parametrize("kind", ["apsw with FTS5", "lexical", "lexical and hash vectors"])
def test_adds(benchmark, tokenizer: Tokenizer, tmp_path: Path, kind: str, batch: int) -> None:
    texts = Texts(4)
    rounds = 400 if batch == 1 else 40
    if kind == "apsw with FTS5":
        target: Bare | Library = Bare(tmp_path / "bare.sqlite")
    else:
        embedder = HashEmbedder(tokenizer) if "hash" in kind else None
        Library.create(tmp_path / "library", tokenizer, 64, embedder=embedder)
        target = Library(tmp_path / "library")
    batches = [(texts.documents(batch),) for _ in range(rounds + 20)]
    for (documents,) in batches[:20]:
        target.add(documents)
    benchmark.pedantic(target.add, setup=lambda: (batches.pop(), {}), rounds=rounds)
    benchmark.extra_info["documents_per_s"] = batch / benchmark.stats.stats.mean
    if isinstance(target, Library):
        target.close()


@pytest.mark.benchmark(group="answers while 50 documents/s are added")
@pytest.mark.parametrize("mode", ["lexical", "dense", "hybrid"])
@pytest.mark.parametrize("words", [8, WORDS_PER_DOCUMENT], ids=["8-term question", "64-token chunk"])
def test_answers(benchmark, folder: Path, mode: str, words: int) -> None:
    texts, more = Texts(5), Texts(6 + words)
    more.count = 10_000_000 + 1_000_000 * words
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
            library.search(texts.words_of(words), K, mode)
        writer = threading.Thread(target=write)
        writer.start()
        start = time.perf_counter()
        benchmark.pedantic(
            library.search, setup=lambda: (time.sleep(0.01), ((texts.words_of(words), K, mode), {}))[1], rounds=QUERIES
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
sys.path.insert(0, sys.argv[2])
from bench_library import Texts
from retro_engine.retrieval.library import Library
texts = Texts(9)
texts.count = 50_000_000
with Library(sys.argv[1]) as library:
    print("open", flush=True)
    while True:
        library.add(texts.documents(20))
"""


@pytest.mark.benchmark(group="open after a kill, and answer")
def test_ready_after_a_kill(benchmark, folder: Path) -> None:
    def kill_a_writer() -> None:
        command = [sys.executable, "-c", WRITER, str(folder), str(Path(__file__).parent)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n"
            time.sleep(2)
            os.kill(process.pid, signal.SIGKILL)

    def open_and_ask() -> None:
        with Library(folder) as library:
            assert library.search(Texts(7).words_of(8), K)

    benchmark.pedantic(open_and_ask, setup=kill_a_writer, rounds=3)
