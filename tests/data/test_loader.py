"""The C++ loader and its NumPy twin: equal on everything, and no input crashes either."""

import os
import random
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_engine.data import array_file
from retro_engine.data.corpus import Document
from retro_engine.data.loader import NeighborLoader, has_native_loader
from retro_engine.data.store import PARTS, Store, StoreWriter
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import StoreError, UsageError

TOKENIZER = Tokenizer.train(["x"], 300)
needs_native = pytest.mark.skipif(not has_native_loader(), reason="the C++ loader is not built")


def write(folder: Path, lengths: list[int], m: int, shard_rows: int, seed: int = 0) -> Store:
    rng = np.random.default_rng(seed)
    writer = StoreWriter(folder, TOKENIZER, m, shard_rows)
    for number, length in enumerate(lengths):
        writer.add(Document(str(number), "", "x", "f"), rng.integers(2, TOKENIZER.vocab_size, length).tolist())
    return writer.close()


def expected(stores: list[Store], ids: list[int], R: int) -> tuple[list[list[int]], list[int]]:
    """The definition, one token at a time."""
    rows: list[tuple[int, int, list[int]]] = []  # store, document, tokens
    for s, store in enumerate(stores):
        tokens, lengths = store.rows(0, store.num_rows)
        documents = store.row_documents()
        rows += [(s, int(documents[i]), tokens[i, : lengths[i]].tolist()) for i in range(store.num_rows)]
    out, valid = [], []
    for chunk in ids:
        text: list[int] = []
        row = chunk
        while chunk >= 0 and row < len(rows) and rows[row][:2] == rows[chunk][:2] and len(text) < R:
            text += rows[row][2]
            row += 1
        text = text[:R]
        valid.append(len(text))
        out.append(text + [TOKENIZER.pad_id] * (R - len(text)))
    return out, valid


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=15), st.lists(st.integers(0, 30), min_size=0, max_size=5),
    st.integers(1, 9), st.integers(1, 25), st.integers(1, 8), st.data(),
)  # fmt: skip
def test_both_equal_the_definition(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    more: list[int],
    m: int,
    R: int,
    shard_rows: int,
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("l")
    stores = [write(folder / "a", lengths, m, shard_rows)] + ([write(folder / "b", more, m, 100, 1)] if more else [])
    total = sum(store.num_rows for store in stores)
    ids = data.draw(st.lists(st.integers(-1, total - 1), max_size=20))
    tokens, valid = expected(stores, ids, R)
    for is_native in (False, True) if has_native_loader() else (False,):
        found, found_valid = NeighborLoader(stores, is_native).gather(np.array(ids, np.int64), R)
        assert found.shape == (len(ids), R)
        assert found.tolist() == tokens, f"native={is_native}"
        assert found_valid.tolist() == valid


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write(tmp_path_factory.mktemp("s") / "store", list(range(1, 60)), 8, 50)


@pytest.mark.parametrize("is_native", [False, pytest.param(True, marks=needs_native)])
def test_ids_and_lengths_outside(store: Store, is_native: bool) -> None:
    loader = NeighborLoader([store], is_native)
    for wrong in (-2, store.num_rows, 1 << 40, -(1 << 62)):
        with pytest.raises(UsageError, match="outside 0"):
            loader.gather(np.array([0, wrong]), 8)
    with pytest.raises(UsageError, match="retrieved_length"):
        loader.gather(np.array([0]), 0)
    tokens, lengths = loader.gather(np.zeros((2, 0, 3), np.int64), 5)
    assert tokens.shape == (2, 0, 3, 5)
    assert lengths.shape == (2, 0, 3)


@pytest.mark.parametrize("is_native", [False, pytest.param(True, marks=needs_native)])
def test_tokens_go_into_a_given_array(store: Store, is_native: bool) -> None:
    loader, ids = NeighborLoader([store], is_native), np.array([3, -1, 40])
    out = np.empty((3, 12), np.int64)
    tokens, lengths = loader.gather(ids, 12, out)
    assert np.shares_memory(tokens, out)
    fresh, fresh_lengths = loader.gather(ids, 12)
    assert np.array_equal(out, fresh) and np.array_equal(lengths, fresh_lengths)
    for wrong in (np.empty((3, 11), np.int64), np.empty((2, 12), np.int64)):
        with pytest.raises(UsageError, match="out has"):
            loader.gather(ids, 12, wrong)


@needs_native
@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="Linux only")
@pytest.mark.parametrize("count", [50, 10_000])
def test_files_that_are_not_in_memory(tmp_path: Path, count: int) -> None:
    """What is read ahead changes the pace only: the same tokens cold and warm, checksums on and off."""
    folder = write(tmp_path / "store", [500] * 400, 16, 3_000).folder
    ids = np.random.default_rng(0).integers(-1, Store(folder).num_rows, count)
    expected_tokens, _ = NeighborLoader([Store(folder)], False).gather(ids, 40)
    for checks in (True, False):
        for file in folder.glob("*-*.bin"):
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
        tokens, _ = NeighborLoader([Store(folder)], True, checks_blocks=checks).gather(ids, 40)
        assert np.array_equal(tokens, expected_tokens)


