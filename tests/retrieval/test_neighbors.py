"""Filling the table: same-document filter, several databases, reproducible, refused when it is there."""

from pathlib import Path

import numpy as np
import pytest
from helpers import write_corpus

from retro_engine.data.prepare import prepare
from retro_engine.data.store import Store
from retro_engine.errors import UsageError
from retro_engine.progress import Reporter
from retro_engine.retrieval.neighbors import build_neighbors


@pytest.mark.parametrize("retriever", ["bm25", "hash"])
def test_no_neighbor_is_of_the_own_document(small_store: Store, retriever: str) -> None:
    table = build_neighbors(small_store, [small_store], retriever, 8, name=f"own-{retriever}")
    ids = table.ids(np.arange(small_store.num_rows), 8)
    document = small_store.row_documents()
    for row in range(small_store.num_rows):
        found = ids[row][ids[row] >= 0]
        assert not (document[found] == document[row]).any()
    assert (ids[:, 0] >= 0).mean() > 0.9


def test_several_databases_and_reproducible_bytes(small_store: Store, tmp_path: Path) -> None:
    other = prepare(
        [write_corpus(tmp_path / "c.jsonl", 10, seed=3)], tmp_path / "s", str(small_store.folder), chunk_size=16
    )
    tables = [build_neighbors(other, [small_store, other], num_neighbors=4, name=name) for name in ("x", "y")]
    ids = tables[0].ids(np.arange(other.num_rows), 4)
    assert ids.max() < small_store.num_rows + other.num_rows
    first = [(t.folder / name).read_bytes() for t in tables for name in t.manifest["files"]]
    assert first[0] == first[1]
    document = other.row_documents()
    for row in range(other.num_rows):
        own = ids[row][ids[row] >= small_store.num_rows] - small_store.num_rows
        assert not (document[own] == document[row]).any()


def test_cost_is_said_and_a_table_is_not_written_over(small_store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    build_neighbors(small_store, [small_store], "bm25", 2, name="once", reporter=Reporter("text"))
    said = capsys.readouterr().err
    assert "searching" in said
    assert "chunks with bm25 at" in said
    with pytest.raises(UsageError, match="never changes"):
        build_neighbors(small_store, [small_store], "bm25", 2, name="once")
    with pytest.raises(UsageError, match="--k 0"):
        build_neighbors(small_store, [small_store], "bm25", 0, name="zero")
