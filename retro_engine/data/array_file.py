"""The array file that stores, tables and encodings are made of (docs/formats.md).

128-byte little-endian header | rows x columns values | CRC-32 of every 1 MiB of values | nothing else.
A file is mapped when its size is what its header says, and each block's checksum is checked when the block is first touched.
"""

import hashlib
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from retro_engine.data.files import open_file, publish
from retro_engine.data.mapping import map_bytes
from retro_engine.errors import StoreError, read_error

MAGIC, VERSION, BYTE_ORDER = b"RETROARR", 1, 0x01020304
HEADER = struct.Struct("<8sIII12s8sQQQ32sII20sI")  # 128 bytes; the last field is the CRC-32 of the rest
BLOCK = 1 << 20  # bytes of values under one checksum
DTYPES = {"u1": np.uint8, "u2": np.uint16, "u4": np.uint32, "i4": np.int32, "i8": np.int64}
assert HEADER.size == 128


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
                about = os.fstat(file.fileno())
                rows, columns, dtype, blocks = _read_header(path, file.read(HEADER.size), about.st_size, kind, parent)
                num_bytes = rows * columns * dtype.itemsize
                self._bytes = map_bytes(file, about.st_size)[HEADER.size : HEADER.size + num_bytes]
                file.seek(HEADER.size + num_bytes)
                self._checksums = np.frombuffer(file.read(4 * blocks), "<u4")
        except FileNotFoundError as error:
            raise StoreError(f"{path} is missing", "the manifest names it", "build it again") from error
        except OSError as error:
            raise read_error(error, path) from error
        self._is_file = about.st_dev, about.st_ino
        self._size = about.st_size
        self._is_checked = np.zeros(blocks, bool)
        self.values: np.ndarray = self._bytes.view(dtype).reshape(rows, columns)

    def check_rows(self, rows: np.ndarray) -> None:
        """Check the blocks that these rows lie in. Raises StoreError at a wrong checksum."""
        width = self.values.shape[1] * self.values.itemsize
        if not rows.size or width == 0:
            return
        self.check_size()
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
            self.check_size()
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

    def check_size(self) -> None:
        """Raises StoreError where the file was cut since it was opened: its pages would end the process."""
        try:
            now = os.stat(self.path)
        except OSError:  # removed: what is mapped stays
            return
        if (now.st_dev, now.st_ino) == self._is_file and now.st_size != self._size:
            why = f"it had {self._size:,} when it was opened"
            raise StoreError(
                f"{self.path} has {now.st_size:,} bytes", why, "leave published files alone; build it again"
            )

    def checked(self) -> np.ndarray:
        """All values, after checking every block."""
        self.check_range(0, self.values.shape[0])
        return self.values


def _read_header(
    path: Path, head: bytes, size: int, kind: str, parent: str | None
) -> tuple[int, int, np.dtype[Any], int]:
    """Rows, columns, type and number of blocks of a file of `size` bytes. Raises StoreError for what is none of `kind`."""
    if len(head) < HEADER.size or head[:8] != MAGIC:
        raise StoreError(f"{path} is not a retro-engine array", "its first bytes are not RETROARR", "build it again")
    _, version, order, _, found_kind, code, rows, columns, num_bytes, found_parent, block, blocks, _, crc = (
        HEADER.unpack(head)
    )
    if zlib.crc32(head[:-4]) != crc:
        raise StoreError(f"{path} has a damaged header", "its checksum does not match", "build it again")
    if version != VERSION:
        raise StoreError(f"{path} has format version {version}", f"this program reads {VERSION}", "update retro-engine")
    name = found_kind.rstrip(b"\0").decode("ascii", "replace")
    known = DTYPES.get(code.rstrip(b"\0").decode("ascii", "replace"))
    if order != BYTE_ORDER or name != kind or known is None:
        raise StoreError(f"{path} holds {name!r}", f"expected {kind!r}", "build it again")
    dtype = np.dtype(known).newbyteorder("<")
    expected = rows * columns * dtype.itemsize
    if max(rows, columns) >= 1 << 48 or num_bytes != expected or block != BLOCK or blocks != -(-num_bytes // BLOCK):
        raise StoreError(
            f"{path} contradicts itself", f"{rows} x {columns} values in {num_bytes} bytes", "build it again"
        )
    length = HEADER.size + num_bytes + 4 * blocks
    if size != length:
        raise StoreError(f"{path} is {size:,} bytes", f"its header says {length:,}", "build it again")
    if parent is not None and found_parent.hex() != parent:
        why = f"this folder is of {parent[:12]}"
        raise StoreError(f"{path} was made from {found_parent.hex()[:12]}", why, "build it again")
    return rows, columns, dtype, blocks
