"""`bench pipeline`: text -> tokens -> chunks -> neighbors, MB/s and memory of every stage, against its library alone.

The limits: `tokenizers` over the same text without writing anything; bm25s' own indexing and search; Faiss' search of
the same vectors. Text is generated facts, or the file given. Ratios are of runs that take turns.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np

from retro_engine.bench.frame import CPU, Measured, Options, Row, Target, at_least, compared, time_in_turns
from retro_engine.bench.machine import forget_peak, resident_mib
from retro_engine.data.builtin import make_entities
from retro_engine.data.corpus import Document, Reader
from retro_engine.data.prepare import prepare
from retro_engine.data.store import Store
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.retrieval.bm25 import K1, B
from retro_engine.retrieval.index_build import build_index
from retro_engine.retrieval.lexical import Bm25Index

QUERIES, K, ROUNDS = 2000, 20, 3


def run(options: Options) -> Measured:
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=".") as name:
        folder = Path(name)
        source = Path(options.text) if options.text else _facts(folder / "facts.jsonl")
        texts = [row.text for row in Reader().read([source]) if isinstance(row, Document)]
        tokenizer = Tokenizer.train(texts[:200], 16384)
        (folder / "tokenizer.json").write_text(tokenizer.json)
        numbers = iter(range(1 << 30))
        size = sum(len(text.encode()) for text in texts)

        def encode() -> None:
            for first in range(0, len(texts), 100):
                tokenizer.backend.encode_batch_fast(texts[first : first + 100], add_special_tokens=False)

        def write() -> Path:
            out = folder / f"store{next(numbers)}"
            prepare([source], out, str(folder / "tokenizer.json"))
            return out

        rows = _stage("text to tokens and chunks", size, write, "tokenizers", encode)
        store = prepare([source], folder / "store", str(folder / "tokenizer.json"))
        chunks = [chunk for batch in store.texts() for chunk in batch]
        rows += [*_bm25(folder, store, chunks, size, numbers), *_dense(folder, store, chunks)]
    return Measured(rows, targets(rows))


def targets(rows: list[Row]) -> list[Target]:
    """Of README and docs/performance-log.md; shares of the rate of the library alone."""
    least = {"text to tokens and chunks": 0.8, "chunks to a BM25 index": 0.8}
    out = []
    for row in rows:
        for other, ratio in row.ratios.items():
            out.append(at_least(f"{row.case}: share of the rate of {other}", ratio, least.get(row.case, 1 / 1.1)))
    return out


def _facts(path: Path) -> Path:
    with path.open("w") as file:
        for seed in range(150):
            text = " ".join(entity.document for entity in make_entities(40, seed))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def _stage(
    case: str, size: float, ours: Callable[[], object], other_name: str, other: Callable[[], object]
) -> list[Row]:
    rows = compared(case, time_in_turns({"ours": ours, other_name: other}, CPU, ROUNDS))
    before = resident_mib()
    forget_peak()
    ours()
    rows[0].peak_mib = resident_mib(is_peak=True) - before
    for row in rows:
        row.gb_s, row.note = 1e-9 * size / row.median_s, f"{1e-6 * size / row.median_s:.2f} MB/s"
    return rows


def _bm25(folder: Path, store: Store, chunks: list[str], size: float, numbers: Iterator[int]) -> list[Row]:
    import bm25s

    other = bm25s.BM25(k1=K1, b=B, backend="numba")

    def index_other() -> None:
        other.index(bm25s.tokenize(chunks, stopwords="en", show_progress=False), show_progress=False)

    rows = _stage(
        "chunks to a BM25 index",
        size,
        lambda: Bm25Index.build(store, folder / f"i{next(numbers)}"),
        "bm25s",
        index_other,
    )
    index = Bm25Index.build(store, folder / "index")
    queries = chunks[:QUERIES]

    def search_other() -> None:
        terms = bm25s.tokenize(queries, stopwords="en", return_ids=False, show_progress=False)
        other.retrieve(terms, k=K, show_progress=False, n_threads=numba.get_num_threads())

    asked = sum(len(query.encode()) for query in queries)
    return rows + _stage("chunks to BM25 neighbors", asked, lambda: index.search(queries, K), "bm25s", search_other)


def _dense(folder: Path, store: Store, chunks: list[str]) -> list[Row]:
    """The same vectors, lists and nprobe in an index in memory, called directly."""
    import faiss

    rows = []
    lists = min(512, store.num_rows // 40)  # 39 vectors a list are the least that Faiss likes to train on
    for factory in ("Flat", f"IVF{lists},Flat", f"IVF{lists},SQ8"):
        index = build_index(store, "hash", folder / f"dense-{factory}", factory=factory)
        everything = index.embed_texts(chunks)
        direct: Any = faiss.IndexFlatIP(everything.shape[1])
        if factory != "Flat":
            direct = faiss.read_index(str(index.folder / "trained.faiss"))
            direct.nprobe = index.nprobe
        direct.add(everything)
        queries = everything[:QUERIES]
        asked = sum(len(chunk.encode()) for chunk in chunks[:QUERIES])
        for text, batch in (("at once", len(queries)), ("one by one", 1)):
            ours = partial(_search, index.search_vectors, queries, batch)
            theirs = partial(_search, direct.search, queries, batch)
            rows += _stage(f"vectors to neighbors, {factory}, {text}", asked, ours, "faiss", theirs)
    return rows


def _search(search: Callable[[np.ndarray, int], object], queries: np.ndarray, batch: int) -> None:
    for first in range(0, len(queries), batch):
        search(queries[first : first + batch], K)
