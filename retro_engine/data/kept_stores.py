"""Stores in temporary folders, which are gone when nobody holds them any more; and how a run keeps them beside itself.

RUN/store is the store that a run is trained on, with its index and tables; RUN/store-1 ... are the others that its neighbors
come from.
"""

import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

from retro_engine.data import files
from retro_engine.data.neighbor_table import NeighborTable, publish_table
from retro_engine.data.store import Store
from retro_engine.errors import UsageError

_PREFIX = "retro-store-"
KEPT = "store"


def temporary_folder() -> tuple[Path, Any]:
    """A folder for a store, and what holds it: `hold` it while the store is used."""
    holder = tempfile.TemporaryDirectory(prefix=_PREFIX)
    return Path(holder.name) / KEPT, holder


def hold(store: Store, holder: Any) -> None:
    """Remove a temporary folder when its store is used no more, and at exit."""
    weakref.finalize(store, holder.cleanup)


def is_temporary(store: Store) -> bool:
    return store.folder.parent.name.startswith(_PREFIX)


def keep(store: Store, table: NeighborTable, run: Path) -> tuple[Path, Path]:
    """Folders of the store and the table that last as long as the run's: their own, or copies beside it.

    Raises UsageError where the run's folder keeps other documents.
    """
    kept = _keep(store, run / KEPT) if is_temporary(store) else store
    if kept is store:
        return store.folder, table.folder
    place = kept.folder / "neighbors" / table.folder.name
    if _ids_of(files.read_manifest(place, "neighbors")) != _ids_of(table.manifest):
        why = "a run is of the neighbors that it began with"
        raise UsageError(f"{place} holds other neighbors", why, f"choose another out=, or rm -r {run}")
    others = [database for database in table.databases if database.fingerprint != store.fingerprint]
    if not others:
        return kept.folder, place
    databases = []
    for database in table.databases:
        if database.fingerprint == store.fingerprint:
            databases.append(kept)
        else:
            number = others.index(database) + 1
            databases.append(_keep(database, run / f"{KEPT}-{number}") if is_temporary(database) else database)
    m = table.manifest
    (place / files.MANIFEST).unlink()  # it has the places of the others
    publish_table(
        place, kept, databases=databases, num_neighbors=table.num_neighbors, retriever=m["retriever"], hashes=m["files"]
    )
    return kept.folder, place


def _ids_of(manifest: dict[str, Any]) -> tuple[Any, ...]:
    """What a table says, wherever its stores lie."""
    databases = [entry["fingerprint"] for entry in manifest["databases"]]
    return databases, *(manifest[key] for key in ("num_neighbors", "query", "retriever", "files"))


def _keep(store: Store, place: Path) -> Store:
    """The store at `place`: a copy, or one that is there already, with the indexes and tables that it did not have."""
    if (place / files.MANIFEST).is_file():
        there = Store(place)
        if there.fingerprint != store.fingerprint:
            why = "a run is of the documents that it began with"
            raise UsageError(f"{place} holds other documents", why, f"choose another out=, or rm -r {place.parent}")
        for part in ("index", "embeddings", "neighbors"):
            for made in sorted((store.folder / part).glob(f"*/{files.MANIFEST}")):
                if not (place / part / made.parent.name / files.MANIFEST).is_file():
                    _copy(made.parent, place / part / made.parent.name)
        return there
    _copy(store.folder, place)
    return Store(place)


def _copy(source: Path, target: Path) -> None:
    with files.publish_folder(target) as aside:
        shutil.copytree(source, aside, dirs_exist_ok=True, copy_function=_linked, ignore=_passing)


def _passing(folder: str, names: list[str]) -> set[str]:
    """Locks, and what a killed writer left."""
    return {name for name in names if name.startswith(".")}


def _linked(source: str, target: str) -> None:
    """The same file under another name, for what is published never changes; a copy on another disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
