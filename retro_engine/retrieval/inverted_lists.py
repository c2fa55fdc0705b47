"""Inverted lists in files, and Faiss indexes from files whose hashes were checked.

lists-NNNNN.bin, and the parts it is merged from: list by list the codes and i8 chunk ids of its vectors, then the i8 size
of every list.
"""

from pathlib import Path
from typing import Any

import numpy as np

from retro_engine.data import files
from retro_engine.errors import StoreError, read_error, system_error

LISTS_BYTES = 8  # of an id, and of a list's size


def read_faiss(path: Path) -> Any:
    """A Faiss index from a file whose hash was checked; with limits. Raises StoreError for what Faiss cannot read."""
    import faiss

    raw = np.frombuffer(files.read_bytes(path, 1 << 40), np.uint8)
    faiss.set_deserialization_vector_byte_limit(max(1 << 20, 64 * len(raw)))
    try:
        return faiss.deserialize_index(raw)
    except RuntimeError as error:
        raise StoreError(
            f"{path} is not a Faiss index", str(error).strip().splitlines()[-1], "build it again"
        ) from error


class ListsFile:
    """A file of inverted lists, memory-mapped."""

    def __init__(self, path: Path, num_lists: int, code_size: int):
        """Raises StoreError when its sizes contradict its length."""
        self.path, self.code_size = path, code_size
        raw = files.mapped(path)
        entry = code_size + LISTS_BYTES
        ends = len(raw) - LISTS_BYTES * num_lists
        self.sizes = raw[max(ends, 0) :].view("<i8").astype(np.int64) if ends >= 0 else np.zeros(0, np.int64)
        if ends < 0 or (self.sizes < 0).any() or self.sizes.max(initial=0) > ends or self.sizes.sum() * entry != ends:
            raise StoreError(
                f"{path} contradicts itself", f"{len(raw):,} bytes, {num_lists} lists", "retro index again"
            )
        self._raw = raw
        self.offsets = np.concatenate(([0], np.cumsum(self.sizes * entry)))

    def codes(self, number: int) -> np.ndarray:
        start = self.offsets[number]
        return self._raw[start : start + self.sizes[number] * self.code_size]

    def ids(self, number: int) -> np.ndarray:
        return self._raw[self.offsets[number] + self.sizes[number] * self.code_size : self.offsets[number + 1]]


def map_lists(ivf: Any, lists: ListsFile) -> Any:
    """Give a Faiss index its lists where they lie; Faiss maps the file read-only."""
    import faiss

    mapped: Any = faiss.OnDiskInvertedLists()
    mapped.nlist, mapped.code_size, mapped.read_only = ivf.nlist, ivf.code_size, True
    mapped.filename, mapped.totsize = str(lists.path), lists.path.stat().st_size
    mapped.lists.resize(ivf.nlist)
    sizes = lists.sizes.astype(np.uint64)  # named: a pointer does not keep its array
    mapped.set_all_lists_sizes(faiss.swig_ptr(sizes))
    mapped.prefetch_nthread = 0  # threads that are started for every query cost 1.2 ms
    try:
        mapped.do_mmap()
    except RuntimeError as error:  # Faiss' own, which has the system's in its text
        refused = system_error(error)
        if refused is not None:
            raise read_error(refused, lists.path) from error
        raise StoreError(f"{lists.path} cannot be mapped", str(error)) from error
    ivf.replace_invlists(mapped, False)
    return mapped
