"""numba with as many threads as OMP_NUM_THREADS says, which numba itself does not read.

It must be settled before numba is imported: numba and torch share one OpenMP runtime, and whoever starts numba's
threads decides how many torch has from then on.
"""

import os

if os.environ.get("OMP_NUM_THREADS", "").isdigit():
    os.environ.setdefault("NUMBA_NUM_THREADS", os.environ["OMP_NUM_THREADS"])

import numba  # noqa: E402

__all__ = ["numba"]
