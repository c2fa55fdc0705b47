"""`retro merge`: stores of one tokenizer and chunk size as one, and documents left out that repeat others.

`exact` leaves out what says the same (`contents`); `minhash` also what nearly does: MinHash signatures of runs of five
tokens, compared where one of 32 bands of 4 agrees, so that of two documents that share .8 of their runs (Jaccard) one in
10^7 pairs is missed. The first stays. The tokens are copied as they are. Reads stores; writes one.
Letters: D documents, H hashes of a signature.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from retro_engine.data import files
from retro_engine.data.store import Store, StoreWriter
from retro_engine.errors import UsageError
from retro_engine.jit import numba

DEDUPLICATE = ("none", "exact", "minhash")
RUN = 5  # tokens
HASHES, BANDS, LEAST = 128, (1, 2, 4, 8), 0.05
PRIME = np.uint64(0x9E3779B97F4A7C15)


def merge(
    stores: Sequence[Store],
    out: Path,
    deduplicate: str = "none",
    threshold: float = 0.8,
    say: Callable[[str], None] = lambda line: None,
) -> Store:
    """Publish the documents of `stores`, in their order, as the store `out`; `threshold`: the share of all different runs of
    two documents that both have, from which on minhash takes them for the same.

    Raises StoreError for stores of different tokenizers or chunk sizes, UsageError for one that is named twice.
    """
    if deduplicate not in DEDUPLICATE:
        raise UsageError(f"--deduplicate {deduplicate} does not exist", "", f"one of {', '.join(DEDUPLICATE)}")
    if not LEAST <= threshold <= 1:
        raise UsageError(f"--threshold {threshold} cannot be used", f"it is a share of {LEAST} to 1")
    if len({store.fingerprint for store in stores}) < len(stores):
        raise UsageError("a store is named twice", "its documents would be in twice", "name it once")
    stores[0].coding.check(*(store.coding for store in stores[1:]))
    kept = _kept(stores, deduplicate, threshold)
    with files.locked(out):
        writer = StoreWriter(out, stores[0].tokenizer, stores[0].chunk_size)
        for store, is_kept in zip(stores, np.split(kept, np.cumsum([s.num_documents for s in stores])[:-1])):
            for document in np.flatnonzero(is_kept).tolist():
                size, contents = int(store.documents[document, 2]), int(store.contents[document])
                writer.add_tokens(store.name(document), document_tokens(store, document), size, contents)
        losses = {str(loss): loss for store in stores for loss in store.manifest.get("losses") or ()}
        made = writer.close(list(losses.values()))
    if deduplicate != "none":
        say(f"{int((~kept).sum()):,} of {len(kept):,} documents repeat earlier ones and are left out")
    return made


def band_of(threshold: float) -> int:
    """Hashes of a band: the most with which two documents that are as alike as `threshold` are compared in 99 of 100 cases,
    1 - (1 - t^b)^(h / b) (Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4).
    """
    fits = [size for size in BANDS if 1 - (1 - threshold**size) ** (HASHES // size) >= 0.99]
    return max(fits, default=1)


def document_tokens(store: Store, document: int) -> np.ndarray:
    """The tokens of a document, its end included."""
    first, last = store.document_rows(document)
    return store.rows(first, last)[0].reshape(-1)[: int(store.documents[document, 1])].astype(np.int64)


def _kept(stores: Sequence[Store], deduplicate: str, threshold: float) -> np.ndarray:
    """[D] whether each document stays."""
    contents = np.concatenate([store.contents for store in stores])
    kept = np.ones(len(contents), bool)
    if deduplicate != "none":
        kept[:] = False
        kept[np.unique(contents, return_index=True)[1]] = True
    if deduplicate != "minhash":
        return kept
    pairs = [(store, document) for store in stores for document in range(store.num_documents)]
    size = band_of(threshold)
    buckets: dict[tuple[int, bytes], list[int]] = {}
    signatures: dict[int, np.ndarray] = {}
    for number, (store, document) in enumerate(pairs):
        if not kept[number]:
            continue
        signature = signature_of(document_tokens(store, document)[:-1])
        bands = [(band, signature[band : band + size].tobytes()) for band in range(0, HASHES, size)]
        near = {other for band in bands for other in buckets.get(band, ())}
        if any((signatures[other] == signature).mean() >= threshold for other in near):
            kept[number] = False
            continue
        signatures[number] = signature
        for band in bands:
            buckets.setdefault(band, []).append(number)
    return kept


def signature_of(tokens: np.ndarray) -> np.ndarray:
    """[H] u4: the least of each of H hashes over all runs of five tokens; of a shorter document over what there is."""
    return np.asarray(_signature(tokens.astype(np.uint64), min(RUN, max(1, len(tokens)))))


@numba.njit(nogil=True, cache=True)
def _signature(tokens, run):  # type: ignore[no-untyped-def]
    out = np.full(HASHES, 0xFFFFFFFF, np.uint32)
    for start in range(len(tokens) - run + 1):
        mixed = np.uint64(0)
        for token in tokens[start : start + run]:
            mixed = (mixed ^ token) * PRIME
            mixed ^= mixed >> np.uint64(29)
        for number in range(HASHES):
            value = (mixed ^ np.uint64(2 * number + 1)) * (PRIME + np.uint64(2 * number))
            value ^= value >> np.uint64(32)
            value *= PRIME
            out[number] = min(out[number], np.uint32(value >> np.uint64(32)))
    return out
