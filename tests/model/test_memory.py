"""Tensors on a file's own pages: their values whatever becomes of the file's name, and memory that is given back."""

import ctypes
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from retro_engine.bench.machine import resident_mib
from retro_engine.errors import MissingInputError, OutOfResourceError, StoreError
from retro_engine.model.memory import (
    LargePages,
    MappedTensors,
    keep_freed_memory,
    safetensors_parts,
    share_one_heap,
    trim,
    untouched_zeros,
)

MIB = 1 << 20


def test_values_are_the_files(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.bool)
    save_file({f"t{i}": torch.arange(30).to(kind).reshape(5, 6) for i, kind in enumerate(kinds)}, path)
    found, wanted = MappedTensors(path), load_file(path)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) and found[name].dtype == wanted[name].dtype for name in wanted)


def test_a_file_that_takes_its_place_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.ones(MIB)}, path)
    found = MappedTensors(path)
    save_file({"w": torch.zeros(MIB)}, tmp_path / "new")
    (tmp_path / "new").replace(path)
    assert (found["w"] == 1).all()
    assert (MappedTensors(path)["w"] == 0).all()
    found["w"][3] = 5  # in memory alone
    assert (MappedTensors(path)["w"] == 0).all()


def test_what_is_cut_or_says_what_is_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.ones(1000)}, path)
    raw = path.read_bytes()
    about = json.dumps({"w": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 8000]}}).encode()
    for content in (b"", raw[:7], raw[:60], raw[:-1], raw + b"x", struct.pack("<Q", len(about)) + about + b"0" * 4000):
        path.write_bytes(content)
        with pytest.raises(StoreError, match=r"w\.safetensors cannot be read"):
            MappedTensors(path)
    with pytest.raises(MissingInputError):
        MappedTensors(tmp_path)


def test_tensors_that_lie_at_odd_places(tmp_path: Path) -> None:
    about = json.dumps({"b": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "w": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]}}).encode()  # fmt: skip
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(about)) + about + b"\7" + struct.pack("<2f", 1.5, -2))
    found = MappedTensors(path)
    assert found["w"].tolist() == [1.5, -2]
    assert found["b"].tolist() == [7]


def test_memory_is_taken_by_what_is_read_and_given_back(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.ones(16 * MIB), "small": torch.ones(3)}, path)
    trim()
    before = resident_mib()
    found = MappedTensors(path)
    assert resident_mib() < before + 16
    assert found["w"].sum() == 16 * MIB
    assert resident_mib() > before + 48
    found.drop(found["w"])
    assert resident_mib() < before + 16
    found.drop(torch.ones(4 * MIB))  # of no file: nothing happens
    assert found["w"][-1] == 1


def test_zeros_take_memory_when_they_are_written() -> None:
    before = resident_mib()
    zeros = untouched_zeros((64, MIB), torch.bfloat16, torch.device("cpu"))
    assert zeros.shape == (64, MIB)
    zeros[5] = 3
    assert resident_mib() < before + 16
    assert (zeros.sum(1)[[4, 5]] == torch.tensor([0, 3 * MIB])).all()
    assert untouched_zeros((0, 3), torch.float32, torch.device("cpu")).shape == (0, 3)


def test_room_is_side_by_side_and_no_more_than_was_asked_for() -> None:
    room = LargePages(LargePages.size(5, torch.int8) + LargePages.size(6, torch.float32))
    one, other = room.take((5,), torch.int8).fill_(1), room.take((2, 3), torch.float32).fill_(2)
    assert other.data_ptr() - one.data_ptr() == 64
    assert one.sum() == 5
    with pytest.raises(AssertionError):
        room.take((1,), torch.int8)


def test_what_is_written_is_safetensors_and_begins_at_cache_lines(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.arange(7, dtype=torch.float32),
        "none": torch.empty(0, 4),
        "one": torch.tensor(3, dtype=torch.int64),
        "is": torch.tensor([True, False]),
        "matrix": torch.randn(24, 32).bfloat16(),
        "turned": torch.randn(32, 16).T,
        "bytes": torch.randint(0, 255, (3, 64), dtype=torch.uint8),
    }
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"".join(safetensors_parts(tensors)))
    found, mapped = load_file(path), MappedTensors(path)
    assert found.keys() == mapped.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name
        assert torch.equal(mapped[name], tensor), name
    assert all(mapped[name].data_ptr() % 64 == 0 for name in ("matrix", "turned", "bytes"))


@pytest.mark.parametrize("by", ["safetensors.safe_open", "mmap.mmap"])
def test_no_memory_to_map_a_file_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    """safetensors raises Python's own MemoryError there, without a name."""
    save_file({"w": torch.ones(4)}, tmp_path / "w.safetensors")

    def refused(*_: object, **__: object) -> None:
        raise (
            MemoryError("Cannot allocate memory (os error 12)")
            if "safe" in by
            else OSError(12, "Cannot allocate memory")
        )

    monkeypatch.setattr(by, refused)
    with pytest.raises(
        OutOfResourceError, match=r"w\.safetensors cannot be read\n.*allocate memory.*\n.*free some memory"
    ):
        MappedTensors(tmp_path / "w.safetensors")


@pytest.mark.parametrize("asked", [None, "MALLOC_ARENA_MAX", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES"])
def test_the_heap_is_a_users_to_configure(asked: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda name, value: calls.append((name, value)))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    for name in ("MALLOC_ARENA_MAX", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    if asked is not None:
        monkeypatch.setenv(asked, "4")
    share_one_heap()
    one_heap = [] if asked in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES") else [(-8, 1)]
    assert calls == one_heap
    keep_freed_memory(torch.device("meta"))
    assert calls == one_heap
    keep_freed_memory(torch.device("cpu"))
    assert calls == one_heap + (
        [] if asked in ("MALLOC_MMAP_MAX_", "GLIBC_TUNABLES") else [(-4, 0), (-1, -1), (-2, 64 << 20)]
    )


@pytest.mark.skipif(sys.platform != "linux", reason="counts the faults of Linux")
def test_memory_that_is_freed_is_there_again_without_faults() -> None:
    code = """
import resource, torch
from retro_engine.model.memory import keep_freed_memory
keep_freed_memory(torch.device('cpu'))
def faults():
    for _ in range(4):
        tensors = [torch.ones(count) for count in (1 << 18, 1 << 20, 1 << 24)]
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
print(faults() - before)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert (
        int(done.stdout) < 4 * 17_000 / 2
    )  # all of the large block's pages, each time, are 65,536; once it may lie elsewhere
