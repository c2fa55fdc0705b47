"""`bench pipeline`: text -> tokens -> chunks -> neighbors, MB/s and memory of every stage, against its library alone.

The limits: `tokenizers` over the same text without writing anything; bm25s' own indexing and search; Faiss' search of
the same vectors. Text is generated facts, or the file given. Ratios are of runs that take turns.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numba
import torch

from retro_engine.bench.frame import Row, forget_peak, resident_mib, time_in_turns
from retro_engine.data.builtin import make_entities
from retro_engine.data.corpus import Document, Reader
from retro_engine.data.prepare import prepare
from retro_engine.data.store import Store
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.retrieval.index import build_index
from retro_engine.retrieval.lexical import K1, B, Bm25Index

CPU = torch.device("cpu")
QUERIES, K, ROUNDS = 2000, 20, 3


def run(text: str | None = None) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=".") as name:
        folder = Path(name)
        source = Path(text) if text else _facts(folder / "facts.jsonl")
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
        rows += _bm25(folder, store, chunks, size, numbers)
        return rows + _dense(folder, store, chunks)


def _facts(path: Path) -> Path:
    with path.open("w") as file:
        for seed in range(150):
            text = " ".join(entity.document for entity in make_entities(40, seed))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def _stage(
    case: str, size: float, ours: Callable[[], object], other_name: str, other: Callable[[], object]
) -> list[Row]:
    times = time_in_turns({"ours": ours, other_name: other}, CPU, ROUNDS)
    before = resident_mib()
    forget_peak()
    ours()
    peak = resident_mib(is_peak=True) - before
    rows = []
    for name, (median, low, high) in times.items():
        row = Row(
            "pipeline", case, name, median, low, high, 1e-9 * size / median, note=f"{1e-6 * size / median:.2f} MB/s"
        )
        if name == "ours":
            row.ratios, row.peak_mib = {other_name: times[other_name][0] / median}, peak
        rows.append(row)
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
    import faiss

    index = build_index(store, "hash", folder / "dense", factory="Flat")
    queries = index.embed_texts(chunks[:QUERIES])
    plain = faiss.IndexFlatIP(queries.shape[1])
    plain.add(index.embed_texts(chunks))
    asked = sum(len(chunk.encode()) for chunk in chunks[:QUERIES])
    return _stage(
        "vectors to neighbors, Flat",
        asked,
        lambda: index.search_vectors(queries, K),
        "faiss",
        lambda: plain.search(queries, K),
    )
