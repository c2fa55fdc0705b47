"""Publishing: whole or not at all, on the disk before it is referred to, and nothing but files is opened."""

import errno
import io
import os
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import small_disk

from retro_engine.data import files
from retro_engine.data.array_file import ArrayFile
from retro_engine.errors import InUseError, MissingInputError, OutOfResourceError, StoreError, UsageError, typed

PARENT = "ab" * 32


def test_manifest(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="never finished"):
        files.read_manifest(tmp_path, "store")
    with pytest.raises(MissingInputError, match="no such folder"):
        files.read_manifest(tmp_path / "no", "store")
    left = tmp_path / ".manifest.json.123.tmp"
    left.write_bytes(b"{")  # of a writer that was killed
    body = {"library": PARENT, "documents": 1, "chunks": 2, "files": {}}
    mark = files.write_manifest(tmp_path, "segment", body)
    assert not left.exists()
    assert files.read_manifest(tmp_path, "segment")["fingerprint"] == mark
    with pytest.raises(StoreError, match="a neighbors was expected"):
        files.read_manifest(tmp_path, "neighbors")
    path = tmp_path / "manifest.json"
    whole = path.read_bytes()
    path.chmod(0o644)
    for content in (b"", whole[:-20], whole.replace(b'"chunks": 2', b'"chunks": 1'), b"[1]", b"\xff" + whole):
        path.write_bytes(content)
        with pytest.raises(StoreError, match="damaged"):
            files.read_manifest(tmp_path, "segment")
    path.write_bytes(whole.replace(b'"version": 1', b'"version": 9'))
    with pytest.raises(StoreError, match="version 9"):
        files.read_manifest(tmp_path, "segment")
    path.write_bytes(b"[" * 1_000_000)
    with pytest.raises(StoreError, match="damaged"):
        files.read_manifest(tmp_path, "segment")
    with pytest.raises(AssertionError, match="not described"):
        files.write_manifest(tmp_path, "segment", {**body, "another": 1})


def test_a_failing_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever call fails, the old file stays, no temporary file is left, and the error is typed."""
    path = tmp_path / "a.bin"
    files.publish(path, [b"old"])
    for call in ("posix_fallocate", "fsync", "replace", "chmod"):
        for number in (errno.ENOSPC, errno.EIO, errno.EROFS):
            with monkeypatch.context() as patch:

                def fail(*_: object, number: int = number) -> None:
                    raise OSError(number, os.strerror(number))

                patch.setattr(os, call, fail)
                with pytest.raises(OutOfResourceError if number != errno.EROFS else UsageError, match=str(path)):
                    files.publish(path, [b"new content"])
            assert path.read_bytes() == b"old"
            assert os.listdir(tmp_path) == ["a.bin"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    (tmp_path / ".new.tmp" / "of a killed writer").mkdir(parents=True)
    with pytest.raises(ZeroDivisionError), files.publish_folder(folder) as aside:
        (aside / "a").write_text(f"{1 / 0}")
    assert os.listdir(tmp_path) == []
    folder.mkdir()  # an empty one may be there
    with files.publish_folder(folder) as aside:
        (aside / "a").touch()
        assert os.listdir(folder) == []
    assert (os.listdir(tmp_path), os.listdir(folder)) == (["new"], ["a"])
    with pytest.raises(UsageError, match="is there already"):
        files.check_unused(folder)


def test_a_failed_read_names_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's error has no name where the file is open already: "the system refused", nobody knew what."""
    path = tmp_path / "a"
    path.touch()

    class Failing(io.FileIO):
        def readall(self) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        def readinto(self, into: object) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files, "open_file", lambda path: Failing(path))
    for read in (files.read_bytes, files.sha256_file):
        with pytest.raises(OSError, match="Input/output error") as found:
            read(path)
        assert str(path) in str(typed(found.value))


def test_two_publishers_of_one_folder(tmp_path: Path) -> None:
    """The second one removed what the first had written, under its hands; what is left is of one of them."""
    folder = tmp_path / "new"
    (tmp_path / ".new.lock").touch()  # of a killed writer
    with files.publish_folder(folder) as aside:
        (aside / "a").write_text("of the first")
        with pytest.raises(InUseError, match="another process is writing there"), files.publish_folder(folder):
            raise AssertionError("it was let in")
    assert (os.listdir(tmp_path), (folder / "a").read_text()) == (["new"], "of the first")
    told = list[str]()

    def write(number: int) -> None:
        for turn in range(20):
            try:
                with files.publish_folder(tmp_path / str(turn)) as aside:
                    for name in "ab":
                        (aside / name).write_text(str(number))
            except UsageError as error:
                told.append(error.why)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert sorted(os.listdir(tmp_path)) == sorted(["new", *map(str, range(20))])
    for turn in range(20):
        assert (tmp_path / str(turn) / "a").read_text() == (tmp_path / str(turn) / "b").read_text()
    assert set(told) <= {"another process is writing there", "Directory not empty"}
    assert len(told) == 60


def test_a_full_disk(tmp_path: Path) -> None:
    """On a small tmpfs: the error names the path and the bytes, and earlier files are untouched."""
    with small_disk(tmp_path, "256k") as disk:
        files.publish(disk / "a", [b"x" * 1000])
        with pytest.raises(OutOfResourceError, match="1,000,000 bytes were needed"):
            files.publish(disk / "b", [b"y" * 1_000_000])
        assert os.listdir(disk) == ["a"]
        assert (disk / "a").read_bytes() == b"x" * 1000


