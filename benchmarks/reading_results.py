"""A part of text_results.py: what else than two neighbors of each chunk gives, read or trained with, on re-used text.

reading-SEED: RETROs that differ in the neighbor table they are trained with: what BM25 finds, the same without neighbors that
have fewer than half of the chunk's different tokens, and the same put in the order of that share. Each reads its own table and
the first; the first also reads other numbers of neighbors, and neighbors found every 16 and every 8 tokens.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from memory_results import BATCHES, SHARES, Trial

from retro_engine.api import Retro
from retro_engine.data import files
from retro_engine.data.batches import Sequences, copies_of, split_documents
from retro_engine.data.neighbor_table import NeighborTable
from retro_engine.data.store import Store
from retro_engine.evaluate.compare import gain_of, show_gain
from retro_engine.evaluate.losses import DocumentLosses, show_interval
from retro_engine.evaluate.perplexity import evaluate
from retro_engine.evaluate.strides import Stride
from retro_engine.retrieval.neighbors import Filters, build_neighbors

PRESET = "tiny"
LEAST_SHARED = 0.5
TABLES = {"as it is": "bm25", "above an overlap": "bm25-overlap", "reranked": "bm25-reranked"}
FILTERS = {"bm25-overlap": Filters(least_shared=LEAST_SHARED), "bm25-reranked": Filters(reranks=True)}
COUNTS = (1, 2, 4, 8, 16)  # neighbors a chunk; two are trained with
PER_CHUNK = (2, 4)  # searches a chunk of 32 tokens: every 16, every 8


def reading(trial: Trial, store: Store) -> dict[str, Any]:
    trial, store = replace(trial, preset=PRESET), _own_store(trial.out, store)
    for name, filters in FILTERS.items():
        if not (store.folder / "neighbors" / name / files.MANIFEST).is_file():
            build_neighbors(store, [store], "bm25", name=name, filters=filters, reporter=trial.report)
    found: dict[str, DocumentLosses] = {}
    saves: dict[str, str] = {}
    for name, table in TABLES.items():
        own = ["model.retrieved_length=64", "model.num_neighbors=2", f"model.data.neighbors={table}"]
        retro = trial.run(store, name, own)
        if name == "as it is":
            found |= _first(retro, store)
            two = found["as it is, 2 neighbors"]
            for other in (other for other in TABLES if other != name):
                found[f"as it is, reading {other}"] = _losses(retro, store, TABLES[other])
        else:
            found[f"trained {name}, reading the same"] = _losses(retro, store, table)
            found[f"trained {name}, reading as it is"] = _losses(retro, store, TABLES["as it is"])
    for name, losses in found.items():
        if losses is not two:
            saves[f"{name}: saves against 2 neighbors as it is"] = show_gain(gain_of(losses, two))
    return {
        "shown": {name: f"{of.bits_per_byte:.4f} {show_interval(*of.interval())}" for name, of in found.items()}
        | saves,
        "documents": {name: of.nats.tolist() for name, of in found.items()},
    }


def _own_store(out: Path, store: Store) -> Store:
    """The store under another name, its files linked: the other parts name no table, since theirs has one."""
    folder = out / f"{store.folder.name}-reading"
    if not folder.exists():
        files.remove_tree(aside := folder.with_suffix(".tmp"))
        shutil.copytree(store.folder, aside, copy_function=os.link)
        aside.rename(folder)
    return Store(folder)


def _first(retro: Retro, store: Store) -> dict[str, DocumentLosses]:
    """Other numbers of neighbors, and shorter strides."""
    found = {f"as it is, {count} neighbors": _losses(retro, store, "bm25", count) for count in COUNTS}
    found["as it is, retrieval off"] = _losses(retro, store, "bm25", mode="off")
    for part in PER_CHUNK:
        stride = store.chunk_size // part
        found[f"as it is, every {stride} tokens"] = _losses(retro, store, "bm25", stride=stride)
    return found


def _losses(
    retro: Retro, store: Store, table: str, count: int = 2, mode: str = "on", stride: int | None = None
) -> DocumentLosses:
    """Of test documents whose copies are not trained on, spread evenly."""
    shares = split_documents(store, SHARES["reading"])
    test = np.setdiff1d(shares["test"], copies_of(store, shares["test"], shares["train"]))
    opened = NeighborTable(store.folder / "neighbors" / table, store)
    config = replace(retro.model.config, num_neighbors=count)
    sequences = Sequences.of_model(config, store, test, opened, shares["train"])
    finding = None if stride is None else Stride(sequences, stride, retro.model)
    token_bytes = store.tokenizer.token_bytes()
    return evaluate(retro.model, sequences, token_bytes, [mode], limit=BATCHES["reading"], stride=finding)[mode]
