"""Mapped files: their bytes, without a descriptor."""

import os
from pathlib import Path

import numpy as np
import pytest

from retro_engine.data.files import open_file
from retro_engine.data.mapping import map_bytes


def test_the_bytes_stay_when_the_file_is_closed_and_removed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(256)) * 40)
    before = len(os.listdir("/proc/self/fd"))
    with open_file(tmp_path / "a") as file:
        values = map_bytes(file, 10_240)
    assert len(os.listdir("/proc/self/fd")) == before
    (tmp_path / "a").unlink()
    part = values[300:].view("<u2")
    del values
    np.testing.assert_array_equal(part.view(np.uint8), np.frombuffer(bytes(range(256)) * 40, np.uint8)[300:])
    with pytest.raises(ValueError, match="read-only"):
        part[0] = 1


def test_a_mapping_ends_with_the_last_array_of_it(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100_000)
    with open_file(tmp_path / "a") as file:
        part = map_bytes(file, 100_000)[5:9]
    is_mapped = lambda: str(tmp_path / "a") in Path("/proc/self/maps").read_text()  # noqa: E731
    assert is_mapped()
    del part
    assert not is_mapped()


def test_nothing_and_too_much(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with open_file(tmp_path / "a") as file:
        assert map_bytes(file, 0).shape == (0,)
        with pytest.raises(OSError, match="0 bytes, and 1 are"):
            map_bytes(file, 1)
