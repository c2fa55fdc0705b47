"""Faiss factory strings: which fits a number of vectors, what can be built, and why not.

Letters: Z embedding width.
"""

import math
import re
from typing import Any

from retro_engine.errors import UsageError

METRICS = ("ip", "l2")
MIN_PER_LIST = 39  # training vectors for each list: Faiss warns below


def factory_for(num_vectors: int, width: int) -> str:
    """The kind of index for a number of vectors."""
    if num_vectors < 50_000:
        return "Flat"
    if num_vectors < 10**6:
        return f"IVF{2 ** round(math.log2(4 * math.sqrt(num_vectors)))},Flat"
    if num_vectors < 10**7:
        return "IVF16384,SQ8"
    subquantizers = max(m for m in range(1, max(1, width // 8) + 1) if width % m == 0)
    lists = 1 << 16 if num_vectors < 3 * 10**8 else 1 << 17 if num_vectors < 10**9 else 1 << 18
    return f"IVF{lists}_HNSW32,PQ{subquantizers}"


def clamp_lists(factory: str, num_vectors: int) -> str:
    """The factory with no more lists than can be trained: n / 39, at least one."""
    most = max(1, num_vectors // MIN_PER_LIST)
    return re.sub(r"IVF(\d+)", lambda found: f"IVF{min(int(found[1]), most)}", factory)


def num_lists(factory: str) -> int:
    found = re.search(r"IVF(\d+)", factory)
    return int(found[1]) if found else 0


def make_faiss(factory: str, width: int, metric: str) -> Any:
    """An empty index. Raises UsageError for a factory string that Faiss does not know."""
    import faiss

    try:
        index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT if metric == "ip" else faiss.METRIC_L2)
    except RuntimeError as error:
        raise UsageError(f"--faiss {factory} cannot be used", _reason(error), "--faiss auto chooses by size") from error
    if num_lists(factory):
        faiss.extract_index_ivf(index).cp.min_points_per_centroid = 1
    return index


def refuse_unreadable(factory: str) -> None:
    """Raise UsageError, before anything is embedded, for a string that Faiss reads at no width."""
    if factory == "auto":
        return
    try:
        make_faiss(factory, 3360, "ip")  # divisible by most numbers of subquantizers
    except UsageError as error:
        if "could not parse" in error.why:
            raise


def cannot_build(factory: str, num_vectors: int, error: Exception) -> UsageError:
    return UsageError(
        f"--faiss {factory} cannot be built from {num_vectors:,} chunks",
        _reason(error),
        "--faiss auto chooses by size",
    )


def _reason(error: Exception) -> str:
    """What Faiss says, without its source line."""
    return re.sub(r"^Error in .*?\.(cpp|h):\d+: ", "", str(error).strip().splitlines()[-1])
