"""BM25 over the chunks of a store: bm25s makes the index, a numba loop searches it.

The loop adds what bm25s' own search has not: it leaves out the query's own document while it scores (asking
for more and filtering afterwards would need hundreds), and weighs terms by the document frequencies of several
stores together. Reads and writes INDEX/manifest.json, vocabulary.json and four .npy files whose hashes the
manifest has. Letters: Q queries, U chunks, K neighbors.
"""

import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retro_engine.data import files
from retro_engine.data.store import Store
from retro_engine.errors import StoreError, UsageError
from retro_engine.jit import numba

ARRAYS = ("scores", "chunks", "starts", "frequencies")
K1, B = 1.5, 0.75


def terms_of(texts: Sequence[str]) -> list[list[str]]:
    """Lower-case words of two letters or more, English stop words removed, no stemmer."""
    import bm25s

    return bm25s.tokenize(list(texts), stopwords="en", return_ids=False, show_progress=False)


class Bm25Index:
    """BM25 scores of every term and chunk, by term; opened memory-mapped."""

    def __init__(self, folder: Path, store: Store):
        """Raises MissingInputError, or StoreError for an index of another store or a damaged one."""
        self.folder, self.store = folder, store
        self.manifest = files.read_manifest(folder, "index")
        if self.manifest["store"] != store.fingerprint:
            raise StoreError(
                f"{folder} indexes store {self.manifest['store'][:12]}",
                f"{store.folder} is {store.fingerprint[:12]}",
                f"retro index {store.folder}",
            )
        files.verify_files(folder, self.manifest["files"])
        try:
            load = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS}
            self.vocabulary: dict[str, int] = json.loads((folder / "vocabulary.json").read_text())
        except (OSError, ValueError) as error:
            raise StoreError(f"{folder} cannot be read", str(error), f"retro index {store.folder}") from error
        self.scores, self.chunks = load["scores"], load["chunks"]
        self.starts, self.frequencies = np.array(load["starts"]), np.array(load["frequencies"])
        self.num_chunks: int = store.num_rows
        self._check()

    def _check(self) -> None:
        """Everything that the search loop takes for granted: numba checks no bounds."""
        terms = len(self.vocabulary)
        types = [(a.dtype, a.ndim) for a in (self.scores, self.chunks, self.starts, self.frequencies)]
        wanted = [(np.dtype(t), 1) for t in (np.float32, np.int32, np.int64, np.int64)]
        holds = (
            types == wanted
            and len(self.scores) == len(self.chunks)
            and (len(self.starts), len(self.frequencies)) == (terms + 1, terms)
            and self.starts[0] == 0
            and self.starts[-1] == len(self.scores)
            and bool((np.diff(self.starts) >= 0).all())
            and (not len(self.chunks) or (int(self.chunks.min()) >= 0 and int(self.chunks.max()) < self.num_chunks))
            and sorted(self.vocabulary.values()) == list(range(terms))
        )
        if not holds:
            raise StoreError(
                f"{self.folder} contradicts itself", "its arrays do not fit", f"retro index {self.store.folder}"
            )

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    @classmethod
    def build(cls, store: Store, folder: Path) -> "Bm25Index":
        """Index every chunk of `store` and publish the index in `folder`."""
        import bm25s

        texts: Iterable[str] = (text for batch in store.texts() for text in batch)
        tokens = bm25s.tokenize(list(texts), stopwords="en", show_progress=False)
        vocabulary: dict[str, int] = dict(tokens.vocab)
        vocabulary.pop("", None)
        index = bm25s.BM25(k1=K1, b=B)
        if vocabulary:
            index.index(tokens, show_progress=False)
            indptr = index.scores["indptr"]
            order = sorted(vocabulary, key=lambda term: vocabulary[term])
            columns = np.array([vocabulary[term] for term in order], np.int64)
            counts = np.diff(indptr)[columns]
            scores, chunks = index.scores["data"], index.scores["indices"].astype(np.int32)
            if len(columns) != len(indptr) - 1:  # the empty term, when bm25s added one, is the last column
                assert columns.tolist() == list(range(len(columns))), "bm25s numbers terms from 0"
            starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
            scores, chunks = scores[: starts[-1]], chunks[: starts[-1]]
        else:  # no chunk has a word: every query finds nothing
            order, counts, starts = [], np.zeros(0, np.int64), np.zeros(1, np.int64)
            scores, chunks = np.zeros(0, np.float32), np.zeros(0, np.int32)
        arrays = {"scores": scores.astype(np.float32), "chunks": chunks, "starts": starts, "frequencies": counts}
        with files.locked(folder):
            hashes = {}
            for name, values in arrays.items():
                buffer = io.BytesIO()
                np.save(buffer, values, allow_pickle=False)
                files.publish(folder / f"{name}.npy", [buffer.getbuffer()])
                hashes[f"{name}.npy"] = files.sha256_file(folder / f"{name}.npy")
            words = {term: number for number, term in enumerate(order)}
            files.publish(folder / "vocabulary.json", [json.dumps(words, ensure_ascii=False).encode()])
            hashes["vocabulary.json"] = files.sha256_file(folder / "vocabulary.json")
            content = {
                "retriever": "bm25",
                "store": store.fingerprint,
                "chunks": store.num_rows,
                "k1": K1,
                "b": B,
                "stopwords": "en",
                "files": hashes,
            }
            files.write_manifest(folder, "index", content)
        return cls(folder, store)

    def search(
        self,
        texts: Sequence[str],
        k: int,
        exclude: np.ndarray | None = None,
        frequencies: dict[str, int] | None = None,
        num_chunks: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best chunks of each text: ids [Q, k] (-1 = fewer were found) and scores [Q, k], best first.

        `exclude` [Q, 2]: rows first ... last - 1 that a query must not find. `frequencies` and `num_chunks`:
        document frequencies and size of a larger collection that scores shall be comparable across.
        """
        if k < 1:
            raise UsageError(f"k={k} cannot be used", "at least one neighbor is searched for")
        terms = terms_of(texts)
        ids = [np.unique([self.vocabulary[t] for t in row if t in self.vocabulary]).astype(np.int64) for row in terms]
        offsets = np.cumsum([0] + [len(row) for row in ids])
        flat = np.concatenate(ids) if len(ids) and offsets[-1] else np.zeros(0, np.int64)
        weights = np.ones(len(flat), np.float32)
        if frequencies is not None and num_chunks is not None:
            names = {self.vocabulary[t]: t for row in terms for t in row if t in self.vocabulary}
            for place, term in enumerate(flat):
                here = _idf(int(self.frequencies[term]), self.num_chunks)
                weights[place] = _idf(frequencies[names[int(term)]], num_chunks) / here
        if exclude is None:
            exclude = np.zeros((len(texts), 2), np.int64)
        workers = min(numba.get_num_threads(), max(1, len(texts)))
        return _search(
            flat,
            offsets,
            weights,
            exclude.astype(np.int64),
            self.scores,
            self.chunks,
            self.starts,
            self.num_chunks,
            k,
            workers,
        )

    def frequencies_of(self, texts: Sequence[str]) -> dict[str, int]:
        """Chunks that hold each term of `texts`."""
        words = {term for row in terms_of(texts) for term in row}
        return {t: int(self.frequencies[self.vocabulary[t]]) if t in self.vocabulary else 0 for t in words}

    def summary(self) -> dict[str, Any]:
        return {key: self.manifest[key] for key in ("kind", "retriever", "chunks", "store", "fingerprint")}


def _idf(frequency: int, num_chunks: int) -> float:
    """Lucene's BM25 idf."""
    return math.log(1 + (num_chunks - frequency + 0.5) / (frequency + 0.5))


@numba.njit(parallel=True, cache=True)
def _search(terms, offsets, weights, exclude, scores, chunks, starts, num_chunks, k, workers):  # type: ignore[no-untyped-def]
    num_queries = len(offsets) - 1
    ids = np.full((num_queries, k), -1, np.int64)
    best = np.zeros((num_queries, k), np.float32)
    for worker in numba.prange(workers):
        total = np.zeros(num_chunks, np.float32)
        for query in range(worker, num_queries, workers):
            for place in range(offsets[query], offsets[query + 1]):
                weight = weights[place]
                for entry in range(starts[terms[place]], starts[terms[place] + 1]):
                    total[chunks[entry]] += weight * scores[entry]
            total[exclude[query, 0] : exclude[query, 1]] = 0
            found = 0
            floor = np.float32(0)  # the worst score kept, once k are kept
            for chunk in range(num_chunks):
                score = total[chunk]
                if score > floor:  # ties keep the lower id: the result does not depend on the order of search
                    slot = found if found < k else k - 1
                    while slot > 0 and best[query, slot - 1] < score:
                        best[query, slot] = best[query, slot - 1]
                        ids[query, slot] = ids[query, slot - 1]
                        slot -= 1
                    best[query, slot] = score
                    ids[query, slot] = chunk
                    found = min(found + 1, k)
                    if found == k:
                        floor = best[query, k - 1]
            total[:] = 0
    return ids, best
