"""Publishing files so that a reader sees the old one, the new one, or a typed error; never half of one.

Owns the array file that stores and tables are made of (docs/formats.md):
128-byte little-endian header | rows x columns values | CRC-32 of every 1 MiB of values | nothing else.
Every file is written under a temporary name in its folder, fsynced, made read-only and renamed. A folder is published
whole in the same way (`publish_folder`) or, where writing goes on after a kill, by its `manifest.json`, written last. Every file is opened by `open_file`, which takes nothing but files, and
every name that comes out of a file goes through `child`, which takes nothing that leads out of the folder.
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
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np

from retro_engine.data.manifests import check_manifest, check_names
from retro_engine.errors import InUseError, MissingInputError, OutOfResourceError, RetroError, StoreError, UsageError

MAGIC, VERSION, BYTE_ORDER = b"RETROARR", 1, 0x01020304
HEADER = struct.Struct("<8sIII12s8sQQQ32sII20sI")  # 128 bytes; the last field is the CRC-32 of the rest
BLOCK = 1 << 20  # bytes of values under one checksum
DTYPES = {"u1": np.uint8, "u2": np.uint16, "u4": np.uint32, "i4": np.int32, "i8": np.int64}
MANIFEST, LOCK = "manifest.json", ".lock"
MOST_JSON_BYTES, HASHED = 1 << 28, 1 << 24  # pieces so large that other threads of Python seldom let this one go on
MOST_OBJECT_BYTES = 16 << 20  # of a run's or a checkpoint's file
PLAIN_NAME = re.compile(r"(?!\.\.?\Z)[A-Za-z0-9_.+-]{1,255}")
KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISLNK: "a link",
    stat.S_ISFIFO: "a pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}
assert HEADER.size == 128


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
        raise MissingInputError(f"{path} cannot be read", error.strerror or "") from error
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


def read_bytes(path: Path, most: int = MOST_JSON_BYTES) -> bytes:
    """A whole file. Raises as `open_file` does, and StoreError for one of more than `most` bytes."""
    with open_file(path) as file:
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
        raise MissingInputError(f"{path} cannot be read", error.strerror or "", do) from error
    except ValueError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{path} is damaged", str(error), do) from error
    if not isinstance(value, dict):
        raise StoreError(f"{path} is damaged", f"it holds a {type(value).__name__}", do)
    return value


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
        if size == start:
            return np.empty(shape, wanted)
        return np.memmap(path, wanted, "r", start, shape).view(np.ndarray)
    except OSError as error:
        raise StoreError(f"{path} cannot be read", error.strerror or str(error), "build it again") from error
    except (ValueError, KeyError, TypeError, SyntaxError, TokenError, RecursionError, MemoryError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{path} is not the array that was written", f"{error}", "build it again") from error


def publish(path: Path, parts: Iterable[bytes | memoryview], size: int | None = None) -> None:
    """Write `parts` to `path` so that it appears whole or not at all. Raises OutOfResourceError for a full disk.

    `size` is their sum in bytes; it must be given for parts that are made one at a time.
    """
    if size is None:
        parts = list(parts)
        size = sum(memoryview(part).nbytes for part in parts)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _published(temporary, path, size):
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
def _published(temporary: Path, path: Path, size: int = 0) -> Iterator[None]:
    """What is at `temporary` after the block gets its name; where that fails it is removed, and a typed error says why."""
    try:
        yield
        sync(temporary)
        os.chmod(temporary, 0o444)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise io_error(error, path, size) from error


def check_unused(folder: Path) -> None:
    """Raises UsageError where there is something that a new folder would overwrite."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already", "it is not overwritten", "choose another --out")


