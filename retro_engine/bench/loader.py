"""`bench loader`: chunk ids to token arrays on one thread, warm and cold, against NumPy, memmap and HDF5.

Writes a store of random tokens to a temporary folder. Cold: the file's pages are dropped from the page cache first
(Linux), the reader is new. Rows are of 64 uint16 tokens, neighbors of 128.
"""

import gc
import mmap
import os
import tempfile
from pathlib import Path

import numpy as np

from retro_engine.bench.frame import (
    CPU,
    Measured,
    Options,
    Rotation,
    Row,
    Target,
    Work,
    at_least,
    compared,
    time_in_turns,
)
from retro_engine.data.corpus import Document
from retro_engine.data.loader import NeighborLoader, has_native_loader
from retro_engine.data.store import Store, StoreWriter
from retro_engine.data.tokenizer import Tokenizer

ROWS, M, R, IDS = 400_000, 64, 128, 20_000
COLD_IDS = 1_000
OURS = "ours (C++)"
RAW, GATHER = f"raw gather of {IDS} rows", f"ids to tokens and lengths, {IDS} ids"
HDF5, COLD = "one chunk, HDF5 opened per chunk", f"cold, {COLD_IDS} ids"


def run(options: Options) -> Measured:
    if not has_native_loader():
        raise RuntimeError("the C++ loader is not built: nothing to measure")
    # on the disk that the user works on, not in memory
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=".") as folder:
        path = _store(Path(folder) / "store")
        rows = [*_warm(Store(path)), *_hdf5(Store(path), Path(folder))]
        gc.collect()  # pages that are mapped cannot be dropped
        rows += _cold(path)
    return Measured(rows, targets(rows))


def targets(rows: list[Row]) -> list[Target]:
    """Of README and docs/kernels.md; times as fast as the alternative."""
    asked = {
        RAW: {"NumPy fancy": 2.5, "np.take(out=)": 1.1},
        GATHER: {"NumPy": 4.0, "bare C++ loop": 0.85},
        HDF5: {"HDF5 opened per chunk": 3000.0},
        COLD: {"memmap": 15.0, "memmap + MADV_RANDOM": 1.7},
    }
    found = {row.case: row.ratios for row in rows if row.implementation == OURS}
    return [
        at_least(f"{case}: against {name}", found.get(case, {}).get(name), least)
        for case, alternatives in asked.items()
        for name, least in alternatives.items()
    ]


def _store(folder: Path) -> Path:
    writer = StoreWriter(folder, Tokenizer.train(["x"], 300), M)
    rng = np.random.default_rng(0)
    while writer.counts["rows"] < ROWS:
        writer.add(Document("d", "", "x", "f"), rng.integers(2, 250, int(rng.integers(100, 6000))).tolist())
    writer.close()
    return folder


def _ids(num_rows: int, count: int, low: int, sets: int = 8) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(low, num_rows, count) for _ in range(sets)]


def _rows(case: str, works: dict[str, Work], num_bytes: float, rounds: int = 15, note: str = "") -> list[Row]:
    rows = compared(case, time_in_turns(works, CPU, rounds), ours=[OURS])
    for row in rows:
        row.gb_s, row.note = 1e-9 * num_bytes / row.median_s, note
    return rows


def _warm(store: Store) -> list[Row]:
    from retro_engine.data._loader import copy_rows

    values = np.ascontiguousarray(store.shards[0].arrays["tokens"].values)
    sets = _ids(len(values), IDS, 0)
    out = np.empty((IDS, M), values.dtype)
    works: dict[str, Work] = {
        OURS: Rotation(lambda ids: copy_rows(values, ids, out), sets),
        "NumPy fancy": Rotation(lambda ids: values[ids], sets),
        "np.take(out=)": Rotation(lambda ids: np.take(values, ids, 0, out=out, mode="clip"), sets),
    }
    rows = _rows(RAW, works, 4 * IDS * M)
    native, twin = NeighborLoader([store], True), NeighborLoader([store], False)
    for loader in (native, twin):
        loader.gather(np.arange(store.num_rows), R)  # touches and checks every block
    sets = _ids(store.num_rows, IDS, -1)
    pairs = np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(values.reshape(-1), R)[::M])
    limited = [np.clip(ids, 0, len(pairs) - 1) for ids in sets]
    wide = np.empty((IDS, R), np.int64)
    works = {
        OURS: Rotation(lambda ids: native.gather(ids, R, wide), sets),
        "NumPy": Rotation(lambda ids: twin.gather(ids, R, wide), sets),
        "bare C++ loop": Rotation(lambda ids: copy_rows(pairs, ids, wide), limited),
    }
    return rows + _rows(GATHER, works, 10 * IDS * R)


def _hdf5(store: Store, folder: Path) -> list[Row]:
    """What megatron-core does: a file that is opened for every chunk."""
    try:
        import h5py
    except ImportError:
        print("HDF5 is left out: h5py is not installed")
        return []
    values, native = store.shards[0].arrays["tokens"].values, NeighborLoader([store], True)
    native.gather(np.arange(store.num_rows), M)  # touches and checks every block
    sets = _ids(store.num_rows, IDS, -1)
    path = folder / "chunks.h5"
    with h5py.File(path, "w") as file:
        file["chunks"] = values[:100_000]

    def hdf5(ids: np.ndarray) -> None:
        for row in ids:
            with h5py.File(path, "r") as file:
                file["chunks"][row]

    few = [ids % 100_000 for ids in _ids(100_000, 200, 0)]
    works: dict[str, Work] = {
        OURS: Rotation(lambda ids: native.gather(ids, M), sets),
        "HDF5 opened per chunk": Rotation(hdf5, few),
    }
    ours, other = _rows(HDF5, works, 10 * IDS * M, 3)
    ours.ratios = {other.implementation: other.median_s / 200 / (ours.median_s / IDS)}
    return [ours, other]


def _cold(folder: Path) -> list[Row]:
    """Random ids of a file that is not in memory. Checksums are off: they read whole blocks at first touch."""
    if not hasattr(os, "posix_fadvise"):
        return []
    tokens = Store(folder).shards[0].arrays["tokens"]
    path, num_rows = Path(tokens.path), tokens.values.shape[0]
    del tokens
    state = {"seed": 0}

    def drop() -> np.ndarray:
        for file in sorted(folder.glob("*-*.bin")):
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
        state["seed"] += 1
        return np.random.default_rng(state["seed"]).integers(0, num_rows - 2, COLD_IDS)

    def ours() -> None:
        ids = drop()
        NeighborLoader([Store(folder)], True, checks_blocks=False).gather(ids, R)

    def memmap(advice: int | None) -> Work:
        def work() -> None:
            ids = drop()
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            if advice is not None:
                mapped.madvise(advice)
            values = np.frombuffer(mapped, np.uint16, num_rows * M, 128).reshape(num_rows, M)
            values[np.stack((ids, ids + 1), 1)]

        return work

    works: dict[str, Work] = {
        OURS: ours,
        "memmap": memmap(None),
        "memmap + MADV_RANDOM": memmap(mmap.MADV_RANDOM),
        "dropping the cache alone": drop,
    }
    return _rows(COLD, works, 10 * COLD_IDS * R, 3, "opening the reader included")
