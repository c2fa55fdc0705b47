"""Publishing files so that a reader sees the old one, the new one, or a typed error; never half of one.

Every file is written under a temporary name in its folder, made read-only, fsynced and renamed. A folder is published
whole in the same way (`publish_folder`) or, where writing goes on after a kill, by its `manifest.json`, written last. What
refers to something is written when that is on the disk: files and folders are fsynced before the rename that publishes
them, and the parent of a new folder before anything is put into it (`make_folder`). Every file is opened by `open_file`,
which takes nothing but files, and every name that comes out of a file goes through `child`, which takes nothing that
leads out of the folder.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np

from retro_engine.data.manifests import check_manifest, check_names
from retro_engine.data.mapping import map_bytes
from retro_engine.data.mounts import local_locks
from retro_engine.errors import (
    REMEDIES,
    InUseError,
    MissingInputError,
    RetroError,
    StoreError,
    UsageError,
    read_error,
    write_error,
    writing,
)

VERSION = 1  # of manifests
MANIFEST, LOCK = "manifest.json", ".lock"
MOST_JSON_BYTES, HASHED = 1 << 28, 1 << 24  # pieces so large that other threads of Python seldom let this one go on
MOST_OBJECT_BYTES = 16 << 20  # of a run's or a checkpoint's file
UNSYNCED = (errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTSUP)  # of a folder that is somebody else's matter
PLAIN_NAME = re.compile(r"(?!\.\.?\Z)[A-Za-z0-9_.+-]{1,255}")
LOCKLESS = "choose a folder of a file system that has locks: where it has none, two hosts could write there at once"
KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISLNK: "a link",
    stat.S_ISFIFO: "a pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


def child(folder: Path, name: object, depth: int = 1) -> Path:
    """FOLDER/NAME for a name that was read from a file; `depth` > 1 allows that many plain names joined by /.

    Raises StoreError for what could lead elsewhere: an absolute path, .., a NUL, nothing, what is no text.
    """
    parts = name.split("/") if isinstance(name, str) else []
    if not 1 <= len(parts) <= depth or not all(PLAIN_NAME.fullmatch(part) for part in parts):
        raise StoreError(
            f"{folder} names a file {name!r:.80}",
            "a name in a file is of letters, digits, _ . + and - alone: anything else could lead out of the folder",
            "do not use it: it was not written by this program",
        )
    return folder.joinpath(*parts)


def kind_of(path: Path) -> str:
    """What lies at a path, not looking behind a link: "a file", "a link", "a pipe" ...; "" where nothing does."""
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        raise read_error(error, path) from error
    return _kind(mode)


def _kind(mode: int) -> str:
    return next((name for is_kind, name in KINDS.items() if is_kind(mode)), "a file")


def own_folder(path: Path) -> bool:
    """Whether there is this folder, in which files are removed. Raises StoreError for a link, or anything else."""
    kind = kind_of(path)
    if kind not in ("", "a folder"):
        raise StoreError(f"{path} is {kind}", "files are removed there: it has to be a folder", f"remove {path}")
    return bool(kind)


def remove_folder(parent: Path, name: str) -> None:
    """`remove_tree` of PARENT/NAME, a name from a file."""
    if own_folder(parent):
        remove_tree(child(parent, name))


def remove_tree(folder: Path) -> None:
    """Remove a folder and what is in it. A link is not followed, a pipe not waited for, and what cannot be removed stays."""
    if kind_of(folder) == "a folder":
        shutil.rmtree(folder, ignore_errors=True)


def open_file(path: Path) -> io.FileIO:
    """Open a file for reading, unbuffered. Raises OSError as `open` does, StoreError for what is no file.

    A pipe would wait for its writer, a device never ends.
    """
    return os.fdopen(_open(path, os.O_RDONLY), "rb", buffering=0)


def _open(path: Path, flags: int) -> int:
    """A descriptor of a file, and of nothing else."""
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        kind = _kind(os.fstat(descriptor).st_mode)
        if kind == "a file":
            return descriptor
        os.close(descriptor)
    except OSError:
        kind = kind_of(path)
        if kind in ("", "a file", "a link") and not (kind == "a link" and flags & os.O_NOFOLLOW):
            raise
    raise StoreError(f"{path} is {kind}", "a file was expected", "put the file in its place, or build it again")


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Around reads: the system's error of one names no file."""
    try:
        yield
    except OSError as error:
        if not isinstance(error, RetroError):
            error.filename = str(path)
        raise


