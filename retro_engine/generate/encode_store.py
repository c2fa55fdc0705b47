"""`retro encode`: the encoded neighbors of every chunk of a store, written once; and which of them a model may read.

A shard is some chunks, each with its continuation as retrieval hands it over. The format is model/encoding_file.py's.
Letters: U chunks, R tokens per neighbor.
"""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from retro_engine.config import ModelConfig
from retro_engine.data import array_file, files
from retro_engine.data.loader import NeighborLoader
from retro_engine.data.store import Store
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import OutOfResourceError, UsageError
from retro_engine.generate.generator import model_coding
from retro_engine.generate.open_model import OpenedModel
from retro_engine.model.device import pick_device
from retro_engine.model.encoding_file import (
    FORMAT,
    INDEX,
    EncodingFile,
    EncodingOrigin,
    digest_of,
    make_index,
    num_values,
    to_values,
)
from retro_engine.model.encodings import check_encodes_alone, encode_each
from retro_engine.model.retro import RetroModel
from retro_engine.model.weights import config_to_json
from retro_engine.progress import Reporter, duration
from retro_engine.retrieval.executor import Executor, Piece, Stage, run_stage
from retro_engine.train import checkpoint
from retro_engine.train.adapters import load_model
from retro_engine.train.run_data import IN_FRONT

SHARD_BYTES = 256 << 20
BATCH = 32  # neighbors encoded at once
BLOCK_ROWS = 1 << 14  # neighbors whose tokens are looked at at once


def origin_of(folder: Path, config: ModelConfig, tokenizer: Tokenizer, store: Store) -> EncodingOrigin:
    """Of the encodings that the model of a checkpoint's folder has of a store: by the files, so that it is the same whatever
    type its weights are computed in; and of neighbors in front however many are read.
    """
    config = replace(config, num_neighbors=1) if config.reads_prefix else config
    weights = files.fingerprint([checkpoint.weights_fingerprint(folder), config_to_json(config)])
    return EncodingOrigin(weights=weights, tokenizer=tokenizer.fingerprint, store=store.fingerprint, r=config.r)


def encodings_folder(store: Store, origin: EncodingOrigin) -> Path:
    return store.folder / "encodings" / origin.fingerprint[:16]


