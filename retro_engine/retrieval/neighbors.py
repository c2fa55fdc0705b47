"""`retro neighbors`: fills a neighbor table, shard by shard, leaving out the chunk's own document and its copies.

Options: several databases with weights; near-duplicates of the chunk left out; neighbors that share few of its tokens left out,
or put behind those that share more; for held-out documents neighbors left out that state what follows. Reads stores and indexes; writes TABLE/ids-NNNNN.bin (32,768 chunks each) with
their markers, and manifest.json. Letters: Q queries, K neighbors, R tokens per neighbor, M chunk length.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from retro_engine.data import array_file, files
from retro_engine.data.batches import split_documents
from retro_engine.data.contents import number_contents
from retro_engine.data.neighbor_table import NeighborTable, check_databases, ids_name, publish_table, refuse_existing
from retro_engine.data.store import Store
from retro_engine.errors import StoreError, UsageError
from retro_engine.progress import Reporter, duration, seconds_each
from retro_engine.retrieval.analyzer import Analyzer
from retro_engine.retrieval.embed import short_name
from retro_engine.retrieval.executor import Piece, Stage, run_stage
from retro_engine.retrieval.lexical import Bm25Index
from retro_engine.retrieval.overlap import NGRAM, check_share, shared_tokens, stated_shares
from retro_engine.retrieval.search import (
    Building,
    Retriever,
    check_retriever,
    copies_left_out,
    halves,
    index_folder,
    make_index,
)

SHARD_ROWS = 1 << 15
BATCH_ROWS = 8192
SAMPLE_ROWS = 256
DUPLICATE_NGRAM = 13  # tokens
MANY_MISSING = 0.5  # of the chunks: from then on the build says what may be the reason


@dataclass(frozen=True)
class Filters:
    """What is left out besides the own document, and the order of the rest. The first two shares are of tokens in shared runs;
    None = off.
    """

    near_duplicates: float | None = None  # of the chunk, in runs of 13: a neighbor that states more is left out
    leak_limit: float | None = None  # of the next chunk of held-out documents, in runs of 8
    splits: str = "98,2,0"  # which documents are held out: valid and test
    least_shared: float | None = None  # of the chunk's different tokens: a neighbor that has fewer of them is left out
    reranks: bool = False  # the neighbor that has most of them comes first

    def __post_init__(self) -> None:
        for name in ("near_duplicates", "leak_limit", "least_shared"):
            check_share(name.replace("_", "-"), getattr(self, name))

    @property
    def is_on(self) -> bool:
        return self != Filters(splits=self.splits)

    def described(self) -> dict[str, Any]:
        """For a manifest; earlier versions had no entry for what shares few tokens."""
        later = {"least_shared": self.least_shared, "reranks": self.reranks}
        return {
            name: value for name, value in asdict(self).items() if name not in later or later[name] not in (None, False)
        }


def build_neighbors(
    query: Store,
    databases: Sequence[Store],
    retriever: str = "bm25",
    num_neighbors: int = 20,
    name: str | None = None,
    reporter: Reporter | None = None,
    merge_overlaps: bool = True,
    building: Building | None = None,
    weights: Sequence[float] | None = None,
    filters: Filters | None = None,
) -> NeighborTable:
    """Publish QUERY/neighbors/NAME: the `num_neighbors` best chunks of `databases` for every chunk of `query`.

    Neighbors from the chunk's own document and from copies of it, in whichever store, are never kept, nor is more than one
    copy of any other document; `merge_overlaps` (for r > m) keeps no two that overlap.
    An interrupted build goes on where it ended. Prints what the search will cost, measured on a sample, before it
    starts. Raises UsageError for a table that exists, StoreError for stores that do not fit.
    """
    reporter = reporter or (building.reporter if building is not None else Reporter("quiet"))
    building, filters = replace(building or Building(), reporter=reporter), filters or Filters()
    if num_neighbors < 1:
        raise UsageError(f"--k {num_neighbors} cannot be used", "a table holds at least one neighbor a chunk")
    check_retriever(retriever)
    check_databases(databases, query)  # before hours of indexing
    folder = query.folder / "neighbors" / (name or index_folder(query, retriever).name)
    refuse_existing(folder)
    with files.locked(folder):
        for database in databases:
            for half in halves(retriever, building.embedder):
                say_index_cost(database, half, reporter)
                make_index(database, half, building)
        search = Retriever(databases, retriever, merge_overlaps, building, weights)
        for half in search.halves:
            if half != "bm25":
                search.query_vectors(query, half)
        described: dict[str, Any] = {
            "name": short_name(retriever),
            "fingerprint": search.fingerprint,
            "merge_overlaps": merge_overlaps,
            "copies": "left out",
        }
        if len(search.halves) > 1:
            described["fusion"] = list(building.fusion)
        if weights is not None:
            described["weights"] = list(map(float, weights))
        if filters.is_on:
            described["filters"] = filters.described()
        stage = _table_stage(folder, query, databases, retriever, num_neighbors, building=building, described=described)
        _say_search_cost(stage, query, retriever, reporter)
        hashes = run_stage(stage, building.executor, reporter)
        table = publish_table(folder, query, databases, num_neighbors=num_neighbors, retriever=described, hashes=hashes)
    missing = share_without_neighbors(table)
    reporter.say(f"{missing:.1%} of the chunks have no neighbor from another document")
    if missing > MANY_MISSING and "bm25" in search.halves:
        reporter.say(describe_missing(search))
    return table


def _table_stage(
    folder: Path,
    query: Store,
    databases: Sequence[Store],
    retriever: str,
    num_neighbors: int,
    building: Building,
    described: dict[str, Any],
) -> Stage:
    spec = {
        "query": query.fingerprint,
        "databases": [store.fingerprint for store in databases],
        "num_neighbors": num_neighbors,
        "shard_rows": SHARD_ROWS,
        "described": described,
    }
    names = [str(Path(name).resolve()) if Path(name).is_dir() else name for name in (retriever, building.embedder)]
    stores = [str(store.folder.resolve()) for store in (query, *databases)]
    count = -(-query.num_rows // SHARD_ROWS)
    outputs = tuple(ids_name(number) for number in range(count))
    text = json.dumps(spec, sort_keys=True)
    return Stage("neighbors", find_shard, text, folder=folder.resolve(), outputs=outputs, paths=(*names, *stores))


@lru_cache(1)
def _open_search(spec_text: str, paths: tuple[str, ...]) -> "_TableSearch":
    return _TableSearch(json.loads(spec_text), paths)


def find_shard(stage: Stage, shard: int) -> Sequence[Piece]:
    """The neighbors of one shard's chunks, as an array file."""
    search = _open_search(stage.spec, stage.paths)
    rows = json.loads(stage.spec)["shard_rows"]
    first, last = shard * rows, min((shard + 1) * rows, search.query.num_rows)
    found = [search.find(start, min(start + BATCH_ROWS, last)) for start in range(first, last, BATCH_ROWS)]
    ids = np.concatenate(found)
    if ids.min(initial=-1) < -1 or ids.max(initial=-1) >= search.retriever.starts[-1]:
        raise StoreError(f"neighbor id {ids.max()} is outside the databases", "an index is damaged", "retro index")
    dtype = np.int32 if search.retriever.starts[-1] < 1 << 31 else np.int64
    return array_file.array_parts("neighbors", ids.astype(dtype), search.query.fingerprint)


