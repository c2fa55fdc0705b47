"""A store and a run that the commands themselves made, for all tests of the command line."""

from pathlib import Path

import pytest
from cli_helpers import TINY, run
from helpers import write_corpus
from reader_helpers import base as base
from reader_helpers import reader_folder as reader_folder
from reader_helpers import reader_run as reader_run


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, its store and table, and a run of 4 steps, made by the commands themselves."""
    folder = tmp_path_factory.mktemp("work")
    write_corpus(folder / "corpus.jsonl", 30)
    assert (
        run("prepare", folder / "corpus.jsonl", "--out", folder / "store", "--vocab-size", 300, "--chunk-size", 16) == 0
    )
    assert run("build", folder / "store", "--k", 6) == 0
    assert run("train", "--preset", "tiny", "--out", folder / "run", f"model.data.store={folder}/store", *TINY) == 0
    return folder