def encode_store(
    opened: OpenedModel,
    store: Store,
    out: Path | None = None,
    executor: Executor | None = None,
    reporter: Reporter | None = None,
) -> EncodingFile:
    """The encodings of every chunk of a store, made where they are missing or damaged; `out` None: beside the store.

    Says first how many bytes it will take and how long. A plain decoder is opened and let read (`read_in_front`) before. Raises UsageError for a model whose neighbors cannot be kept,
    StoreError for a store that it does not read, OutOfResourceError for a disk that is too small.
    """
    reporter, config = reporter or Reporter("quiet"), opened.model.config
    check_encodes_alone(config)
    model_coding(opened.model, opened.tokenizer).check(store.coding)
    origin = origin_of(opened.folder, config, opened.tokenizer, store)
    folder = out or encodings_folder(store, origin)
    digests, lengths_U = _neighbors_of(store, config.r)
    width = num_values(config)
    shard_rows = max(1, SHARD_BYTES // (2 * width * config.r))
    in_front = {name: getattr(config, name) for name in IN_FRONT}
    spec = {**asdict(origin), "format": FORMAT, "shard_rows": shard_rows, "in_front": in_front}
    with files.locked(folder):
        _refuse_other(folder, origin)
        stage = Stage(
            "encode",
            encode_shard,
            spec=json.dumps(spec, sort_keys=True),
            folder=folder.resolve(),
            outputs=tuple(f"values-{number:05d}.bin" for number in range(-(-store.num_rows // shard_rows))),
            paths=(str(store.folder.resolve()), str(opened.folder.resolve())),
            is_stateful=True,
            gpus=1.0 if torch.cuda.is_available() else 0.0,
        )
        _say_cost(opened.model, store, folder, int(lengths_U.sum()) * width * 2, reporter)
        hashes = run_stage(stage, executor or Executor(), reporter)
        hashes[INDEX] = array_file.write_array(
            folder / INDEX, "enc-index", make_index(digests, lengths_U), origin.fingerprint
        )
        content = {**asdict(origin), "format": FORMAT, "values": width, "files": hashes}
        files.write_manifest(folder, "encodings", content)
    return EncodingFile(folder)


def encode_shard(stage: Stage, shard: int) -> Sequence[Piece]:
    """One shard's array file."""
    spec = json.loads(stage.spec)
    origin = EncodingOrigin(**{name: spec[name] for name in ("weights", "tokenizer", "store", "r")})
    store, model = Store(stage.paths[0]), _open(stage.paths[1])
    model.config = replace(model.config, **spec["in_front"])  # a plain decoder's says nothing of how it reads
    first = shard * spec["shard_rows"]
    values = encode_rows(model, store, first, min(first + spec["shard_rows"], store.num_rows))
    return array_file.array_parts("encodings", values, origin.fingerprint)


def encode_rows(model: RetroModel, store: Store, first: int, last: int) -> np.ndarray:
    """u2 [tokens, c*g*e] of the neighbors that begin at a store's rows first ... last - 1."""
    loader, device, parts = NeighborLoader([store]), model.device, []
    for start in range(first, last, BATCH):
        rows = np.arange(start, min(start + BATCH, last))
        tokens, lengths = (torch.from_numpy(array).to(device) for array in loader.gather(rows, model.config.r))
        parts.append(to_values(encode_each(model, tokens, lengths)))
    return np.concatenate(parts)


@lru_cache(1)
def _open(folder: str) -> RetroModel:
    """The model of a checkpoint; kept, since the next shard needs it too."""
    return load_model(folder).to(pick_device())


def _neighbors_of(store: Store, R: int) -> tuple[list[bytes], np.ndarray]:
    """The digest and the length of every neighbor."""
    loader, digests, lengths = NeighborLoader([store]), [], []
    for first in range(0, store.num_rows, BLOCK_ROWS):
        tokens, valid = loader.gather(np.arange(first, min(first + BLOCK_ROWS, store.num_rows)), R)
        digests += [digest_of(row[:length].tobytes()) for row, length in zip(tokens, valid)]
        lengths.append(valid)
    return digests, np.concatenate([np.zeros(0, np.int64), *lengths])


def _refuse_other(folder: Path, origin: EncodingOrigin) -> None:
    """Raises UsageError where something else lies, StoreError for a manifest that cannot be read."""
    path = folder / files.MANIFEST
    if path.is_file():
        found = files.read_object(path, f"rm {path}, then the same command again")
        wanted = {"kind": "encodings", **asdict(origin)}
        if wanted != {key: found.get(key) for key in wanted}:
            raise UsageError(f"{folder} holds something else", "it is not overwritten", "choose another --out")


def _say_cost(model: RetroModel, store: Store, folder: Path, num_bytes: int, reporter: Reporter) -> None:
    there = sum(path.stat().st_size for path in folder.glob("values-*.bin"))
    free = shutil.disk_usage(folder).free
    if num_bytes - there > free:
        raise OutOfResourceError(
            f"no space left for {folder}",
            f"the encodings take {num_bytes:,} bytes, {there:,} are there, {free:,} are free",
            "free some space, or name a folder elsewhere: --out FOLDER",
        )
    sample = min(BATCH, store.num_rows)
    start = time.monotonic()
    encode_rows(model, store, 0, sample)
    seconds = (time.monotonic() - start) / max(1, sample) * store.num_rows
    size = f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e7 else f"{num_bytes:,} bytes"
    reporter.confirm(
        f"encoding {store.num_rows:,} chunks of {store.folder}: {size}, about {duration(seconds)}", seconds
    )


def open_encodings(
    folder: Path, config: ModelConfig, tokenizer: Tokenizer, stores: Sequence[Store], named: Sequence[str | Path] = ()
) -> list[EncodingFile]:
    """What the model of a checkpoint's folder may read instead of encoding: the folders that are named, and those that
    `retro encode` has made beside the stores that are read.

    Raises UsageError or StoreError for a named one that is not of this model and of one of these stores, and for one that is
    damaged.
    """
    if not config.encodes_alone:
        if named:
            check_encodes_alone(config)
        return []
    if named and not stores:
        raise UsageError(
            f"encodings of {named[0]} cannot be used", "they are of a store, and no store is read", "name it"
        )
    origins = [origin_of(folder, config, tokenizer, store) for store in stores]
    beside = [encodings_folder(store, origin) for store, origin in zip(stores, origins)]
    given = [Path(name) for name in named]
    made = [path for path in beside if path not in given and (path / files.MANIFEST).is_file()]
    found = [EncodingFile(path) for path in (*given, *made)]
    for file in found:
        file.check(origins)
    return found
