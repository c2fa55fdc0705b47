"""Where the data of a run lie: a run is used from any folder, also when it was moved, with its stores or without.

A run writes absolute paths into its config.yaml. They are looked for as they are; as far from the run as they were when it
was trained (earlier runs wrote what was typed: the same holds while both were relative); and under the folders that
RETRO_STORES lists. A store counts as found when it is the one that was trained on.
"""

import os
from collections.abc import Collection
from copy import deepcopy
from pathlib import Path
from typing import Any

from retro_engine.config import Config, flat_keys
from retro_engine.config.yaml_file import read_yaml
from retro_engine.data import files
from retro_engine.errors import MissingInputError, RetroError, StoreError

VARIABLE = "RETRO_STORES"
STORES = ("store", "valid_store")
TABLES = ("neighbors", "valid_neighbors")  # a name under its store, or a folder
QUESTIONS = ("questions", "valid_questions")
ALL = (*STORES, *TABLES, *QUESTIONS)
READ = ("store", "neighbors")  # by commands that retrieve for a run


def with_absolute_paths(config: Config) -> Config:
    """A copy whose paths do not depend on the working folder."""
    settled = deepcopy(config)
    data, manager = settled.model.data, settled.exp_manager
    for name in ALL:
        value = getattr(data, name)
        if value is not None and not (name in TABLES and os.sep not in value):
            setattr(data, name, os.path.abspath(value))
    if data.blend is not None:
        data.blend = [os.path.abspath(word) if number % 2 else word for number, word in enumerate(data.blend)]
    if manager.exp_dir is not None:
        manager.exp_dir = os.path.abspath(manager.exp_dir)
    return settled


def located(
    run: Path, settings: Path, asked: set[str], trained: dict[str, Any], needed: Collection[str], is_strict: bool
) -> dict[str, str]:
    """The paths in a run's settings, as they are found now, by key; those that are `asked` for otherwise are left out.

    `trained`: fingerprints of what the run was trained with, by name. Raises MissingInputError, naming every place that
    was looked at, for one of `needed` that is not there; with `is_strict` StoreError where there is another in its place.
    """
    values = flat_keys(read_yaml(settings))
    found = {}
    for name in ALL:
        key = f"model.data.{name}"
        value = values.get(key)
        is_table_name = name in TABLES and os.sep not in str(value)
        if not isinstance(value, str) or key in asked or is_table_name:
            continue
        places = _places(value, run, values.get("exp_manager.exp_dir"))
        mark = trained.get(name) if name not in TABLES else None
        is_there = Path.is_file if name in QUESTIONS else _is_published
        place = _choose(name, [path for path in places if is_there(path)], places, mark, is_strict)
        if place is not None:
            found[key] = str(place)
        elif name in needed:
            raise MissingInputError(
                f"{key}={value} of the run is not there",
                f"looked at {', '.join(f'{path}{_other(name, path)}' for path in places)}",
                _advice(key, is_strict),
            )
    return found


def _advice(key: str, is_strict: bool) -> str:
    """What the commands that evaluate a run take, and those that read its stores."""
    named = f"{key}=PATH" if is_strict else f"--stores STORE (retro eval: {key}=PATH)"
    return f"{VARIABLE}=FOLDER names the folders to look in (with {os.pathsep} between them), or {named}"


def _other(name: str, path: Path) -> str:
    is_there = path.is_file() if name in QUESTIONS else _is_published(path)
    return " (another one)" if is_there else ""


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


def _choose(name: str, there: list[Path], places: list[Path], mark: Any, is_strict: bool) -> Path | None:
    """The place that has what the run was trained on. Without a mark of that, one of its name; with another mark only the
    place that the run names, rebuilt since, and not where a run is evaluated.
    """
    if mark is None:  # of earlier versions, or a table
        return next((path for path in there if path.name == places[0].name), None)
    marks = {path: _fingerprint(name, path) for path in there}
    right = next((path for wanted in (mark, None) for path in there if marks[path] == wanted), None)
    if right is not None or not there:
        return right
    if is_strict:
        what = "file" if name in QUESTIONS else "store"
        how = "trained on" if name in ("store", "questions") else "validated on"
        other = "other documents would be held out" if name == "store" else "its figures would be of something else"
        why = f"it is {marks[there[0]][:12]}, the run's is {mark[:12]}: {other}"
        raise StoreError(
            f"{there[0]} is not the {what} that the run was {how}", why, _advice(f"model.data.{name}", is_strict)
        )
    return places[0] if places[0] in there else None


def _fingerprint(name: str, path: Path) -> Any:
    """None where it cannot be read: opening it says why."""
    try:
        if name in QUESTIONS:
            return files.sha256_file(path)
        return files.read_manifest(path, "store")["fingerprint"]
    except (RetroError, OSError):
        return None
