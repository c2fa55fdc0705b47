"""`retro index`, `embed`, `neighbors` and `build`: flags that cannot be used."""

from pathlib import Path

import pytest
from cli_helpers import run


def test_flags_of_building_that_cannot_be_used(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {
        ("--executor", "processes!"): 2,
        ("--workers", "0"): 2,
        ("--retriever", "bm52"): 2,
        ("--retriever", "hash", "--faiss", "IVF!"): 2,
        ("--retriever", "hybrid", "--embedder", "hash", "--fusion", "-1", "1"): 2,
        ("--source-weights", "0"): 2,
        ("--near-duplicates", "1.5"): 2,
        ("--k", "0"): 2,
        ("--k", "-3"): 2,
        ("--retriever", "hash", "--stop-words", "none"): 2,
        ("--stop-words", "englisch"): 2,
    }
    for number, (flags, code) in enumerate(wrong.items()):
        assert run("neighbors", work / "store", "--name", f"no{number}", *flags) == code, flags
        assert capsys.readouterr().err.startswith("error: "), flags
    assert run("embed", work / "store", "--retriever", "bm25") == 2
    assert run("neighbors", work / "store", "--name", "wide", "--k", "10000", "--quiet") == 0