class _TableSearch:
    """What a process keeps open while it searches shards."""

    def __init__(self, spec: dict[str, Any], paths: tuple[str, ...]):
        described = spec["described"]
        retriever, embedder, query, *databases = paths
        self.query, self.num_neighbors = Store(query), spec["num_neighbors"]
        self.databases = [self.query if path == query else Store(path) for path in databases]
        building = Building(embedder=embedder, fusion=tuple(described.get("fusion", (1.0, 1.0))))
        weights, merge_overlaps = described.get("weights"), described["merge_overlaps"]
        self.retriever = Retriever(self.databases, retriever, merge_overlaps, building, weights)
        self.filters = Filters(**described.get("filters", {}))
        self._own_rows = _own_document_rows(self.query)
        own, *others = number_contents([self.query.contents, *(store.contents for store in self.databases)])
        self._own_contents = own[self.query.row_documents()]
        self._left_out = copies_left_out(self.databases, others)
        self._is_heldout = np.zeros(self.query.num_rows, bool)
        if self.filters.leak_limit is not None:
            shares = split_documents(self.query, self.filters.splits)
            heldout = np.concatenate((shares["valid"], shares["test"]))
            self._is_heldout = np.isin(self.query.row_documents(), heldout)

    def find(self, first: int, last: int) -> np.ndarray:
        """[last - first, K] ids."""
        exclude = [rows.for_queries(self._own_contents[first:last]) for rows in self._left_out]
        k = self.num_neighbors * (2 if self.filters.is_on else 1)
        ids = self.retriever.search_rows(self.query, first, last, k, exclude)[0]
        if not self.filters.is_on:
            return ids
        tokens, lengths = self.retriever.loader.gather(ids, 2 * self.query.chunk_size)
        dropped = (ids < 0) | self._filtered(tokens, lengths, first, last)
        last_of_all = dropped.astype(np.float64)
        if self.filters.least_shared is not None or self.filters.reranks:
            shares = self._shared(tokens, lengths, first, last)
            if self.filters.least_shared is not None:
                dropped |= shares < self.filters.least_shared
            last_of_all = np.where(dropped, 1.0, -shares if self.filters.reranks else 0.0)
        order = np.argsort(last_of_all, axis=1, kind="stable")[:, : self.num_neighbors]
        return np.take_along_axis(np.where(dropped, -1, ids), order, 1)

    def _shared(self, tokens: np.ndarray, lengths: np.ndarray, first: int, last: int) -> np.ndarray:
        """[Q, K] share of the chunk's different tokens that the neighbor's own chunk has, without what follows it."""
        m = self.query.chunk_size
        own, own_lengths = self.query.rows(first, last)
        return shared_tokens(own, own_lengths, tokens[..., :m], np.minimum(lengths, m))

    def _filtered(self, tokens: np.ndarray, lengths: np.ndarray, first: int, last: int) -> np.ndarray:
        """[Q, K] whether a neighbor repeats its chunk, or for held-out documents states what follows."""
        out = np.zeros(lengths.shape, bool)
        own, own_lengths = self.query.rows(first, min(last + 1, self.query.num_rows))
        own_lengths = own_lengths.astype(np.int64)
        count = last - first
        if self.filters.near_duplicates is not None:
            shares = stated_shares(own[:count], own_lengths[:count], tokens, lengths, DUPLICATE_NGRAM)
            out |= shares > self.filters.near_duplicates
        if self.filters.leak_limit is not None:
            has_next = (np.arange(first, last) + 1 < self._own_rows[first:last, 1]) & self._is_heldout[first:last]
            after = np.minimum(np.arange(count) + 1, len(own) - 1)
            shares = stated_shares(own[after], own_lengths[after] * has_next, tokens, lengths, NGRAM)
            out |= shares > self.filters.leak_limit
        return out


