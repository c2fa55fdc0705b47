"""What only a checkout of the repository has, in its benchmarks/: benches of whole parts, and the rivals' wrappers."""

import importlib
import sys
from types import ModuleType

from retro_engine.bench.machine import ROOT

FOLDER = ROOT / "benchmarks"
IS_HERE = (ROOT / "pyproject.toml").is_file()


def benches() -> list[str]:
    return sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py")) if IS_HERE else []


def load(name: str) -> ModuleType:
    """A module of benchmarks/, which may use what the tests share."""
    for folder in (str(ROOT / "tests"), str(FOLDER)):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    return importlib.import_module(name)