def test_a_failure_leaves_no_folder_of_its_own_and_keeps_the_users(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("mine", "new"):
        with pytest.raises(ZeroDivisionError), files.locked(tmp_path / name):
            raise ZeroDivisionError
    assert os.listdir(tmp_path) == ["mine"]


def test_the_lock_dies_with_its_holder(tmp_path: Path) -> None:
    code = f"import os, sys; from retro_engine.data.files import locked\nfrom pathlib import Path\nwith locked(Path({str(tmp_path)!r})):\n print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match="is in use"), files.locked(tmp_path):
            pass
        holder.kill()
        holder.wait()
        with files.locked(tmp_path):
            pass


HOSTILE_NAMES = [
    "../a",
    "/etc/passwd",
    "..",
    ".",
    "",
    "a/b",
    "a/../../b",
    "a\0b",
    "a\n",
    "a b",
    "é",
    "~",
    None,
    3,
    b"a",
    "a" * 256,
]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_name_from_a_file_does_not_leave_its_folder(tmp_path: Path, name: object) -> None:
    with pytest.raises(StoreError, match="names a file"):
        files.child(tmp_path, name)
    with pytest.raises(StoreError, match="names a file"):
        files.verify_files(tmp_path, {name: "0" * 64})  # type: ignore[dict-item]
    if name != "a/b":
        with pytest.raises(StoreError, match="names a file"):
            files.child(tmp_path, name, depth=3)


def test_plain_names(tmp_path: Path) -> None:
    for name in ("tokens-00000.bin", ".hidden", "a..b", "model-1+2_3.safetensors"):
        assert files.child(tmp_path, name) == tmp_path / name
    assert files.child(tmp_path, "optimizer/shard-1", depth=2) == tmp_path / "optimizer" / "shard-1"


def test_a_link_is_not_removed_through(tmp_path: Path) -> None:
    (tmp_path / "outside" / "inner").mkdir(parents=True)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "link").symlink_to(tmp_path / "outside")
    files.remove_folder(tmp_path / "own", "link")
    with pytest.raises(StoreError, match="is a link"):
        files.remove_folder(tmp_path / "own" / "link", "inner")
    with pytest.raises(StoreError, match="names a file"):
        files.remove_folder(tmp_path / "own", "../outside")
    assert (tmp_path / "outside" / "inner").is_dir()
    files.remove_folder(tmp_path / "nothing", "a")
    os.mkfifo(tmp_path / "own" / "pipe")
    files.remove_folder(tmp_path / "own", "pipe")  # returns: it is not waited for
    os.mkfifo(tmp_path / "outside" / "inner" / "pipe")
    files.remove_folder(tmp_path / "outside", "inner")
    assert not (tmp_path / "outside" / "inner").exists()


def test_only_files_are_opened(tmp_path: Path) -> None:
    """A pipe waits for its writer, a device never ends: neither is waited for."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "zeros").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for name, kind in (("pipe", "pipe"), ("folder", "folder"), ("zeros", "device"), ("socket", "socket")):
            for act in (files.open_file, files.sha256_file, lambda path: ArrayFile(path, "tokens")):
                with pytest.raises(StoreError, match=f"is a {kind}"):
                    act(tmp_path / name)  # type: ignore[operator]
    with pytest.raises(FileNotFoundError):
        files.open_file(tmp_path / "nothing")
    with pytest.raises(OSError, match="symbolic links"):
        files.open_file(tmp_path / "loop")
    (tmp_path / "real").write_bytes(b"content")
    (tmp_path / "link").symlink_to("real")
    with files.open_file(tmp_path / "link") as file:
        assert file.read() == b"content"


def test_a_lock_is_a_file(tmp_path: Path) -> None:
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink(tmp_path / "made", path)):
        lock = tmp_path / ".lock"
        make(lock)
        for kind in (files.locked, files.read_locked):
            with pytest.raises(StoreError, match=r"\.lock is a"), kind(tmp_path):
                pass
        lock.rmdir() if lock.is_dir() else lock.unlink()
    assert not (tmp_path / "made").exists()


def test_readers_lock_writers_out_and_each_other_not(tmp_path: Path) -> None:
    with files.read_locked(tmp_path):
        assert os.listdir(tmp_path) == []
    with files.locked(tmp_path), pytest.raises(UsageError, match="in use"), files.read_locked(tmp_path):
        pass
    readers = files.read_locked(tmp_path), files.read_locked(tmp_path)
    with readers[0], readers[1], pytest.raises(UsageError, match="in use"), files.locked(tmp_path):
        pass


def test_a_temporary_name_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("mine")
    temporary = tmp_path / f".a.bin.{os.getpid()}.tmp"
    temporary.symlink_to("outside")
    files.publish(tmp_path / "a.bin", [b"content"])
    assert (tmp_path / "a.bin").read_bytes() == b"content"
    assert (tmp_path / "outside").read_text() == "mine"


def test_what_cannot_be_made_durable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", refused)
    with pytest.raises(OutOfResourceError, match=re.escape(f"{tmp_path} cannot be written")):
        files.sync(tmp_path)
