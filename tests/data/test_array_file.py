"""The array file: every damage found before a value is used, and no descriptor kept."""

import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from retro_engine.data import array_file, files
from retro_engine.data.array_file import ArrayFile
from retro_engine.errors import StoreError

PARENT = "ab" * 32


@pytest.fixture
def array(tmp_path: Path) -> tuple[Path, np.ndarray]:
    values = np.random.default_rng(0).integers(0, 65536, (5000, 64)).astype(np.uint16)
    array_file.write_array(tmp_path / "a.bin", "tokens", values, PARENT)
    return tmp_path / "a.bin", values


@pytest.mark.parametrize("dtype", array_file.DTYPES.values())
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (3, 0), (17, 5), (300_000, 2)])
def test_round_trip(tmp_path: Path, dtype: type, shape: tuple[int, int]) -> None:
    values = np.random.default_rng(1).integers(0, 100, shape).astype(dtype)
    digest = array_file.write_array(tmp_path / "a.bin", "kind", values, PARENT)
    assert digest == files.sha256_file(tmp_path / "a.bin")
    found = ArrayFile(tmp_path / "a.bin", "kind", PARENT).checked()
    assert found.shape == shape
    np.testing.assert_array_equal(found, values)
    assert not os.stat(tmp_path / "a.bin").st_mode & 0o222, "a published file is read-only"


def test_same_values_same_bytes(tmp_path: Path) -> None:
    values = np.arange(1000, dtype=np.uint32).reshape(10, 100)
    for name in ("a", "b"):
        array_file.write_array(tmp_path / name, "tokens", values, PARENT)
    array_file.write_array(tmp_path / "c", "tokens", np.asfortranarray(values), PARENT)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


@pytest.mark.parametrize("keep", [0, 1, 127, 128, 129, 4000, -5, -1])
def test_truncated(array: tuple[Path, np.ndarray], keep: int) -> None:
    path, _ = array
    raw = path.read_bytes()
    path.unlink()
    path.write_bytes(raw[:keep])
    with pytest.raises(StoreError):
        ArrayFile(path, "tokens", PARENT)


def test_longer(array: tuple[Path, np.ndarray]) -> None:
    path, _ = array
    raw = path.read_bytes()
    path.unlink()
    path.write_bytes(raw + b"\0")
    with pytest.raises(StoreError, match="its header says"):
        ArrayFile(path, "tokens", PARENT)


def test_every_bit_flip_is_found(array: tuple[Path, np.ndarray]) -> None:
    """Each flipped bit is an error at open or at first touch; never a wrong value."""
    path, values = array
    raw = bytearray(path.read_bytes())
    path.chmod(0o644)
    rng = random.Random(0)
    places = [
        *range(128),
        *(rng.randrange(len(raw)) for _ in range(10_000 if os.environ.get("RETRO_CAMPAIGN") else 400)),
    ]
    for place in places:
        raw[place] ^= 1 << rng.randrange(8)
        path.write_bytes(raw)
        with pytest.raises(StoreError):
            ArrayFile(path, "tokens", PARENT).checked()
        raw = bytearray(files_bytes(values, path))


def files_bytes(values: np.ndarray, path: Path) -> bytes:
    other = path.with_name("whole.bin")
    if not other.exists():
        array_file.write_array(other, "tokens", values, PARENT)
    return other.read_bytes()


def test_a_damaged_block_is_found_when_it_is_touched(array: tuple[Path, np.ndarray]) -> None:
    path, _ = array
    raw = bytearray(path.read_bytes())
    path.chmod(0o644)
    raw[128 + 5000 * 128 - 3] ^= 1  # in the last row; one block holds them all here
    path.write_bytes(raw)
    opened = ArrayFile(path, "tokens", PARENT)
    with pytest.raises(StoreError, match="damaged in block 0"):
        opened.check_rows(np.array([4999]))


def test_rows_longer_than_blocks(tmp_path: Path) -> None:
    values = np.zeros((2, 4 * array_file.BLOCK), np.uint8)
    array_file.write_array(tmp_path / "a.bin", "names", values, PARENT)
    raw = bytearray((tmp_path / "a.bin").read_bytes())
    raw[128 + 6 * array_file.BLOCK] = 1  # inside the second row
    (tmp_path / "a.bin").unlink()
    (tmp_path / "a.bin").write_bytes(raw)
    opened = ArrayFile(tmp_path / "a.bin", "names", PARENT)
    opened.check_rows(np.array([0]))
    with pytest.raises(StoreError, match="damaged in block 6"):
        opened.check_rows(np.array([1]))


def test_foreign_newer_and_mixed_up(array: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    path, values = array
    with pytest.raises(StoreError, match="holds 'tokens'"):
        ArrayFile(path, "lengths", PARENT)
    with pytest.raises(StoreError, match="was made from abababababab"):
        ArrayFile(path, "tokens", "cd" * 32)
    with pytest.raises(StoreError, match="is missing"):
        ArrayFile(tmp_path / "no.bin", "tokens")
    (tmp_path / "foreign").write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(StoreError, match="not a retro-engine array"):
        ArrayFile(tmp_path / "foreign", "tokens")
    newer = bytearray(path.read_bytes())
    newer[8] = 2
    newer[124:128] = struct.pack("<I", zlib.crc32(newer[:124]))
    (tmp_path / "newer").write_bytes(newer)
    with pytest.raises(StoreError, match="format version 2"):
        ArrayFile(tmp_path / "newer", "tokens")


def test_a_file_that_is_cut_while_it_is_open_is_said_before_its_pages_are_read(tmp_path: Path) -> None:
    """A page behind the end of a file would end the process."""
    values = np.zeros((3, array_file.BLOCK), np.uint8)
    path = tmp_path / "a.bin"
    array_file.write_array(path, "names", values, PARENT)
    opened = ArrayFile(path, "names", PARENT)
    opened.check_rows(np.array([0]))
    path.chmod(0o644)
    os.truncate(path, array_file.BLOCK)
    with pytest.raises(StoreError, match="it had 3,145,868 when it was opened"):
        opened.check_rows(np.array([2]))
    with pytest.raises(StoreError, match="its header says"):
        ArrayFile(path, "names", PARENT)


def test_what_takes_a_file_s_place_changes_nothing_that_is_open(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    array_file.write_array(path, "names", np.ones((3, array_file.BLOCK), np.uint8), PARENT)
    opened = ArrayFile(path, "names", PARENT)
    array_file.write_array(path, "names", np.zeros((1, 1), np.uint8), PARENT)
    assert opened.checked().all()
    path.unlink()
    assert ArrayFile.checked(opened).all()
