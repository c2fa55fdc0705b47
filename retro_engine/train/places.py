"""Where the data of a run lie: a run is used from any folder, also when it was moved, with its stores or without.

A run writes absolute paths into its config.yaml. They are looked for as they are; as far from the run as they were when it
was trained (earlier runs wrote what was typed: the same holds while both were relative); and under the folders that
RETRO_STORES lists. A store counts as found when it is the one that was trained on.
"""

import os
from copy import deepcopy
from pathlib import Path
from typing import Any

from retro_engine.config import Config, flat_keys
from retro_engine.data import files
from retro_engine.errors import MissingInputError, RetroError, StoreError
from retro_engine.yaml_file import read_yaml

VARIABLE = "RETRO_STORES"
STORES = ("store", "valid_store")
TABLES = ("neighbors", "valid_neighbors")  # a name under its store, or a folder
QUESTIONS = ("questions", "valid_questions")


def with_absolute_paths(config: Config) -> Config:
    """A copy whose paths do not depend on the working folder."""
    settled = deepcopy(config)
    data, manager = settled.model.data, settled.exp_manager
    for name in (*STORES, *TABLES, *QUESTIONS):
        value = getattr(data, name)
        if value is not None and not (name in TABLES and os.sep not in value):
            setattr(data, name, os.path.abspath(value))
    if manager.exp_dir is not None:
        manager.exp_dir = os.path.abspath(manager.exp_dir)
    return settled


def located(run: Path, settings: Path, asked: set[str], trained: dict[str, Any], is_strict: bool) -> dict[str, str]:
    """The paths in a run's settings, as they are found now, by key; those that are `asked` for otherwise are left out.

    `trained`: fingerprints of what the run was trained with. Raises MissingInputError naming every place that was looked
    at; with `is_strict` StoreError where there is another store in its place.
    """
    values = flat_keys(read_yaml(settings))
    found = {}
    for name in (*STORES, *TABLES, *QUESTIONS):
        key = f"model.data.{name}"
        value = values.get(key)
        is_table_name = name in TABLES and os.sep not in str(value)
        if not isinstance(value, str) or key in asked or is_table_name:
            continue
        places = _places(value, run, values.get("exp_manager.exp_dir"))
        mark = trained.get("store") if name == "store" else None
        is_there = Path.is_file if name in QUESTIONS else _is_published
        found[key] = str(_choose(key, value, [path for path in places if is_there(path)], places, mark, is_strict))
    return found


def _places(value: str, run: Path, run_then: Any) -> list[Path]:
    """Where something may lie that a run names `value`, the likeliest first."""
    places = [Path(value)]
    if isinstance(run_then, str) and os.path.isabs(value) == os.path.isabs(run_then):
        places.append(Path(os.path.normpath(run.resolve() / os.path.relpath(value, run_then))))
    for folder in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        if not os.path.isabs(value):
            places.append(Path(folder) / value)
        places += [Path(folder) / Path(value).name, Path(folder)]
    return list(dict.fromkeys(places))


def _is_published(folder: Path) -> bool:
    return (folder / files.MANIFEST).is_file()


def _choose(key: str, value: str, there: list[Path], places: list[Path], mark: Any, is_strict: bool) -> Path:
    """The place that has what the run was trained on, else the first that has anything."""
    do = f"{VARIABLE}=FOLDER names the folders to look in (with {os.pathsep} between them), or {key}=PATH"
    if not there:
        looked = ", ".join(map(str, places))
        raise MissingInputError(f"{key}={value} of the run is not there", f"looked at {looked}", do)
    right = next((path for path in there if mark is None or _fingerprint(path) in (mark, None)), None)
    if right is None and is_strict:
        why = f"it is {_fingerprint(there[0])[:12]}, the run's is {mark[:12]}: other documents would be held out"
        raise StoreError(f"{there[0]} is not the store that the run was trained on", why, do)
    return right or there[0]


def _fingerprint(folder: Path) -> Any:
    """None where it cannot be read: opening it says why."""
    try:
        return files.read_manifest(folder, "store")["fingerprint"]
    except RetroError:
        return None
