"""What a machine may be like: its clock jumps, its disk refuses writes or locks, a folder is on a disk of its own, a library is
one that a newer version made.
"""

import contextlib
import errno
import fcntl
import io
import os
import time
from pathlib import Path

import apsw
import numpy as np
import pytest
from helpers import read_only_copy, small_disk

from retro_engine.data import files, mounts
from retro_engine.data.corpus import Document
from retro_engine.data.neighbor_table import NeighborTable
from retro_engine.data.prepare import prepare
from retro_engine.data.store import Store
from retro_engine.errors import InUseError, OutOfResourceError, StoreError, UsageError
from retro_engine.library.file import EXTENDED
from retro_engine.library.importer import Importer
from retro_engine.library.library import Library


@pytest.mark.parametrize("days", [-20_000, 20_000])
def test_a_clock_that_jumps(small_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: int) -> None:
    """What was sent is kept for an hour unless a job names it: it is not lost when that hour is over at once."""
    Library.create(tmp_path, small_store.tokenizer, 16)
    with Library(tmp_path) as library, Importer(library) as importer, monkeypatch.context() as patch:
        patch.setattr(Importer, "_run_in_thread", lambda self, number: number)  # killed before it begins
        importer.start(io.BytesIO(b'{"id": "a", "text": "river stone"}\n'))
    real = time.time()
    monkeypatch.setattr(time, "time", lambda: real + days * 86_400)
    with Library(tmp_path) as library, Importer(library) as importer:
        importer.recover()
        assert importer.wait(1).state == "done"
        library.add([Document("b", "", "amber")])
        assert [entry.id for entry in library.entries()] == ["a", "b"]


@pytest.mark.parametrize("is_read_only", [False, True])
def test_a_library_of_a_newer_version(small_store: Store, tmp_path: Path, is_read_only: bool) -> None:
    """It stays as it is, to the byte, and the error says what to do."""
    Library.create(tmp_path / "library", small_store.tokenizer, 16)
    path = tmp_path / "library" / "documents.sqlite"
    with contextlib.closing(apsw.Connection(str(path))) as connection:
        connection.pragma("journal_mode", "delete")
        connection.pragma("user_version", EXTENDED + 1)
    before = path.read_bytes()
    with pytest.raises(StoreError, match=rf"has version {EXTENDED + 1}\n.*\n.*update retro-engine"):
        Library(tmp_path / "library", is_read_only=is_read_only)
    with pytest.raises(UsageError, match="holds a library"):
        Library.create(tmp_path / "library", small_store.tokenizer, 16)
    assert path.read_bytes() == before


def reads(folder: Path) -> None:
    store = Store(folder)
    store.verify()
    assert NeighborTable(folder / "neighbors" / "bm25", store).ids(np.arange(3), 2).shape == (3, 2)


def test_a_disk_that_refuses_writes(small_store: Store, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("river stone " * 20)
    with read_only_copy(small_store.folder, tmp_path / "disk") as folder:
        reads(folder)
        for act in (
            lambda: prepare([tmp_path / "a.txt"], folder / "new"),
            lambda: files.publish(folder / "file", [b"x"]),
            lambda: files.publish_folder(folder / "new").__enter__(),
        ):
            with pytest.raises(UsageError, match="Read-only file system"):
                act()


def test_a_folder_on_a_disk_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written beside it cannot be renamed over it: that is told, and nothing is left."""
    with small_disk(tmp_path, "256k") as disk:
        with pytest.raises(UsageError, match=r"disk cannot be written\n.*busy"), files.publish_folder(disk) as aside:
            (aside / "a").touch()
        assert (os.listdir(tmp_path), os.listdir(disk)) == (["disk"], [])

    def rename(source: object, target: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(UsageError, match="Invalid cross-device link"), files.publish_folder(tmp_path / "new") as aside:
        (aside / "a").touch()
    assert os.listdir(tmp_path) == ["disk"]


@pytest.mark.parametrize(
    ("number", "kind", "said"),
    [
        (errno.EWOULDBLOCK, InUseError, "another process is writing there"),
        (errno.ENOLCK, UsageError, "a file system that has locks"),
        (errno.EOPNOTSUPP, UsageError, "a file system that has locks"),
        (errno.EIO, OutOfResourceError, "look at the disk"),
    ],
)
def test_a_disk_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception], said: str
) -> None:
    """Two hosts could write there at once: refused, and not called busy, which would be waited for."""

    def flock(file: object, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    for act in (files.locked, files.publish_folder):
        with pytest.raises(kind, match=said) as found, act(tmp_path / "new"):
            pass
        assert type(found.value) is kind


@pytest.mark.parametrize(
    ("kind", "options", "is_refused"),
    [
        ("nfs4", "rw,vers=4.2,local_lock=none", False),
        ("nfs", "rw,vers=3,nolock,local_lock=all", True),
        ("cifs", "rw,nobrl", True),
        ("ext4", "rw", False),
    ],
)
def test_two_hosts_that_do_not_see_each_other_s_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, options: str, is_refused: bool
) -> None:
    """The mount says so: a lock that this host grants keeps nobody else out. Where locks are shared, `flock` decides."""
    device = os.stat(tmp_path).st_dev
    mount = (
        f"36 35 {os.major(device)}:{os.minor(device)} / {tmp_path} rw,relatime shared:1 - {kind} server:/ {options}\n"
    )
    (tmp_path / "mountinfo").write_text(f"short line\n{mount}")
    monkeypatch.setattr(mounts, "MOUNTS", tmp_path / "mountinfo")
    for act in (files.locked, files.publish_folder):
        with contextlib.ExitStack() as stack:
            if is_refused:
                stack.enter_context(
                    pytest.raises(UsageError, match="keeps locks on this host.*\n.*two hosts could write")
                )
            stack.enter_context(act(tmp_path / act.__name__))
