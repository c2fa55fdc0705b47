"""Files mapped for reading without a descriptor that stays: a store of thousands of shards opens at any limit of open files.

Python's own `mmap` (and NumPy's memmap over it) keeps a copy of the descriptor for as long as the mapping lives.
"""

import ctypes
import io
import mmap
import os
import weakref

import numpy as np

_C = ctypes.CDLL(None, use_errno=True)
_C.mmap.restype = ctypes.c_void_p
_C.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_C.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FAILED = ctypes.c_void_p(-1).value


def map_bytes(file: io.FileIO, size: int) -> np.ndarray:
    """[size] u1, read-only, of an open file, which may be closed then. Raises OSError: where the file is shorter too.

    The caller has compared `size` with what the file says of itself: a page behind the end of a file ends the process.
    """
    found = os.fstat(file.fileno()).st_size
    if found < size:
        raise OSError(f"it has {found:,} bytes, and {size:,} are to be mapped")
    if not size:
        return np.empty(0, np.uint8)
    address = _C.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"{os.strerror(number)}, mapping {size:,} bytes")
    pages = (ctypes.c_uint8 * size).from_address(address)
    weakref.finalize(pages, _C.munmap, address, size).atexit = False  # threads may read until the process ends
    values = np.frombuffer(memoryview(pages), np.uint8)
    values.setflags(write=False)
    return values
