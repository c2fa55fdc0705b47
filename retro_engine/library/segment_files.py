"""A segment of a live library on the disk: LIBRARY/segments/NNNNNNNN/.

manifest.json, one .npy file per array and, from 2,048 chunks on, codes.faiss; docs/library.md has their types. Nothing
is mapped before its SHA-256 is the manifest's, and nothing is searched before it fits together.
"""

import errno
import hashlib
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from retro_engine.data import files
from retro_engine.errors import StoreError, system_error, write_error, writing
from retro_engine.library import codes as library_codes
from retro_engine.library.codes import CodedVectors
from retro_engine.library.segments import Segment
from retro_engine.retrieval.postings import Postings, do_fit

DTYPES = {
    "keys": np.int64,
    "starts": np.int32,
    "lengths": np.int32,
    "terms": np.uint64,
    "term_starts": np.int64,
    "chunks": np.int32,
    "counts": np.uint16,
}
LARGEST = 1e3  # component of a vector: far above a unit vector's, far below what overflows
VECTORS, CODES = "vectors.npy", "codes.faiss"


def publish_segment(segment: Segment, folder: Path, parent: str) -> str:
    """Write a segment of the library with settings `parent`; return its fingerprint."""
    with writing(folder):
        return _publish(segment, folder, parent)


def _publish(segment: Segment, folder: Path, parent: str) -> str:
    files.make_folder(folder)
    hashes = {}
    for name, values in arrays_of(segment).items():
        hashes[f"{name}.npy"] = _publish_array(folder / f"{name}.npy", values)
    content: dict[str, Any] = {"library": parent, "documents": len(segment.keys), "chunks": len(segment.lengths)}
    if segment.vectors is not None:
        content["width"] = segment.vectors.shape[1]
        hashes[VECTORS] = _publish_array(folder / VECTORS, segment.vectors)
        if len(segment.vectors) >= library_codes.MIN_CHUNKS:
            content[f"recall_at_{library_codes.RECALL_AT}"] = _publish_codes(folder / CODES, segment.vectors)
            hashes[CODES] = files.sha256_file(folder / CODES)
    return files.write_manifest(folder, "segment", {**content, "files": hashes})


def arrays_of(segment: Segment) -> dict[str, np.ndarray]:
    """What is written of a segment, by the names in `DTYPES`."""
    found = segment.inverted
    each = segment.keys, segment.starts, segment.lengths, found.terms, found.starts, found.chunks, found.values
    return dict(zip(DTYPES, each))


def _publish_codes(path: Path, vectors: np.ndarray) -> float:
    """Write the codes of vectors; return the recall of searching them."""
    import faiss

    faiss.omp_set_num_threads(1)  # of this thread only: questions are answered at the same time
    codes = CodedVectors.make(vectors)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        codes.write(temporary)
    except RuntimeError as error:  # Faiss raises nothing narrower for a failed write
        raise write_error(system_error(error) or OSError(errno.EIO, str(error)), path) from error
    files.publish_file(temporary, path)
    return codes.recall()


def _publish_array(path: Path, values: np.ndarray) -> str:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    files.publish(path, [buffer.getbuffer()])
    return hashlib.sha256(buffer.getbuffer()).hexdigest()


def open_segment(folder: Path, parent: str, fingerprint: str) -> Segment:
    """A published segment, memory-mapped. Raises MissingInputError or StoreError when it is not whole, or another's."""
    manifest = files.read_manifest(folder, "segment")
    if (manifest["library"], manifest["fingerprint"]) != (parent, fingerprint):
        raise StoreError(f"{folder} is another segment", "the library names its fingerprint", "it is built again")
    files.verify_files(folder, manifest["files"], needed=[f"{name}.npy" for name in DTYPES])
    load: dict[str, Any] = {name: files.map_npy(folder / f"{name}.npy", DTYPES[name], 1) for name in DTYPES}
    vectors = files.map_npy(folder / VECTORS, np.float32, 2) if VECTORS in manifest["files"] else None
    if not _do_fit(load, vectors, manifest):
        raise StoreError(f"{folder} contradicts itself", "its arrays do not fit", "it is built again")
    starts = load["term_starts"]
    postings = Postings(load["terms"], starts[:-1], starts[1:], load["chunks"], load["counts"])
    segment = Segment(load["keys"], load["starts"], load["lengths"], postings, vectors, folder=folder)
    if CODES in manifest["files"] and segment.vectors is not None:
        segment = replace(segment, codes=CodedVectors.open(folder / CODES, segment.vectors))
    return segment


def _do_fit(load: dict[str, Any], vectors: np.ndarray | None, manifest: dict[str, Any]) -> bool:
    """Everything that the search loops take for granted: numba checks no bounds."""
    keys, starts, lengths, terms, term_starts, chunks, counts = load.values()
    count = manifest["chunks"]
    return (
        len(keys) == manifest["documents"] >= 1
        and len(starts) == len(keys) + 1
        and len(lengths) == count
        and (int(starts[0]), int(starts[-1])) == (0, count)
        and bool((np.diff(starts) > 0).all() and (np.diff(keys) > 0).all())
        and do_fit(terms, term_starts, chunks, counts, count)
        and int(counts.min(initial=1)) > 0
        and int(np.take(lengths, chunks).min(initial=1)) > 0
        and bool((lengths >= 0).all())
        and (vectors is None or vectors.shape == (count, manifest.get("width")))
        and (vectors is None or (float(vectors.min()) >= -LARGEST and float(vectors.max()) <= LARGEST))
    )