def _say_search_cost(stage: Stage, query: Store, retriever: str, reporter: Reporter) -> None:
    search = _open_search(stage.spec, stage.paths)
    each_s = seconds_each(search.find, query.num_rows, SAMPLE_ROWS)
    seconds = each_s * query.num_rows
    reporter.confirm(
        f"searching {query.num_rows:,} chunks with {retriever} at {1 / max(each_s, 1e-9):,.0f}/s: about "
        f"{duration(seconds)}",
        seconds,
    )


def share_without_neighbors(table: NeighborTable) -> float:
    """The share of chunks whose first neighbor is missing."""
    count = 0
    for first in range(0, table.query.num_rows, BATCH_ROWS):
        rows = np.arange(first, min(first + BATCH_ROWS, table.query.num_rows))
        count += int((table.ids(rows, 1) < 0).sum())
    return count / table.query.num_rows


def describe_missing(search: Retriever) -> str:
    """What may be the reason when most chunks have no neighbor."""
    if sum(store.num_documents for store in search.stores) == 1:
        return "note: there is one document only, and its own chunks are no neighbors of it"
    read = next(index.analyzer.describe() for index in search.indexes if isinstance(index, Bm25Index))
    return (
        f"note: bm25 finds no word of theirs in another document (it reads words with {read}); where script or language "
        "is the reason, --stemmer and --stop-words read otherwise, and --retriever hash or minilm needs no common word"
    )


def say_index_cost(store: Store, retriever: str, reporter: Reporter) -> None:
    """Say what BM25 indexing will take when the index is not there, measured on a sample; embedding says it itself."""
    if retriever != "bm25" or (index_folder(store, retriever) / files.MANIFEST).exists():
        return
    terms = Analyzer().terms
    read = lambda first, last: terms([text for batch in store.texts(first, last) for text in batch])  # noqa: E731
    seconds = 2 * seconds_each(read, store.num_rows, SAMPLE_ROWS) * store.num_rows  # it is half of indexing
    reporter.confirm(
        f"indexing {store.num_rows:,} chunks of {store.folder} for {retriever}: about {duration(seconds)}", seconds
    )


def _own_document_rows(store: Store) -> np.ndarray:
    """[rows, 2]: the first row of each row's document, and one past its last."""
    first = store.documents[:, 0]
    end = np.append(first[1:], store.num_rows)
    return np.repeat(np.stack((first, end), 1), end - first, 0)
