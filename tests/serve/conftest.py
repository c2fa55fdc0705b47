"""One run and one server for the tests that leave the server as it was."""

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from reader_helpers import base as base
from reader_helpers import reader_folder as reader_folder
from reader_helpers import reader_run as reader_run
from serve_helpers import Server, serving_run
from serve_helpers import small_run as small_run


@pytest.fixture(scope="session")
def server(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving_run(small_run, tmp_path_factory.mktemp("served"), has_nemo=True) as server:
        yield server