def read_bytes(path: Path, most: int = MOST_JSON_BYTES) -> bytes:
    """A whole file. Raises as `open_file` does, and StoreError for one of more than `most` bytes."""
    with open_file(path) as file, _named(path):
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise StoreError(f"{path} has {size:,} bytes", f"at most {most:,} are read", "it was not written by us")
        return file.readall()


def read_json(path: Path, most: int = MOST_JSON_BYTES) -> Any:
    """The content of a JSON file. Raises as `read_bytes` does, and ValueError for what is no JSON, or nested too deep."""
    try:
        return json.loads(read_bytes(path, most))
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def read_object(path: Path, do: str = "", most: int = MOST_OBJECT_BYTES) -> dict[str, Any]:
    """An object from a JSON file that a folder of ours holds; `do`: what helps where there is none.

    Raises MissingInputError, or StoreError for what is none.
    """
    try:
        value = read_json(path, most)
    except FileNotFoundError as error:
        raise MissingInputError(f"{path} does not exist", "no such file", do) from error
    except OSError as error:
        raise read_error(error, path, do) from error
    except ValueError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{path} is damaged", str(error), do) from error
    if not isinstance(value, dict):
        raise StoreError(f"{path} is damaged", f"it holds a {type(value).__name__}", do)
    return value


