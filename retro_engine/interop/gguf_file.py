"""A GGUF file read so that nothing in it costs more than its size: metadata, and where each tensor lies.

Format (versions 2 and 3, little-endian): "GGUF", u32 version, u64 tensors, u64 entries | entries: key, u32 type, value |
tensors: name, u32 dimensions, u64 each, u32 type, u64 offset | padding to `general.alignment` | data. A text is u64 bytes and
UTF-8; an array is u32 type, u64 length and its values. Counts, lengths and offsets are compared with the file's size before
anything of theirs is made; keys, names and places of tensors are there once. Values are dequantised by the package gguf.
"""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retro_engine.errors import MissingInputError, StoreError, extra, read_error

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # type -> struct
TEXT, ARRAY = 8, 9
MAX_DIMENSIONS = 4
MAX_HEADER = 256 << 20  # bytes before the tensors' data: a vocabulary of a million entries has a tenth of it
DO = "take the file from its publisher again"


@dataclass(frozen=True)
class GgufTensor:
    """`shape` as torch's, slowest first; `data` are the bytes of the file."""

    name: str
    shape: tuple[int, ...]
    kind: int  # ggml's number of its type
    data: np.ndarray


@dataclass(frozen=True)
class GgufFile:
    """Metadata by key (scalars, texts, lists of texts, arrays of numbers) and tensors by name."""

    name: str
    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def values(self, name: str) -> Tensor:
        """A tensor in fp32. Raises StoreError for a type that is not known."""
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        kind = GGMLQuantizationType(tensor.kind)
        rows = tensor.data.reshape(prod(tensor.shape[:-1]), -1)
        try:
            found = dequantize(rows, kind)
        except NotImplementedError as error:
            raise StoreError(
                f"{self.name}: {name} has the type {kind.name}", str(error), "take another of its files"
            ) from error
        return torch.from_numpy(np.array(found, np.float32).reshape(tensor.shape))


def read_gguf_file(path: Path) -> GgufFile:
    """Raises StoreError for what is damaged, MissingExtraError without the package gguf."""
    with extra("hf", "gguf is not installed", "it reads .gguf files"):
        from gguf.constants import GGML_QUANT_SIZES
    if not path.is_file():
        raise MissingInputError(f"{path} does not exist", "", "name a .gguf file")
    if path.stat().st_size < 24:
        raise StoreError(f"{path} is not a GGUF file", "it is too short", DO)
    try:
        with open(path, "rb") as file:
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch warns of what cannot be written
    except OSError as error:
        raise read_error(error, path) from error
    data = memoryview(pages)
    try:
        header = _Header(data, str(path))
        fields = header.entries()
        tensors = header.tensors(fields.get("general.alignment", 32), {int(k): s for k, s in GGML_QUANT_SIZES.items()})
    except struct.error as error:
        raise StoreError(f"{path} is cut short", str(error), DO) from error
    return GgufFile(str(path), fields, tensors)


class _Header:
    """What is read from the beginning of a file, one value after another."""

    def __init__(self, data: memoryview, name: str):
        self.data, self.name, self.place = data, name, 0
        magic, version = self.take("4sI")
        if magic != b"GGUF":
            raise StoreError(f"{name} is not a GGUF file", "its first bytes are other ones")
        if version not in (2, 3):
            is_swapped = version & 0xFFFF == 0
            why = "it is big-endian" if is_swapped else "versions 2 and 3 are read"
            raise StoreError(f"{name} has GGUF's version {version}", why)
        self.num_tensors, self.num_entries = self.take("QQ")

    def take(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{form}", self.data, self.place)
        self.place += struct.calcsize(f"<{form}")
        return found

    def damaged(self, why: str) -> StoreError:
        return StoreError(f"{self.name} is damaged at byte {self.place:,}", why, DO)

    def room(self, count: int, width: int) -> None:
        """Raise StoreError where `count` values of `width` bytes are more than the file, or than any header has."""
        if count * width > min(len(self.data) - self.place, MAX_HEADER):
            raise self.damaged(f"{count:,} values do not fit into what is left")

    def text(self) -> str:
        (length,) = self.take("Q")
        self.room(length, 1)
        raw = bytes(self.data[self.place : self.place + length])
        self.place += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"a text is not UTF-8: {error.reason}") from error

    def entries(self) -> dict[str, Any]:
        self.room(self.num_entries, 13)
        fields: dict[str, Any] = {}
        for _ in range(self.num_entries):
            key = self.text()
            if key in fields:
                raise self.damaged(f"{key} is there twice")
            (kind,) = self.take("I")
            fields[key] = self.value(kind)
        return fields

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.take(SCALARS[kind])[0]
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            raise self.damaged(f"there is no type {kind}")
        inner, length = self.take("IQ")
        if inner == TEXT:
            self.room(length, 8)
            return [self.text() for _ in range(length)]
        if inner not in SCALARS:
            raise self.damaged(f"an array of type {inner} is not read")
        dtype = np.dtype("u1" if inner == 7 else f"<{SCALARS[inner]}")
        self.room(length, dtype.itemsize)
        found = np.frombuffer(self.data, dtype, length, self.place)
        self.place += length * dtype.itemsize
        return found

    def tensors(self, alignment: Any, sizes: dict[int, tuple[int, int]]) -> dict[str, GgufTensor]:
        """`sizes`: of each type, values in a block and the bytes of one."""
        if not isinstance(alignment, int) or isinstance(alignment, bool) or not 1 <= alignment <= 1 << 20:
            raise self.damaged(f"general.alignment={alignment} cannot be used")
        self.room(self.num_tensors, 24)
        found: dict[str, tuple[tuple[int, ...], int, int, int]] = {}
        for _ in range(self.num_tensors):
            name = self.text()
            if name in found:
                raise self.damaged(f"the tensor {name} is there twice")
            (count,) = self.take("I")
            if not 1 <= count <= MAX_DIMENSIONS:
                raise self.damaged(f"{name} has {count:,} dimensions")
            shape = tuple(reversed(self.take(f"{count}Q")))
            kind, offset = self.take("IQ")
            if kind not in sizes:
                raise self.damaged(f"{name} has the type {kind}, which is not known")
            block, width = sizes[kind]
            if 0 in shape or shape[-1] % block:
                raise self.damaged(f"{name} has the shape {shape}: rows are whole blocks of {block}")
            found[name] = shape, kind, offset, prod(shape) // block * width
        return self._placed(found, -(-self.place // alignment) * alignment)

    def _placed(self, found: dict[str, tuple[tuple[int, ...], int, int, int]], start: int) -> dict[str, GgufTensor]:
        """The tensors with their bytes. No two share one: a file could grow to any size in memory."""
        end, tensors = 0, {}
        for name, (shape, kind, offset, size) in sorted(found.items(), key=lambda item: item[1][2]):
            if offset < end:
                raise self.damaged(f"{name} lies over another tensor")
            end = offset + size
            if start + end > len(self.data):
                raise StoreError(
                    f"{self.name} is cut short", f"{name} ends at byte {start + end:,} of {len(self.data):,}", DO
                )
            data = np.frombuffer(self.data, np.uint8, size, start + offset)
            tensors[name] = GgufTensor(name, shape, kind, data)
        return tensors
