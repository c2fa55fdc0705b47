"""The vectors of a store's chunks: built shard by shard, opened memory-mapped, searched exactly.

Reads and writes EMBEDDINGS/embedding.json (how they are made, settled before the first is), vectors-NNNNN.npy
(f4 or f2 [chunks, Z], 65,536 chunks each) with their markers, and manifest.json.
Letters: U chunks, Q queries, K neighbors, Z embedding width.
"""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retro_engine.data import files
from retro_engine.data.manifests import EMBEDDING
from retro_engine.data.store import Store
from retro_engine.errors import MissingInputError, StoreError, read_error
from retro_engine.progress import Reporter, duration, seconds_each
from retro_engine.retrieval.embed import Embedding, choose_embedding, open_embedder, short_name
from retro_engine.retrieval.executor import Executor, Piece, Stage, run_stage

SHARD_ROWS = 1 << 16
EMBEDDING_FILE = "embedding.json"
SAMPLE_ROWS = 64
EXACT_BLOCK = 1 << 14  # vectors compared with the queries at once


def vectors_folder(store: Store, model: str) -> Path:
    return store.folder / "embeddings" / short_name(model)


def build_vectors(
    store: Store,
    model: str,
    executor: Executor | None = None,
    reporter: Reporter | None = None,
    **choices: Any,
) -> "Vectors":
    """The vectors of every chunk, built where they are missing or damaged; `choices` are those of `choose_embedding`.

    Says first what it will cost, measured on a sample. Peak memory: the model, and one shard of texts and vectors.
    Raises StoreError when vectors of another store, model or precision lie there.
    """
    reporter, executor = reporter or Reporter("quiet"), executor or Executor()
    folder = vectors_folder(store, model)
    with files.locked(folder):
        embedding = _settle_embedding(store, model, folder, reporter, choices)
        count = -(-store.num_rows // SHARD_ROWS)
        spec = {"store": store.fingerprint, "embedding": embedding.to_json(), "shard_rows": SHARD_ROWS}
        stage = Stage(
            f"embed {embedding.name}",
            embed_shard,
            spec=json.dumps(spec, sort_keys=True),
            folder=folder.resolve(),
            outputs=tuple(f"vectors-{number:05d}.npy" for number in range(count)),
            paths=(str(store.folder.resolve()), model if embedding.name == "hash" else str(_absolute(model))),
            is_stateful=embedding.name != "hash",
            gpus=float(embedding.name != "hash" and has_gpu()),
        )
        hashes = run_stage(stage, executor, reporter)
        content = {"embedding": embedding.to_json(), "store": store.fingerprint, "files": hashes}
        _publish_manifest(folder, content)
    return Vectors(folder, store)


def embed_shard(stage: Stage, shard: int) -> Sequence[Piece]:
    """One shard's vectors as .npy."""
    spec = json.loads(stage.spec)
    store = Store(stage.paths[0])
    embedder = open_embedder(Embedding(**spec["embedding"]), stage.paths[1])
    first = shard * spec["shard_rows"]
    vectors = embedder.rows(store, first, min(first + spec["shard_rows"], store.num_rows))
    buffer = io.BytesIO()
    np.save(buffer, vectors.astype(embedder.embedding.dtype), allow_pickle=False)
    return [buffer.getbuffer()]


def _settle_embedding(store: Store, model: str, folder: Path, reporter: Reporter, choices: dict[str, Any]) -> Embedding:
    """The embedding that an earlier run chose, else one chosen now: an interrupted build goes on as it began."""
    path = folder / EMBEDDING_FILE
    try:
        known = files.read_json(path)
        EMBEDDING(known["embedding"], EMBEDDING_FILE)
        mark, embedding = str(known["store"]), Embedding(**known["embedding"])
    except FileNotFoundError:
        pass
    except OSError as error:
        raise read_error(error, path) from error
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is damaged", "it cannot be read", f"rm -r {folder}, then build again") from error
    else:
        store.check_mark(mark, f"{folder} has vectors of store", f"rm -r {folder}, then build them again")
        _refuse_other_choices(folder, embedding, choices)
        return embedding
    middle = max(0, (store.num_rows - SAMPLE_ROWS) // 2)
    sample = [text for batch in store.texts(middle, min(middle + SAMPLE_ROWS, store.num_rows)) for text in batch]
    embedding, measured = choose_embedding(model, sample, **choices)
    if measured:
        reporter.say(measured)
    _say_cost(store, model, embedding, reporter)
    text = json.dumps({"store": store.fingerprint, "embedding": embedding.to_json()}, sort_keys=True)
    files.publish(path, [text.encode() + b"\n"])
    return embedding


def _refuse_other_choices(folder: Path, embedding: Embedding, choices: dict[str, Any]) -> None:
    for key, wanted in choices.items():
        found = getattr(embedding, key)
        if wanted not in (None, "auto", found) and embedding.name != "hash":
            raise StoreError(
                f"{folder} was made with {key} {found!r}",
                f"{wanted!r} is asked for",
                f"rm -r {folder} to make it anew",
            )


def _say_cost(store: Store, model: str, embedding: Embedding, reporter: Reporter) -> None:
    embedder = open_embedder(embedding, model)
    each_s = seconds_each(lambda first, last: embedder.rows(store, first, last), store.num_rows, SAMPLE_ROWS)
    seconds = each_s * store.num_rows
    reporter.confirm(
        f"embedding {store.num_rows:,} chunks of {store.folder} with {embedding.name} at "
        f"{1 / max(each_s, 1e-9):,.0f}/s: about {duration(seconds)}",
        seconds,
    )


def _absolute(model: str) -> str:
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _publish_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write the manifest; one that says the same stays as it is."""
    try:
        known = files.read_manifest(folder, "embeddings")
        if all(known[key] == value for key, value in content.items()):
            return
    except (MissingInputError, StoreError, KeyError):
        pass
    files.write_manifest(folder, "embeddings", content)


class Vectors:
    """The published vectors of a store, memory-mapped; a file's hash is compared when it is first read."""

    def __init__(self, folder: Path, store: Store | None = None):
        """Raises MissingInputError, or StoreError for damaged vectors and those of another store."""
        self.folder = folder
        self.manifest = files.read_manifest(folder, "embeddings")
        try:
            self.embedding = Embedding(**self.manifest["embedding"])
        except (KeyError, TypeError) as error:
            raise StoreError(f"{folder} was made by another version", "", f"rm -r {folder}") from error
        if store is not None:
            do = f"rm -r {folder}, then build them again"
            store.check_mark(self.manifest["store"], f"{folder} has vectors of store", do)
        self._names = sorted(self.manifest["files"])
        self._shards = [files.map_npy(files.child(folder, name), self.embedding.dtype, 2) for name in self._names]
        self._is_checked = [False] * len(self._shards)
        self.width = self.embedding.width
        self._starts = np.cumsum([0] + [len(shard) for shard in self._shards])
        self.num_rows = int(self._starts[-1])
        for shard in self._shards:
            if shard.shape[1] != self.width:
                raise StoreError(
                    f"{folder} has vectors {shard.shape}", f"width {self.width} was expected", "retro embed"
                )
        if store is not None and self.num_rows != store.num_rows:
            raise StoreError(f"{folder} has {self.num_rows} vectors", f"the store has {store.num_rows} chunks")

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    def rows(self, first: int, last: int) -> np.ndarray:
        """[last - first, Z] f32."""
        parts = [
            self._checked(number)[max(first - start, 0) : max(last - start, 0)]
            for number, (shard, start) in enumerate(zip(self._shards, self._starts))
            if start < last and start + len(shard) > first
        ]
        return np.concatenate(parts).astype(np.float32) if parts else np.empty((0, self.width), np.float32)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """[*rows.shape, Z] f32 of the given rows; read in the order of the file."""
        flat = rows.reshape(-1)
        order = np.argsort(flat, kind="stable")
        shard_of = np.searchsorted(self._starts, flat, "right") - 1
        out = np.empty((len(flat), self.width), np.float32)
        for number in np.unique(shard_of):
            places = order[shard_of[order] == number]
            out[places] = self._checked(number)[flat[places] - self._starts[number]]
        return out.reshape(*rows.shape, self.width)

    def _checked(self, number: int) -> np.ndarray:
        """One file's vectors. Raises StoreError where they are not those that the manifest names."""
        if not self._is_checked[number]:
            name = self._names[number]
            files.verify_files(self.folder, {name: self.manifest["files"][name]})
            self._is_checked[number] = True
        return self._shards[number]

    def blocks(self, size: int = EXACT_BLOCK) -> Iterator[tuple[int, np.ndarray]]:
        """First row and vectors of every stretch of at most `size`."""
        for first in range(0, self.num_rows, size):
            yield first, self.rows(first, min(first + size, self.num_rows))

    def verify(self) -> None:
        """Compare every file with the manifest, and every value with what a vector can be."""
        files.verify_files(self.folder, self.manifest["files"])
        for first, block in self.blocks():
            if not np.isfinite(block).all():
                raise StoreError(
                    f"{self.folder} has NaN in chunks {first} ...", "", f"rm -r {self.folder}, then retro embed"
                )

    def summary(self) -> dict[str, Any]:
        return {
            "kind": "embeddings",
            **self.embedding.to_json(),
            "embedder": self.manifest["embedding"]["fingerprint"],
            "chunks": self.num_rows,
            "dtype": self.embedding.dtype.str,
            "store": self.manifest["store"],
            "fingerprint": self.fingerprint,
        }


class ExactSearch:
    """Every vector is compared: the k best by inner product or by distance, with torch; on a GPU when there is one.

    On a GPU the vectors are kept there in half precision (10^8 x 384 are 77 GB); on a CPU they stay in their file.
    The oracle that recall is measured against.
    """

    def __init__(self, vectors: Vectors, metric: str = "ip"):
        import torch

        self.vectors, self.metric = vectors, metric
        self.device = torch.device("cuda" if has_gpu() else "cpu")
        self._kept: list[tuple[int, Any]] = []
        if self.device.type != "cpu":
            self._kept = [(first, torch.from_numpy(x).to(self.device).half()) for first, x in vectors.blocks(1 << 18)]

    def search(self, queries_QZ: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores [Q, k] (squared distances for l2) and rows [Q, k], best first, -1 = fewer vectors than k."""
        import torch

        queries = torch.from_numpy(np.ascontiguousarray(queries_QZ, np.float32)).to(self.device)
        best = torch.full((len(queries), 0), -torch.inf, device=self.device)
        ids = torch.zeros((len(queries), 0), dtype=torch.int64, device=self.device)
        blocks = self._kept or ((first, torch.from_numpy(x)) for first, x in self.vectors.blocks())
        for first, block in blocks:
            scores = (queries.to(block.dtype) @ block.T).float()
            if self.metric == "l2":
                scores = 2 * scores - block.float().square().sum(1) - queries.square().sum(1, keepdim=True)
            top, place = scores.topk(min(k, len(block)), dim=1)
            best, ids = torch.cat((best, top), 1), torch.cat((ids, place + first), 1)
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            ids = ids.gather(1, order)
        found, rows = best.cpu().numpy(), ids.cpu().numpy()
        missing = k - rows.shape[1]
        found = np.pad(found, ((0, 0), (0, missing)), constant_values=-np.inf)
        rows = np.pad(rows, ((0, 0), (0, missing)), constant_values=-1)
        return (-found if self.metric == "l2" else found), rows
