"""The quality report of a table, against what is known of a table made for it."""

from pathlib import Path

import numpy as np
import pytest

from retro_engine.data.corpus import Document
from retro_engine.data.neighbor_table import NeighborTable, find_table
from retro_engine.data.store import Store, StoreWriter
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.retrieval.quality import describe_quality, quality
from tests.helpers import table_of


def test_copies_and_strangers(tmp_path: Path) -> None:
    """Neighbors that are copies have similarity and overlap 1, strangers 0, missing ones do not count."""
    writer = StoreWriter(tmp_path / "s", Tokenizer.train(["x"], 300), 16)
    for number in range(6):
        writer.add(Document(str(number), "", "x", "f"), list(range(10 + 40 * (number // 2), 41 + 40 * (number // 2))))
    store = writer.close()  # documents 0 and 1, 2 and 3, 4 and 5 are equal; two rows each
    twin = [2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9]
    ids = np.array([[twin[row], (row + 4) % 12 if row % 4 < 2 else -1] for row in range(12)])
    report = quality(table_of(store, [store], ids))
    assert report["sampled_chunks"] == 12
    assert report["share_missing"] == pytest.approx(6 / 24)
    assert report["share_without_neighbors"] == 0
    assert report["neighbors_a_chunk"] == 1.5
    assert report["own_overlap"][9] == 12, "the copies"
    assert report["own_overlap"][0] == 6, "the strangers"
    assert report["similarity"][9] == 12
    assert sum(report["similarity"]) == 18
    assert sum(report["next_overlap"]) == 9, "first rows only: nothing follows the second"
    assert report["next_overlap"][9] == 6
    text = "\n".join(describe_quality(report))
    assert "25.0% of the neighbors missing" in text
    assert "own overlap: mean 0.667" in text
    assert "WARNING: 66.7% of the neighbors state nine tenths of the next chunk" in text


def test_the_report_of_a_real_table_is_reproducible(small_store: Store) -> None:
    table = NeighborTable(find_table(small_store, "bm25"), small_store)
    assert quality(table, 50) == quality(table, 50)
    assert quality(table, 50)["mean_similarity"] > 0.05
