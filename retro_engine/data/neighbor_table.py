"""The neighbor table: for every chunk of a query store, the K nearest chunks of its database stores.

Ids count through the databases in order; -1 = missing. The table carries the fingerprints of both sides, so
seed, sequence length, batch size and k <= K change without another query.
Reads and writes TABLE/manifest.json and ids-NNNNN.bin (docs/formats.md).
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retro_engine.data import files
from retro_engine.data.array_file import ArrayFile
from retro_engine.data.store import Store
from retro_engine.errors import MissingInputError, StoreError, UsageError


def ids_name(number: int) -> str:
    return f"ids-{number:05d}.bin"


def publish_table(
    folder: Path,
    query: Store,
    databases: Sequence[Store],
    num_neighbors: int,
    retriever: dict[str, Any],
    hashes: dict[str, str],
) -> "NeighborTable":
    """Write the manifest over files of ids that are published (name -> SHA-256)."""
    content = {
        "num_neighbors": num_neighbors,
        "rows": query.num_rows,
        "query": query.fingerprint,
        "databases": [
            {
                "fingerprint": store.fingerprint,
                "rows": store.num_rows,
                "path": os.path.relpath(store.folder.resolve(), folder.resolve()),
            }
            for store in databases
        ],
        "retriever": retriever,
        "files": hashes,
    }
    files.write_manifest(folder, "neighbors", content)
    return NeighborTable(folder, query)


class NeighborTable:
    """A published table, opened for its query store and with its database stores."""

    def __init__(self, folder: str | Path, query: Store):
        """Raises StoreError, naming both sides, when the table or a database is of another store, and when a database's
        ids or chunks are not those of `query`.
        """
        self.folder, self.query = Path(folder), query
        self.manifest = files.read_manifest(self.folder, "neighbors")
        m = self.manifest
        query.check_mark(m["query"], f"{self.folder} is a table of store", f"retro build {query.folder}")
        self.num_neighbors: int = m["num_neighbors"]
        self.fingerprint: str = m["fingerprint"]
        self.databases = [self._database(entry) for entry in m["databases"]]
        query.coding.check(*(database.coding for database in self.databases))
        self.num_rows = sum(store.num_rows for store in self.databases)
        if m["rows"] != query.num_rows or self.num_rows != sum(entry["rows"] for entry in m["databases"]):
            raise StoreError(
                f"{self.folder} contradicts itself", "its rows are not its stores'", "retro neighbors again"
            )
        self._shards = [
            ArrayFile(files.child(self.folder, name), "neighbors", query.fingerprint) for name in sorted(m["files"])
        ]
        rows = sum(shard.values.shape[0] for shard in self._shards)
        if rows != query.num_rows or any(s.values.shape[1] != self.num_neighbors for s in self._shards):
            raise StoreError(
                f"{self.folder} has {rows} rows", f"its store has {query.num_rows}", "retro neighbors again"
            )
        self._starts = np.cumsum([0] + [shard.values.shape[0] for shard in self._shards])

    def _database(self, entry: dict[str, Any]) -> Store:
        if entry["fingerprint"] == self.query.fingerprint:
            return self.query
        store = Store((self.folder / entry["path"]).resolve())
        store.check_mark(entry["fingerprint"], f"{self.folder} has neighbors from store", "retro neighbors again")
        return store

    def ids(self, rows: np.ndarray, k: int) -> np.ndarray:
        """The first k neighbor ids of each row, [..., k]. Raises UsageError for k > K."""
        if not 1 <= k <= self.num_neighbors:
            raise UsageError(
                f"k={k} neighbors were asked for",
                f"{self.folder} holds {self.num_neighbors} a chunk",
                f"retro neighbors --k {max(k, 1)} makes a wider table",
            )
        flat = np.asarray(rows, np.int64).reshape(-1)
        out = np.empty((len(flat), k), np.int64)
        shard_of = np.searchsorted(self._starts, flat, "right") - 1
        for number in np.unique(shard_of):
            chosen = shard_of == number
            local = flat[chosen] - self._starts[number]
            shard = self._shards[number]
            shard.check_rows(local)
            out[chosen] = shard.values[local, :k]
        if out.size and (out.min() < -1 or out.max() >= self.num_rows):
            raise StoreError(
                f"{self.folder} holds neighbor id {out.max()}",
                f"the databases have {self.num_rows} chunks",
                "retro neighbors again",
            )
        return out.reshape(*np.shape(rows), k)

    def locate(self, chunk: int) -> tuple[Store, int]:
        """The database store of a neighbor id and its row there."""
        for store in self.databases:
            if chunk < store.num_rows:
                return store, chunk
            chunk -= store.num_rows
        raise StoreError(f"neighbor id {chunk} is outside the databases", f"they have {self.num_rows} chunks")

    def verify(self) -> None:
        files.verify_files(self.folder, self.manifest["files"])

    def summary(self) -> dict[str, Any]:
        m = self.manifest
        return {
            "kind": "neighbors",
            **{key: m[key] for key in ("rows", "num_neighbors", "query", "databases", "retriever", "fingerprint")},
        }


def refuse_existing(folder: Path) -> None:
    """Raise UsageError when `folder` holds a published table."""
    if (folder / files.MANIFEST).exists():
        raise UsageError(
            f"{folder} holds a neighbor table",
            "a published table never changes",
            f"choose another --name, or rm -r {folder}",
        )


def check_databases(databases: Sequence[Store], query: Store | None = None) -> None:
    """Raise UsageError when a store is named twice: its chunks would be two neighbors; StoreError when the ids or chunks
    of one are not those of `query`, whose model will read them.
    """
    if query is not None:
        query.coding.check(*(database.coding for database in databases))
    marks = [store.fingerprint for store in databases]
    for number, store in enumerate(databases):
        if store.fingerprint in marks[:number]:
            raise UsageError(
                f"{store.folder} is named twice", "the same store is among the databases already", "name it once"
            )


def find_table(store: Store, name: str | None) -> Path:
    """The folder of a table: a path, a name under STORE/neighbors/, or the only table there is.

    Raises MissingInputError when there is none, UsageError when there are several and none is named.
    """
    base = store.folder / "neighbors"
    if name is not None:
        for candidate in (base / name, Path(name)):
            if (candidate / files.MANIFEST).is_file():
                return candidate
        raise MissingInputError(
            f"neighbor table {name} does not exist", f"neither a folder nor under {base}", f"retro build {store.folder}"
        )
    found = sorted(path.parent for path in base.glob(f"*/{files.MANIFEST}"))
    if not found:
        raise MissingInputError(f"{store.folder} has no neighbor table", "", f"retro build {store.folder}")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UsageError(
            f"{store.folder} has {len(found)} neighbor tables: {names}", "", "name one: model.data.neighbors=NAME"
        )
    return found[0]


def table_name(table: NeighborTable) -> str:
    """What `find_table` finds the table by: its name under its store, or its folder."""
    is_own = table.folder.resolve().parent == (table.query.folder / "neighbors").resolve()
    return table.folder.name if is_own else str(table.folder.resolve())
