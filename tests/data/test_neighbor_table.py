"""The neighbor table: round trip, k <= K, and tables that belong to another store."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from retro_engine.data import array_file, files
from retro_engine.data.corpus import Document
from retro_engine.data.neighbor_table import NeighborTable, check_databases, find_table, refuse_existing
from retro_engine.data.store import Store, StoreWriter
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import MissingInputError, RetroError, StoreError, UsageError
from tests.helpers import table_of

TOKENIZER = Tokenizer.train(["x"], 300)


def write(folder: Path, documents: int) -> Store:
    writer = StoreWriter(folder, TOKENIZER, 4)
    for number in range(documents):
        writer.add(Document(str(number), "", "x", "f"), [5] * (number + 1))
    return writer.close()


@pytest.fixture
def stores(tmp_path: Path) -> tuple[Store, Store]:
    return write(tmp_path / "a", 9), write(tmp_path / "b", 5)


def write_table(query: Store, databases: list[Store], K: int = 3) -> tuple[NeighborTable, np.ndarray]:
    total = sum(store.num_rows for store in databases)
    ids = np.random.default_rng(0).integers(-1, total, (query.num_rows, K))
    return table_of(query, databases, ids[:5], ids[5:]), ids


def test_round_trip(stores: tuple[Store, Store]) -> None:
    a, b = stores
    table, ids = write_table(a, [b, a])
    rows = np.array([[0, 3], [a.num_rows - 1, 7]])
    for k in (1, 2, 3):
        np.testing.assert_array_equal(table.ids(rows, k), ids[rows][..., :k])
    assert [store.folder.resolve() for store in table.databases] == [b.folder.resolve(), a.folder.resolve()]
    assert table.locate(b.num_rows) == (table.databases[1], 0)
    table.verify()
    assert find_table(a, None) == table.folder == find_table(a, "t")


def test_k_above_the_width_and_a_table_that_is_there(stores: tuple[Store, Store]) -> None:
    a, b = stores
    table, _ = write_table(a, [b])
    for k in (0, -1, 4):
        with pytest.raises(UsageError, match=f"k={k}"):
            table.ids(np.array([0]), k)
    with pytest.raises(UsageError, match="never changes"):
        refuse_existing(table.folder)


def test_an_id_outside_in_the_file_is_refused(stores: tuple[Store, Store]) -> None:
    a, b = stores
    table, ids = write_table(a, [b])
    name = next(iter(table.manifest["files"]))
    path = table.folder / name
    path.unlink()
    array_file.write_array(path, "neighbors", np.full((5, 3), b.num_rows, np.int32), a.fingerprint)
    with pytest.raises(StoreError, match=f"holds neighbor id {b.num_rows}"):
        NeighborTable(table.folder, a).ids(np.arange(4), 2)


def test_a_table_of_another_store(stores: tuple[Store, Store]) -> None:
    a, b = stores
    table, _ = write_table(a, [b])
    with pytest.raises(StoreError, match=f"of store {a.fingerprint[:12]}.*\n.*{b.fingerprint[:12]}"):
        NeighborTable(table.folder, b)
    shutil.rmtree(b.folder)
    with pytest.raises(MissingInputError, match="is not a store"):
        NeighborTable(table.folder, a)
    write(b.folder, 6)
    with pytest.raises(StoreError, match="has neighbors from store"):
        NeighborTable(table.folder, a)


def test_damage(stores: tuple[Store, Store], tmp_path: Path) -> None:
    a, b = stores
    table, _ = write_table(a, [b])
    rng = np.random.default_rng(0)
    for name in [*table.manifest["files"], "manifest.json"]:
        path = table.folder / name
        raw = path.read_bytes()
        for place in rng.integers(0, len(raw), 60):
            changed = bytearray(raw)
            changed[place] ^= 1 << int(rng.integers(8))
            path.unlink()
            path.write_bytes(changed)
            try:
                again = NeighborTable(table.folder, a)
                again.ids(np.arange(a.num_rows), 3)
                again.verify()
            except RetroError:
                continue
            assert again.manifest == table.manifest, f"bit flip at {place} of {name}"
            assert name == "manifest.json"  # white space
        path.unlink()
        path.write_bytes(raw)


def test_which_table(stores: tuple[Store, Store]) -> None:
    a, b = stores
    with pytest.raises(MissingInputError, match="has no neighbor table"):
        find_table(a, None)
    with pytest.raises(MissingInputError, match="table x does not exist"):
        find_table(a, "x")
    table, _ = write_table(a, [b])
    shutil.copytree(table.folder, table.folder.with_name("other"))
    with pytest.raises(UsageError, match="has 2 neighbor tables: other, t"):
        find_table(a, None)


def test_a_store_named_twice_and_a_linked_store(stores: tuple[Store, Store], tmp_path: Path) -> None:
    a, b = stores
    with pytest.raises(UsageError, match="named twice"):
        check_databases([b, a, b], a)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to(b.folder)
    linked = Store(tmp_path / "elsewhere" / "link")
    table, _ = write_table(a, [linked])
    assert NeighborTable(table.folder, a).databases[0].fingerprint == b.fingerprint


@pytest.mark.parametrize(("tokenizer", "chunk_size"), [(Tokenizer.train(["yz"], 300), 4), (TOKENIZER, 8)])
def test_a_database_of_other_ids_or_chunks(
    stores: tuple[Store, Store], tmp_path: Path, tokenizer: Tokenizer, chunk_size: int
) -> None:
    """Neither written nor, where an earlier version has, opened: its ids would be read as the query store's."""
    a, _ = stores
    writer = StoreWriter(tmp_path / "other", tokenizer, chunk_size)
    writer.add(Document("0", "", "x", "f"), [5, 6, 7])
    other = writer.close()
    named = (
        rf"{a.folder} has (tokenizer|chunk_size) .*\n.*{other.folder} has .*\n.*retro prepare --tokenizer {a.folder}"
    )
    with pytest.raises(StoreError, match=named):
        check_databases([a, other], a)
    folder = a.folder / "neighbors" / "before"
    folder.mkdir(parents=True)
    ids = np.zeros((a.num_rows, 1), np.int32)
    hashes = {"ids-00000.bin": array_file.write_array(folder / "ids-00000.bin", "neighbors", ids, a.fingerprint)}
    entry = {"fingerprint": other.fingerprint, "rows": other.num_rows, "path": str(other.folder.resolve())}
    content = {"num_neighbors": 1, "rows": a.num_rows, "query": a.fingerprint, "databases": [entry], "files": hashes}
    files.write_manifest(folder, "neighbors", {**content, "retriever": {"name": "bm25"}})
    with pytest.raises(StoreError, match=named):
        NeighborTable(folder, a)
