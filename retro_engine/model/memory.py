"""Where tensors lie: on a file's own pages, on large pages, and on pages that take no memory before they are written.

Reads and writes .safetensors files: u64 header length | JSON, name -> dtype, shape, [begin, end), spaces | values.
"""

import ctypes
import json
import math
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from retro_engine.data import files
from retro_engine.errors import MissingInputError, StoreError, read_error, system_error

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LINE = 64  # bytes of a cache line
# glibc's M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX and M_ARENA_MAX; other C libraries do not know them, and change nothing.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


class MappedTensors(dict[str, Tensor]):
    """The tensors of a .safetensors file, on its pages: what is not read takes no memory, and what is read can be given back.

    They stay what they are when another file takes its place by rename. Who writes to them writes to a copy of the page.
    """

    def __init__(self, path: Path):
        """Raises MissingInputError where no file is, StoreError for one that cannot be read."""
        super().__init__()
        from safetensors import SafetensorError, safe_open

        if not path.is_file():  # a pipe or a device neither
            raise MissingInputError(f"{path} does not exist", "weights are read from there", "name a whole checkpoint")
        try:
            with safe_open(
                path, "pt"
            ):  # checks the header: that parts meet, end where the file does, and have a known type
                pass
            with files.open_file(path) as file:
                self._pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            start = 8 + int.from_bytes(self._pages[:8], "little")
            for name, about in json.loads(self._pages[8:start]).items():
                if name != "__metadata__":
                    self[name] = self._tensor(TYPES[about["dtype"]], about["shape"], start + about["data_offsets"][0])
        except OSError as error:
            raise read_error(error, path, "take it from another checkpoint") from error
        except (SafetensorError, RuntimeError, ValueError, KeyError, MemoryError) as error:  # KeyError: a type not read
            refused = system_error(error)
            if refused is not None:
                raise read_error(refused, path) from error
            raise StoreError(f"{path} cannot be read", str(error), "take it from another checkpoint") from error
        self._address = torch.frombuffer(self._pages, dtype=torch.uint8).data_ptr()

    def _tensor(self, dtype: torch.dtype, shape: Sequence[int], begin: int) -> Tensor:
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        if begin % dtype.itemsize:  # by somebody else, who does not align
            raw = bytearray(self._pages[begin : begin + count * dtype.itemsize])
            return torch.frombuffer(raw, dtype=dtype).view(shape)
        return torch.frombuffer(self._pages, dtype=dtype, count=count, offset=begin).view(shape)

    def drop(self, tensor: Tensor) -> None:
        """Give back the memory of a tensor that nobody has written to; whoever reads it again reads the file again, in small
        pages: a row of a table shall not take 2 MiB.
        """
        begin = tensor.data_ptr() - self._address
        first, last = -(-begin // mmap.PAGESIZE), (begin + tensor.nbytes) // mmap.PAGESIZE
        if 0 <= begin < len(self._pages) and first < last:
            for advice in ("MADV_DONTNEED", "MADV_NOHUGEPAGE"):
                if hasattr(mmap, advice):
                    self._pages.madvise(getattr(mmap, advice), first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)


def safetensors_parts(tensors: dict[str, Tensor]) -> list[bytes | memoryview]:
    """The file of these, on a CPU, in parts that are no copies. Matrices begin at a cache line of the file, and so of its
    pages: who reads rows across two lines takes longer.
    """
    names = {dtype: name for name, dtype in TYPES.items()}
    ordered = sorted(tensors.items(), key=lambda one: (one[1].nbytes % _LINE > 0, -one[1].dtype.itemsize, one[0]))
    header, parts, begin = {}, list[bytes | memoryview](), 0
    for name, tensor in ordered:
        end = begin + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        if tensor.nbytes:
            parts.append(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _LINE)
    return [len(text).to_bytes(8, "little"), text, *parts]


class LargePages:
    """Room for tensors side by side on large pages where the system has them: filled with fewer faults, read with fewer
    translations.
    """

    def __init__(self, num_bytes: int):
        self._pages, self._used = mmap.mmap(-1, num_bytes, **_PRIVATE), 0
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._pages.madvise(mmap.MADV_HUGEPAGE)

    @staticmethod
    def size(count: int, dtype: torch.dtype) -> int:
        """Bytes that a tensor takes, up to the line where the next one begins."""
        return -(-count * dtype.itemsize // _LINE) * _LINE

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        count, begin = math.prod(shape), self._used
        self._used += self.size(count, dtype)
        assert self._used <= len(self._pages), f"{self._used} of {len(self._pages)} bytes"
        return torch.frombuffer(self._pages, dtype=dtype, count=count, offset=begin).view(shape)


def trim() -> None:
    """Give what was freed back to the system, where the C library keeps it for itself (glibc)."""
    release = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if release is not None:
        release(0)


def share_one_heap() -> None:
    """Before threads are started that allocate: what one has freed is there for all (glibc gives each its own heap otherwise). A user's
    MALLOC_ARENA_MAX stays.
    """
    _configure_heap({_ARENA_MAX: 1}, ["MALLOC_ARENA_MAX"])


def keep_freed_memory(device: torch.device) -> None:
    """Before a training on `device`, a CPU: what a step frees stays for the next one. glibc gives large blocks back to the system, and whoever asks for
    them again writes new pages, one fault for 4 KB. A user's MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_MAX_ and the like stay.
    """
    if device.type != "cpu":
        return
    theirs = ["MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_"]
    _configure_heap({_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: 64 << 20}, theirs)


def _configure_heap(values: dict[int, int], variables: list[str]) -> None:
    """Tell the C library, where it can be told and none of the variables of the environment, nor GLIBC_TUNABLES, tells it already."""
    configure = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if configure is None or any(name in os.environ for name in [*variables, "GLIBC_TUNABLES"]):
        return
    for name, value in values.items():
        configure(name, value)


def untouched_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU in small pages that take memory when they are first written."""
    count = math.prod(shape)
    if device.type != "cpu" or not count:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize, **_PRIVATE), dtype=dtype).view(shape)