def test_stores_that_do_not_go_together(store: Store, tmp_path: Path) -> None:
    other = write(tmp_path / "other", [5], 4, 50)
    with pytest.raises(StoreError, match="chunk_size 8"):
        NeighborLoader([store, other])


def test_wide_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary above 65,536 is stored as uint32."""
    monkeypatch.setattr(TOKENIZER, "vocab_size", 70_000)
    writer = StoreWriter(tmp_path / "s", TOKENIZER, 4)
    writer.add(Document("a", "", "x", "f"), [69_999, 3, 65_536])
    wide = writer.close()
    assert wide.manifest["dtype"] == "uint32"
    for is_native in (False, True) if has_native_loader() else (False,):
        tokens, _ = NeighborLoader([wide], is_native).gather(np.array([0]), 3)
        assert tokens.tolist() == [[69_999, 3, 65_536]]


@pytest.mark.parametrize("is_native", [False, pytest.param(True, marks=needs_native)])
@pytest.mark.parametrize(("part", "value", "message"), [
    ("tokens", 60_000, "token id 60000 is outside the vocabulary"), ("lengths", 9, "impossible length"), ("lengths", 0, "impossible length"),
])  # fmt: skip
def test_values_that_checksums_cannot_catch(
    store: Store, tmp_path: Path, is_native: bool, part: str, value: int, message: str
) -> None:
    """A store whose checksums are right and whose values are not: refused before any model sees them."""

    folder = tmp_path / "copy"
    shutil.copytree(store.folder, folder)
    path = folder / f"{part}-00000.bin"
    values = np.array(array_file.ArrayFile(path, part).checked())
    values[3, 0] = value
    path.unlink()
    array_file.write_array(path, part, values, store.manifest["tokenizer"])
    with pytest.raises(StoreError, match=message):
        NeighborLoader([Store(folder)], is_native).gather(np.arange(6), 16)


@needs_native
def test_damaged_files_give_errors_never_crashes(store: Store, tmp_path: Path) -> None:
    """Random damage to the files the loader maps, half of it with the header's checksum repaired."""
    folder = tmp_path / "copy"
    shutil.copytree(store.folder, folder)
    reference, _ = NeighborLoader([store], True).gather(np.arange(store.num_rows), 16)
    rng = random.Random(0)
    from retro_engine.data._loader import Loader

    paths = [[str(folder / f"{part}-{i:05d}.bin") for part in PARTS[:3]] for i in range(len(store.shards))]
    caught = 0
    for number in range(20_000 if os.environ.get("RETRO_CAMPAIGN") else 600):
        path = folder / f"{rng.choice(PARTS[:3])}-{rng.randrange(len(store.shards)):05d}.bin"
        whole = path.read_bytes()
        raw = bytearray(whole)
        kind = rng.randrange(4)
        if kind == 0:
            raw = raw[: rng.randrange(len(raw))]
        else:
            for _ in range(rng.choice((1, 1, 8))):
                raw[rng.randrange(128 if kind == 1 else len(raw))] = rng.randrange(256)
        if len(raw) >= 128 and number % 2:
            raw[124:128] = struct.pack("<I", zlib.crc32(raw[:124]))
        path.unlink()
        path.write_bytes(raw)
        try:
            tokens, _ = Loader(paths, 8, TOKENIZER.vocab_size).gather(np.arange(store.num_rows), 16, 0)
            if raw[128:] != whole[128:]:
                pytest.fail(f"damage {number} of {path.name} was read")
            same = np.array_equal(tokens, np.where(reference == TOKENIZER.pad_id, 0, reference))
            assert same or raw[:128] != whole[:128]
        except (RuntimeError, ValueError):
            caught += 1
        path.unlink()
        path.write_bytes(whole)
    assert caught > 400