def mapped(path: Path) -> np.ndarray:
    """The bytes of a file, memory-mapped. Raises StoreError for what is none, and `read_error`."""
    try:
        with open_file(path) as file:
            return map_bytes(file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise read_error(error, path) from error


def map_npy(path: Path, dtype: Any, ndim: int) -> np.ndarray:
    """A .npy file of this type, memory-mapped. Raises StoreError unless it is that, and as long as it says."""
    from numpy.lib import format as npy

    wanted = np.dtype(dtype)
    try:
        with open_file(path) as file:
            version = npy.read_magic(file)
            read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
            shape, is_fortran, found = read_header(file)
            start, size = file.tell(), os.fstat(file.fileno()).st_size
            if found != wanted or is_fortran or len(shape) != ndim or any(type(n) is not int or n < 0 for n in shape):
                raise ValueError(f"it holds {shape!s:.60} of {found}, not {ndim} dimensions of {wanted}")
            if math.prod(shape) * wanted.itemsize != size - start or start % 16:
                raise ValueError(f"{shape!s:.60} values of {found} in {size - start:,} bytes")
            return map_bytes(file, size)[start:].view(wanted).reshape(shape)
    except FileNotFoundError as error:
        raise StoreError(f"{path} is missing", "its manifest names it", "build it again") from error
    except OSError as error:
        raise read_error(error, path) from error
    except (ValueError, KeyError, TypeError, SyntaxError, TokenError, RecursionError, MemoryError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{path} is not the array that was written", f"{error}", "build it again") from error


def publish(
    path: Path, parts: Iterable[bytes | memoryview], size: int | None = None, is_read_only: bool = True
) -> None:
    """Write `parts` to `path` so that it appears whole or not at all. Raises OutOfResourceError for a full disk.

    `size` is their sum in bytes; it must be given for parts that are made one at a time. `is_read_only` False: somebody
    appends to it later.
    """
    if size is None:
        parts = list(parts)
        size = sum(memoryview(part).nbytes for part in parts)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _published(temporary, path, size, is_read_only):
        temporary.unlink(missing_ok=True)  # of a killed writer with this number: what is there is not followed
        with open(temporary, "xb") as file:
            if size:
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk shows here, before anything is written
            for part in parts:
                file.write(part)
            assert file.tell() == size, (path, file.tell(), size)


def publish_file(temporary: Path, path: Path) -> None:
    """Publish a file of the same folder that a library has written."""
    with _published(temporary, path):
        pass


@contextlib.contextmanager
def _published(temporary: Path, path: Path, size: int = 0, is_read_only: bool = True) -> Iterator[None]:
    """What is at `temporary` after the block gets its name; where that fails it is removed, and a typed error says why.

    A failed fsync is final: what was written is dropped, not tried again, since the system may have forgotten it.
    """
    try:
        yield
        if is_read_only:
            os.chmod(temporary, 0o444)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise write_error(error, path, size) from error


def check_unused(folder: Path) -> None:
    """Raises UsageError where there is something that a new folder would overwrite."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already", "it is not overwritten", "choose another --out")


@contextlib.contextmanager
def publish_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, under a temporary name: after the block it is at `folder` in one step, whole, with all that
    anybody has written into it on the disk; where the block raises there is nothing. Raises InUseError where another
    process publishes there.
    """
    aside = folder.with_name(f".{folder.name}.tmp")
    make_folder(folder.parent)
    with _locked_beside(folder):
        remove_tree(aside)  # of a killed writer
        make_folder(aside)
        try:
            yield aside
            with writing(folder):
                sync_tree(aside)
                if folder.exists():
                    folder.rmdir()  # it is empty
                os.rename(aside, folder)
                _sync(folder.parent)
        finally:
            remove_tree(aside)


def json_bytes(values: dict[str, Any], is_sorted: bool = False) -> bytes:
    """The JSON file of an object, for people to read too."""
    return (json.dumps(values, indent=1, sort_keys=is_sorted) + "\n").encode()


def sync(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, durable. Raises what the system refuses as `write_error` of it."""
    with writing(path):
        _sync(path)


def _sync(path: Path) -> None:
    """Within `writing`, which names what is published."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make all that lies in a folder durable, each folder after what is in it. Links are not followed."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(parent, name)
            if kind_of(path) == "a file":
                _sync(path)
        _sync(Path(parent))


def make_folder(folder: Path) -> None:
    """Make a folder and those that it is in; each is on the disk before anything is in it.

    Raises UsageError where it cannot be made, or its name is one that the libraries which write there do not take.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        name = os.fsencode(folder).decode("utf-8", "backslashreplace")
        raise UsageError(f"{name} cannot be written", "its name is not UTF-8", "choose another folder") from error
    with writing(folder):
        _make(folder)


def _make(folder: Path) -> None:
    is_new = True
    try:
        folder.mkdir()
    except FileNotFoundError:
        if folder.parent == folder:
            raise
        _make(folder.parent)
        folder.mkdir(exist_ok=True)
    except FileExistsError:
        if not folder.is_dir():
            raise
        is_new = False
    try:
        _sync(folder.parent)  # also of a folder that was there: who made it may have been killed before, or not cared
    except OSError as error:
        if is_new or error.errno not in UNSYNCED:
            raise


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; it dies with its holder. Raises InUseError when another process has it."""
    is_new = not folder.is_dir()
    make_folder(folder)
    with _lock_file(folder / LOCK, os.O_RDWR | os.O_CREAT) as file:
        _flock(file, folder, fcntl.LOCK_EX)
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                if is_new and os.listdir(folder) == [LOCK]:  # nothing came of it: leave nothing
                    (folder / LOCK).unlink()
                    folder.rmdir()
            raise


@contextlib.contextmanager
def read_locked(folder: Path) -> Iterator[None]:
    """Keep writers out while the folder is read, with other readers. Nothing is written: where there is no lock file,
    nobody has written there either. Raises InUseError when another process has the lock.
    """
    if not kind_of(folder / LOCK):
        yield
        return
    with _lock_file(folder / LOCK, os.O_RDONLY) as file:
        _flock(file, folder, fcntl.LOCK_SH)
        yield


@contextlib.contextmanager
def _locked_beside(folder: Path) -> Iterator[None]:
    """The same for a folder that is not there yet, or has to stay empty: the lock's file lies beside it, while it is held."""
    path = folder.with_name(f".{folder.name}{LOCK}")
    with contextlib.ExitStack() as stack:
        while True:
            file = stack.enter_context(_lock_file(path, os.O_RDWR | os.O_CREAT))
            _flock(file, folder, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                    break  # else its last holder has removed it
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()


def _lock_file(path: Path, flags: int) -> IO[bytes]:
    try:
        return os.fdopen(_open(path, flags | os.O_NOFOLLOW), "rb")
    except OSError as error:
        if isinstance(error, RetroError):
            raise
        raise write_error(error, path.parent) from error


def _flock(file: IO[bytes], folder: Path, kind: int) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InUseError(f"{folder} is in use", "another process is writing there", "wait for it to end") from error
    except OSError as error:
        if error.errno in REMEDIES:
            raise write_error(error, folder) from error
        raise UsageError(f"{folder} cannot be locked", error.strerror or str(error), LOCKLESS) from error
    if option := local_locks(file.fileno()):
        raise UsageError(f"{folder} cannot be locked", f"its mount's {option} keeps locks on this host", LOCKLESS)


def sha256_file(path: Path) -> str:
    found = hashlib.sha256()
    with open_file(path) as file, _named(path):
        piece = memoryview(bytearray(min(os.fstat(file.fileno()).st_size, HASHED) or 1))  # zeroing more takes its time
        while count := file.readinto(piece):
            found.update(piece[:count])
    return found.hexdigest()


def fingerprint(content: Any) -> str:
    """SHA-256 of JSON-ready content, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_manifest(folder: Path, kind: str, content: dict[str, Any]) -> str:
    """Publish FOLDER/manifest.json, which makes the folder exist; return its fingerprint.

    What a killed writer of it left is removed: the folder is the caller's alone.
    """
    check_names(kind, content)
    for stale in folder.glob(f".{MANIFEST}.*.tmp"):
        stale.unlink(missing_ok=True)
    body = {"kind": kind, "version": VERSION, **content}
    mark = fingerprint(body)
    publish(folder / MANIFEST, [json_bytes({**body, "fingerprint": mark}, is_sorted=True)])
    return mark


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """The manifest of a published folder.

    Every field is what manifests.py says of it. Raises MissingInputError when there is none (the folder was never
    finished), StoreError when it is damaged, of another kind, newer, or was not written by this program.
    """
    path = folder / MANIFEST
    commands = {
        "store": "prepare",
        "neighbors": "neighbors",
        "index": "index",
        "encodings": "encode",
        "ngram": "memory ngram",
        "knn": "memory knn",
    }
    build = f"retro {commands[kind]}" if kind in commands else "build it"
    try:
        raw = read_bytes(path)
    except FileNotFoundError as error:
        why = "it has no manifest.json: it was never finished" if folder.is_dir() else "there is no such folder"
        raise MissingInputError(f"{folder} is not a {kind}", why, f"{build} makes one") from error
    except OSError as error:
        raise read_error(error, path) from error
    try:
        body = json.loads(raw)
        mark = body.pop("fingerprint")
        found = fingerprint(body)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise StoreError(f"{path} is damaged", "it is not the JSON that was written", f"{build} again") from error
    if body.get("version") != VERSION or isinstance(body["version"], bool):
        raise StoreError(
            f"{path} has version {body.get('version')!r:.40}", f"this program reads {VERSION}", "update retro-engine"
        )
    if body.get("kind") != kind:
        raise StoreError(f"{folder} is a {body.get('kind')!s:.40}", f"a {kind} was expected", "name another folder")
    if found != mark:
        raise StoreError(f"{path} is damaged", "its fingerprint does not match", f"{build} again")
    try:
        check_manifest(kind, body)
    except ValueError as error:
        raise StoreError(f"{path} is not as {kind} manifests are", str(error), f"{build} again") from error
    return {**body, "fingerprint": mark}


def kind_in(folder: Path) -> str:
    """What a published folder says it is, unchecked; "" where it says nothing."""
    try:
        return str(read_json(folder / MANIFEST).get("kind"))
    except (ValueError, AttributeError, OSError):
        return ""


def known_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """`read_manifest`, or {} where there is none."""
    try:
        return read_manifest(folder, kind)
    except MissingInputError:
        return {}


def verify_files(folder: Path, files: dict[str, str], depth: int = 1, needed: Iterable[str] = ()) -> None:
    """Compare every file of a manifest (name -> SHA-256) with the disk; names are those that `child` allows.

    Raises StoreError for the first that differs, and where one of the `needed` is not among them.
    """
    missing = sorted(set(needed) - files.keys())
    if missing:
        raise StoreError(f"{folder} does not name {', '.join(missing)}", "its manifest has to", "build it again")
    for name, expected in files.items():
        path = child(folder, name, depth)
        try:
            found = sha256_file(path)
        except FileNotFoundError as error:
            raise StoreError(f"{path} is missing", "the manifest names it", "build it again") from error
        except OSError as error:
            raise read_error(error, path) from error
        if found != expected:
            raise StoreError(
                f"{path} is damaged", f"SHA-256 {found[:12]}, the manifest says {expected[:12]}", "build it again"
            )
