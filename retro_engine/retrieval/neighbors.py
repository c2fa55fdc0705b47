"""`retro neighbors`: fills a neighbor table, chunk by chunk, leaving out the chunk's own document."""

import time
from collections.abc import Sequence

import numpy as np

from retro_engine.data import files
from retro_engine.data.neighbor_table import NeighborTable, NeighborTableWriter, refuse_existing
from retro_engine.data.store import Store
from retro_engine.errors import UsageError
from retro_engine.progress import Reporter
from retro_engine.retrieval.embed import embed
from retro_engine.retrieval.lexical import terms_of
from retro_engine.retrieval.search import Retriever, check_retriever, index_folder

BATCH_ROWS = 8192
SAMPLE_ROWS = 256


def build_neighbors(
    query: Store,
    databases: Sequence[Store],
    retriever: str = "bm25",
    num_neighbors: int = 20,
    name: str | None = None,
    reporter: Reporter | None = None,
    merge_overlaps: bool = True,
) -> NeighborTable:
    """Publish QUERY/neighbors/NAME: the `num_neighbors` best chunks of `databases` for every chunk of `query`.

    Neighbors from the chunk's own document are never kept; `merge_overlaps` (for r > m) keeps no two that overlap.
    Prints what the search will cost, measured on a
    sample, before it starts. Raises UsageError for a table that exists, StoreError for stores that do not fit.
    """
    reporter = reporter or Reporter("quiet")
    if num_neighbors < 1:
        raise UsageError(f"--k {num_neighbors} cannot be used", "a table holds at least one neighbor a chunk")
    folder = query.folder / "neighbors" / (name or retriever)
    refuse_existing(folder)
    check_retriever(retriever)
    with files.locked(folder):
        for database in databases:
            say_index_cost(database, retriever, reporter)
        search = Retriever(databases, retriever, merge_overlaps)
        writer = NeighborTableWriter(
            folder,
            query,
            databases,
            num_neighbors,
            {"name": retriever, "fingerprint": search.fingerprint, "merge_overlaps": merge_overlaps},
        )
        own_rows = _own_document_rows(query)

        def find(first: int, last: int) -> np.ndarray:
            exclude = [own_rows[first:last] if db.fingerprint == query.fingerprint else None for db in databases]
            return search.search_rows(query, first, last, num_neighbors, exclude)[0]

        sample = min(SAMPLE_ROWS, query.num_rows)
        middle = (query.num_rows - sample) // 2
        find(middle, middle + min(4, sample))  # compiles the search loop
        start = time.monotonic()
        find(middle, middle + sample)
        each_s = (time.monotonic() - start) / sample
        seconds = each_s * query.num_rows
        reporter.confirm(
            f"searching {query.num_rows:,} chunks with {retriever} at {1 / max(each_s, 1e-9):,.0f}/s: about {_duration(seconds)}",
            seconds,
        )
        pending: list[np.ndarray] = []
        with reporter.progress("neighbors", query.num_rows, "chunks") as meter:
            for first in range(0, query.num_rows, BATCH_ROWS):
                last = min(first + BATCH_ROWS, query.num_rows)
                pending.append(find(first, last))
                meter.advance(last - first)
                if len(pending) == 32:  # one shard of the table
                    writer.write(np.concatenate(pending))
                    pending = []
        if pending:
            writer.write(np.concatenate(pending))
        table = writer.close()
    missing = share_without_neighbors(table)
    reporter.say(f"{missing:.1%} of the chunks have no neighbor from another document")
    return table


def share_without_neighbors(table: NeighborTable) -> float:
    """The share of chunks whose first neighbor is missing."""
    count = 0
    for first in range(0, table.query.num_rows, BATCH_ROWS):
        rows = np.arange(first, min(first + BATCH_ROWS, table.query.num_rows))
        count += int((table.ids(rows, 1) < 0).sum())
    return count / table.query.num_rows


def say_index_cost(store: Store, retriever: str, reporter: Reporter) -> None:
    """Say what indexing will take when the index is not there, measured on a sample of the chunks."""
    if (index_folder(store, retriever) / files.MANIFEST).exists():
        return
    sample = min(SAMPLE_ROWS, store.num_rows)
    start = time.monotonic()
    if retriever == "bm25":
        terms_of([text for batch in store.texts(0, sample) for text in batch])
        start = time.monotonic()  # the first call loads the libraries
        terms_of([text for batch in store.texts(0, sample) for text in batch])
    else:
        embed(*store.rows(0, sample))
    seconds = 1.5 * (time.monotonic() - start) / sample * store.num_rows  # reading terms is two thirds of indexing
    reporter.confirm(
        f"indexing {store.num_rows:,} chunks of {store.folder} for {retriever}: about {_duration(seconds)}", seconds
    )


def _own_document_rows(store: Store) -> np.ndarray:
    """[rows, 2]: the first row of each row's document, and one past its last."""
    first = store.documents[:, 0]
    end = np.append(first[1:], store.num_rows)
    return np.repeat(np.stack((first, end), 1), end - first, 0)


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
