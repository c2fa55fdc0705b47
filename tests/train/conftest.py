"""The run that many tests look at, resume or damage a copy of."""

from pathlib import Path

import pytest
from training_helpers import config

from retro_engine.data.store import Store
from retro_engine.progress import Reporter
from retro_engine.train.loop import train


@pytest.fixture(scope="session")
def whole(small_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps without interruption."""
    out = tmp_path_factory.mktemp("run") / "whole"
    result = train(config(small_store, out), Reporter("quiet"))
    assert (result.step, result.exit_code) == (12, 0)
    return out