@contextlib.contextmanager
def publish_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, under a temporary name: after the block it is at `folder` in one step, whole; where the block
    raises there is nothing.
    """
    aside = folder.with_name(f".{folder.name}.tmp")
    remove_tree(aside)  # of a killed writer
    make_folder(aside)
    try:
        yield aside
        if folder.exists():
            folder.rmdir()  # it is empty
        os.rename(aside, folder)
        sync(folder.parent)
    finally:
        remove_tree(aside)


def json_bytes(values: dict[str, Any], is_sorted: bool = False) -> bytes:
    """The JSON file of an object, for people to read too."""
    return (json.dumps(values, indent=1, sort_keys=is_sorted) + "\n").encode()


def io_error(error: OSError, path: Path, size: int = 0) -> Exception:
    """The typed error for a failed write of `size` bytes to `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        need = f"{size:,} bytes were needed" if size else "the write did not fit"
        return OutOfResourceError(f"no space left for {path}", need, "free some space and run the same command again")
    return UsageError(
        f"{path} cannot be written", error.strerror or str(error), "let it be written, or choose another folder"
    )


def sync(path: Path) -> None:
    """Make a file's bytes, or the renames in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Raises UsageError where it cannot be made, or its name is one that the libraries which write there do not take."""
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        name = os.fsencode(folder).decode("utf-8", "backslashreplace")
        raise UsageError(f"{name} cannot be written", "its name is not UTF-8", "choose another folder") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise io_error(error, folder) from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; it dies with its holder. Raises InUseError when another process has it."""
    is_new = not folder.is_dir()
    make_folder(folder)
    with _lock_file(folder, os.O_RDWR | os.O_CREAT) as file:
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
    with _lock_file(folder, os.O_RDONLY) as file:
        _flock(file, folder, fcntl.LOCK_SH)
        yield


def _lock_file(folder: Path, flags: int) -> IO[bytes]:
    path = folder / LOCK
    try:
        return os.fdopen(_open(path, flags | os.O_NOFOLLOW), "rb")
    except OSError as error:
        if isinstance(error, RetroError):
            raise
        raise io_error(error, folder) from error


def _flock(file: IO[bytes], folder: Path, kind: int) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        raise InUseError(f"{folder} is in use", "another process is writing there", "wait for it to end") from error


def array_parts(kind: str, values: np.ndarray, parent: str) -> list[bytes | memoryview]:
    """The array file of a [rows, columns] array of `kind`, made from what has fingerprint `parent`."""
    assert values.ndim == 2, values.shape
    code = next(code for code, dtype in DTYPES.items() if values.dtype == dtype)
    raw = values.astype(values.dtype.newbyteorder("<"), "C").reshape(-1).view(np.uint8)
    data = memoryview(raw)  # type: ignore[arg-type]  # numpy arrays are buffers
    checksums = [zlib.crc32(data[start : start + BLOCK]) for start in range(0, len(data), BLOCK)]
    head = HEADER.pack(
        MAGIC,
        VERSION,
        BYTE_ORDER,
        0,
        kind.encode(),
        code.encode(),
        *values.shape,
        len(data),
        bytes.fromhex(parent),
        BLOCK,
        len(checksums),
        b"",
        0,
    )[:-4]
    return [head + struct.pack("<I", zlib.crc32(head)), data, struct.pack(f"<{len(checksums)}I", *checksums)]


def write_array(path: Path, kind: str, values: np.ndarray, parent: str) -> str:
    """Publish `array_parts` at `path`; return its SHA-256."""
    parts = array_parts(kind, values, parent)
    publish(path, parts)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


class ArrayFile:
    """A published array, memory-mapped; each block's checksum is checked when the block is first touched."""

    def __init__(self, path: Path, kind: str, parent: str | None = None):
        """Raises StoreError for a truncated, foreign, newer, damaged or mixed-up file, before mapping it."""
        self.path = path
        try:
            with open_file(path) as file:
                head = file.read(HEADER.size)
                size = os.fstat(file.fileno()).st_size
        except FileNotFoundError as error:
            raise StoreError(f"{path} is missing", "the manifest names it", "build it again") from error
        except OSError as error:
            raise MissingInputError(f"{path} cannot be read", error.strerror or "") from error
        if len(head) < HEADER.size or head[:8] != MAGIC:
            raise StoreError(
                f"{path} is not a retro-engine array", "its first bytes are not RETROARR", "build it again"
            )
        _, version, order, _, found_kind, code, rows, columns, num_bytes, found_parent, block, blocks, _, crc = (
            HEADER.unpack(head)
        )
        if zlib.crc32(head[:-4]) != crc:
            raise StoreError(f"{path} has a damaged header", "its checksum does not match", "build it again")
        if version != VERSION:
            raise StoreError(
                f"{path} has format version {version}", f"this program reads {VERSION}", "update retro-engine"
            )
        name = found_kind.rstrip(b"\0").decode("ascii", "replace")
        dtype = DTYPES.get(code.rstrip(b"\0").decode("ascii", "replace"))
        if order != BYTE_ORDER or name != kind or dtype is None:
            raise StoreError(f"{path} holds {name!r}", f"expected {kind!r}", "build it again")
        expected = rows * columns * np.dtype(dtype).itemsize
        if max(rows, columns) >= 1 << 48 or num_bytes != expected or block != BLOCK or blocks != -(-num_bytes // BLOCK):
            raise StoreError(
                f"{path} contradicts itself", f"{rows} x {columns} values in {num_bytes} bytes", "build it again"
            )
        if size != HEADER.size + num_bytes + 4 * blocks:
            raise StoreError(
                f"{path} is {size:,} bytes",
                f"its header says {HEADER.size + num_bytes + 4 * blocks:,}",
                "build it again",
            )
        if parent is not None and found_parent.hex() != parent:
            raise StoreError(
                f"{path} was made from {found_parent.hex()[:12]}", f"this folder is of {parent[:12]}", "build it again"
            )
        whole = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
        self._bytes = whole[HEADER.size : HEADER.size + num_bytes]
        self._checksums = np.frombuffer(whole[HEADER.size + num_bytes :].tobytes(), "<u4")
        self._is_checked = np.zeros(blocks, bool)
        self.values: np.ndarray = self._bytes.view(np.dtype(dtype).newbyteorder("<")).reshape(rows, columns)

    def check_rows(self, rows: np.ndarray) -> None:
        """Check the blocks that these rows lie in. Raises StoreError at a wrong checksum."""
        width = self.values.shape[1] * self.values.itemsize
        if not rows.size or width == 0:
            return
        rows = rows.astype(np.int64).reshape(-1)
        ends = np.concatenate((rows * width // BLOCK, ((rows + 1) * width - 1) // BLOCK))
        for block in np.unique(ends):
            self._check_blocks(int(block), int(block) + 1)
        if width > BLOCK:  # a row longer than two blocks has some inside
            for first, last in zip(ends[: len(rows)], ends[len(rows) :]):
                self._check_blocks(int(first), int(last) + 1)

    def check_range(self, first: int, last: int) -> None:
        """Check the blocks of rows first ... last - 1. Raises StoreError at a wrong checksum."""
        width = self.values.shape[1] * self.values.itemsize
        if first < last and width:
            self._check_blocks(first * width // BLOCK, (last * width - 1) // BLOCK + 1)

    def _check_blocks(self, first: int, last: int) -> None:
        for block in range(first, last):
            if self._is_checked[block]:
                continue
            if zlib.crc32(self._bytes[block * BLOCK : (block + 1) * BLOCK].data) != self._checksums[block]:
                raise StoreError(
                    f"{self.path} is damaged in block {block}", "its checksum does not match", "build it again"
                )
            self._is_checked[block] = True

    def checked(self) -> np.ndarray:
        """All values, after checking every block."""
        self.check_range(0, self.values.shape[0])
        return self.values


def sha256_file(path: Path) -> str:
    found, piece = hashlib.sha256(), memoryview(bytearray(HASHED))
    with open_file(path) as file:
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
    commands = {"store": "prepare", "neighbors": "neighbors", "index": "index", "encodings": "encode"}
    build = f"retro {commands[kind]}" if kind in commands else "build it"
    try:
        raw = read_bytes(path)
    except FileNotFoundError as error:
        why = "it has no manifest.json: it was never finished" if folder.is_dir() else "there is no such folder"
        raise MissingInputError(f"{folder} is not a {kind}", why, f"{build} makes one") from error
    except OSError as error:
        raise MissingInputError(f"{path} cannot be read", error.strerror or "") from error
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
            raise MissingInputError(f"{path} cannot be read", error.strerror or "") from error
        if found != expected:
            raise StoreError(
                f"{path} is damaged", f"SHA-256 {found[:12]}, the manifest says {expected[:12]}", "build it again"
            )
