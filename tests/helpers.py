"""What the tests share: tiny models, small corpora, the folder of shared data."""

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retro_engine.config import ModelConfig, preset_model
from retro_engine.data import array_file, files
from retro_engine.data.neighbor_table import NeighborTable, ids_name, publish_table
from retro_engine.data.store import Store
from retro_engine.model.retro import RetroModel

SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared(name: str) -> Path:
    """A path of the shared data; the test is skipped where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"shared/{name} is absent")
    return path


def table_of(query: Store, databases: list[Store], *shards: np.ndarray, name: str = "t") -> NeighborTable:
    """A published neighbor table of these ids, QUERY/neighbors/NAME."""
    folder, hashes = query.folder / "neighbors" / name, {}
    files.make_folder(folder)
    for number, ids in enumerate(shards):
        file = ids_name(number)
        hashes[file] = array_file.write_array(folder / file, "neighbors", ids.astype(np.int32), query.fingerprint)
    return publish_table(folder, query, databases, shards[0].shape[1], {"name": "test"}, hashes)


def small_config(**overrides: Any) -> ModelConfig:
    """A model of a few thousand parameters with every part in it: m = 4, r = 8, two CCA layers."""
    values: dict[str, Any] = {
        "vocab_size": 50,
        "encoder_seq_length": 32,
        "chunk_size": 4,
        "hidden_size": 24,
        "ffn_hidden_size": 32,
        "num_attention_heads": 3,
        "dec_num_layers": 3,
        "enc_num_layers": 2,
        "dec_cross_attention": [1, 2],
        "enc_cross_attention": [0, 1],
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return preset_model("base", **(values | overrides))


def small_model(seed: int = 0, **overrides: Any) -> RetroModel:
    """`small_config` in float64 with weights large enough that nothing is near zero."""
    model = RetroModel(small_config(**overrides), torch.Generator().manual_seed(seed)).double().eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise * (0.3 if parameter.dim() > 1 else 0.1))
    return model


def small_inputs(
    model: RetroModel, batch: int = 2, n: int = 19, k: int = 2, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens [batch, n] and neighbors [batch, floor(n/m), k, r]."""
    generator = torch.Generator().manual_seed(seed)
    c = model.config
    chunks = -(-n // c.chunk_size) if c.partial_chunk == "first" else n // c.chunk_size
    tokens = torch.randint(0, c.vocab_size, (batch, n), generator=generator)
    return tokens, torch.randint(0, c.vocab_size, (batch, chunks, k, c.r), generator=generator)


WORDS = [
    "river",
    "stone",
    "amber",
    "lantern",
    "orchard",
    "harbor",
    "winter",
    "copper",
    "thistle",
    "meadow",
    "falcon",
    "ember",
    "willow",
    "granite",
    "cedar",
    "tide",
]


def write_corpus(path: Path, documents: int, seed: int = 0, words: int = 60) -> Path:
    """A JSON lines file of random sentences, some of which documents share."""
    rng = np.random.default_rng(seed)
    sentences = [" ".join(rng.choice(WORDS, 8)) + "." for _ in range(20)]
    with open(path, "w", encoding="utf-8") as file:
        for number in range(documents):
            text = " ".join(str(s) for s in rng.choice(sentences, max(1, words // 8)))
            file.write(
                json.dumps({"id": f"d{number}", "title": f"Title {number}", "text": f"Document doc{number}. {text}"})
                + "\n"
            )
    return path


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A tmpfs of `size` mounted under `folder`; the test is skipped, by name, where it cannot be mounted."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    disk = folder / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@contextlib.contextmanager
def read_only_copy(source: Path, folder: Path) -> Iterator[Path]:
    """A copy of a folder on a disk that refuses writes, even root's; the test is skipped where it cannot be mounted."""
    folder.mkdir()
    with small_disk(folder, "16m") as disk:
        copy = shutil.copytree(source, disk / source.name)
        if subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True).returncode:
            pytest.skip("a disk cannot be made read-only here")
        yield copy


def random_texts(count: int, seed: int = 0, words: int = 90) -> list[str]:
    """Texts of which no part says anything about another: made-up words in random order."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    vocabulary = ["".join(rng.choice(letters, 6)) for _ in range(200)]
    return [" ".join(rng.choice(vocabulary, words)) for _ in range(count)]


def as_version_0(folder: Path) -> None:
    """Make a store what an earlier version wrote: without the contents of its documents."""
    from retro_engine.data import files

    manifest = files.read_manifest(folder, "store")
    body = {key: value for key, value in manifest.items() if key not in ("fingerprint", "kind", "version", "minor")}
    body["files"] = {name: mark for name, mark in body["files"].items() if not name.startswith("contents-")}
    for path in (*folder.glob("contents-*"), folder / "manifest.json"):
        path.unlink()
    files.write_manifest(folder, "store", body)
