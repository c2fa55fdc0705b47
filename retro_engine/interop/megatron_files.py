"""Files of Megatron and NeMo: finds the tensor-parallel shards of a checkpoint, merges them, reads its settings.

Reads a torch archive, a folder with one, an iter_N folder with mp_rank_XX/model_optim_rng.pt (one a rank), or a .nemo
file. Settings come from the archive's own `args` where it has them, from model_config.yaml in a .nemo file, and from a
JSON file of `megatron.convert`'s metadata, which wins.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import MissingInputError, StoreError
from retro_engine.interop.archives import opened_nemo, read_archive
from retro_engine.interop.megatron import State

# How tensor parallelism cuts matrices (arXiv 1909.08053 section 3): rows of these, columns of those; all else is whole.
BY_ROWS = (
    "query_key_value", "query", "key_value", "dense_h_to_4h", "linear_qkv", "linear_q", "linear_kv", "linear_fc1",
    "word_embeddings", "output_layer", "tokens_head",
)  # fmt: skip
BY_COLUMNS = ("dense", "dense_4h_to_h", "linear_proj", "linear_fc2")
GATED = ("dense_h_to_4h", "linear_fc1")  # every shard has its gates, then what they gate
WRAPPERS = ("model", "state_dict", "module")
ARGUMENTS = {  # Megatron's names, the first that is there
    "L": ("num_layers",),
    "enc": ("retro_encoder_layers", "retro_encoder_num_layers"),
    "m": ("retro_chunk_length", "retro_gpt_chunk_length"),
    "k": ("retro_num_neighbors",),
    "hidden": ("hidden_size",),
    "ffn": ("ffn_hidden_size",),
    "heads": ("num_attention_heads",),
    "ns": ("seq_length",),
    "rotary": ("rotary_percent",),
    "swiglu": ("swiglu",),
    "layernorm_1p": ("apply_layernorm_1p",),
    "ln_eps": ("norm_epsilon", "layernorm_epsilon"),
    "retrieved_length": ("retro_gpt_retrieved_length",),
}
NEMO_SETTINGS = {
    "dec": "dec_num_layers",
    "enc": "enc_num_layers",
    "dec_ca": "dec_cross_attention",
    "enc_ca": "enc_cross_attention",
    "version": "version",
    "chunk": "chunk_size",
    "hidden": "hidden_size",
    "ffn": "ffn_hidden_size",
    "heads": "num_attention_heads",
    "ns": "encoder_seq_length",
    "ln_eps": "layernorm_epsilon",
}


def find_shards(path: Path) -> list[Path]:
    """The archives of a checkpoint, in the order of their ranks. Raises StoreError for pipeline-parallel ones."""
    if path.is_file():
        return [path]
    if (path / ".metadata").is_file():
        read_archive(path / ".metadata")  # refuses it, with the way to convert it
    folders = sorted(folder for folder in path.glob("mp_rank_*") if folder.is_dir())
    staged = [folder.name for folder in folders if not re.fullmatch(r"mp_rank_\d+", folder.name)]
    if staged:
        raise StoreError(
            f"{path} is pipeline-parallel: {staged[0]}",
            "only tensor-parallel shards are merged",
            "merge the stages first",
        )
    found = [sorted(folder.glob("*.pt")) + sorted(folder.glob("*.ckpt")) for folder in folders or [path]]
    for folder, archives in zip(folders or [path], found):
        if len(archives) != 1:
            raise MissingInputError(f"{folder} has {len(archives)} archives", "expected one .pt or .ckpt file")
    ranks = [int(folder.name.removeprefix("mp_rank_")) for folder in folders]
    if ranks != list(range(len(ranks))):
        raise MissingInputError(f"{path} has the ranks {ranks}", "a rank is missing", "copy all mp_rank folders")
    return [archives[0] for archives in found]


def read_checkpoint(path: str | Path) -> tuple[str, State, dict[str, str]]:
    """Source (mcore or megatron), merged state dict and metadata of a checkpoint."""
    path = Path(path)
    if not path.exists():
        raise MissingInputError(f"{path} does not exist", "expected a Megatron checkpoint")
    archives = [read_archive(shard) for shard in find_shards(path)]
    arguments = archives[0].get("args")
    values = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    meta = settings_of(values if isinstance(values, dict) else {})
    shards = [tensors_of(archive) for archive in archives]
    is_legacy = any(name.startswith("language_model.") for name in shards[0])
    return "megatron" if is_legacy else "mcore", merge_shards(shards, meta.get("swiglu") == "True", str(path)), meta


def settings_of(values: dict[str, Any]) -> dict[str, str]:
    """`convert`'s metadata from Megatron's arguments; what is not there is left out."""
    meta = {}
    for key, names in ARGUMENTS.items():
        found = [values[name] for name in names if values.get(name) is not None]
        if found:
            meta[key] = str(found[0])
    if values.get("group_query_attention") and values.get("num_query_groups"):
        meta["groups"] = str(values["num_query_groups"])
    if "position_embedding_type" in values or "use_rotary_position_embeddings" in values:
        is_rope = bool(values.get("use_rotary_position_embeddings"))
        meta["pos"] = "rope" if is_rope else str(values.get("position_embedding_type", "learned_absolute"))
    if "untie_embeddings_and_output_weights" in values:
        meta["tie"] = str(not values["untie_embeddings_and_output_weights"])
    return meta


def tensors_of(archive: dict[str, Any]) -> State:
    """The model's tensors, their names joined with dots; Transformer Engine's `_extra_state` is left out."""
    tree = next((archive[name] for name in WRAPPERS if isinstance(archive.get(name), dict)), archive)
    return {name: value for name, value in _leaves(tree, "").items() if not name.endswith("_extra_state")}


def _leaves(tree: dict[str, Any], prefix: str) -> State:
    found: State = {}
    for key, value in tree.items():
        if isinstance(value, Tensor):
            found[f"{prefix}{key}"] = value
        elif isinstance(value, dict):
            found |= _leaves(value, f"{prefix}{key}.")
    return found


def merge_shards(shards: list[State], is_gated: bool, name: str) -> State:
    """One state dict of those of all tensor-parallel ranks. Raises StoreError naming a tensor that does not fit."""
    if len(shards) == 1:
        return shards[0]
    merged: State = {}
    for rank, shard in enumerate(shards):
        different = sorted(shard.keys() ^ shards[0].keys())
        if different:
            raise StoreError(f"{name}: rank {rank} has other tensors than rank 0", f"{different[:8]}")
    for key in shards[0]:
        parts = [shard[key] for shard in shards]
        module, kind = ["", *key.split(".")][-2:]
        axis = 0 if module in BY_ROWS else 1 if module in BY_COLUMNS and kind == "weight" else None
        rests = {(part.dim(), *(size for i, size in enumerate(part.shape) if i != axis)) for part in parts}
        if len(rests) > 1:
            raise StoreError(f"{name}: {key} has shapes that do not match", f"{[tuple(part.shape) for part in parts]}")
        if axis is None:
            if any(not torch.equal(part, parts[0]) for part in parts):
                raise StoreError(f"{name}: {key} differs between ranks", "every rank has a copy of it")
            merged[key] = parts[0]
        elif is_gated and module in GATED:
            halves = [part.chunk(2) for part in parts]
            merged[key] = torch.cat([half[0] for half in halves] + [half[1] for half in halves])
        else:
            merged[key] = torch.cat(parts, axis)
    return merged


def read_nemo(
    path: str | Path, tokenizer: Tokenizer | None, end_token: str | None = None
) -> tuple[State, dict[str, str], Tokenizer | None]:
    """Merged state dict, metadata and, where the file holds one that loads, the tokenizer of a .nemo file."""
    with opened_nemo(path) as (config, weights, rest):
        values = config.get("model", config)
        shards = [tensors_of(read_archive(file)) for file in weights]
        shards = [{key.removeprefix("model."): value.clone() for key, value in shard.items()} for shard in shards]
        found = tokenizer or _nemo_tokenizer(rest, end_token)
        meta = {key: str(values[name]) for key, name in NEMO_SETTINGS.items() if values.get(name) is not None}
        for key in ("dec_ca", "enc_ca"):
            meta[key] = meta.get(key, "").strip("[]()")
        meta["k"] = str((values.get("data") or {}).get("neighbors", 2))
        if found is not None:
            meta |= {"eod_id": str(found.eod_id), "pad_id": str(found.pad_id)}
        return merge_shards(shards, False, str(path)), meta, found


def _nemo_tokenizer(files: dict[str, Path], end_token: str | None) -> Tokenizer | None:
    """From the vocabulary and merges in the archive, whose names begin with a hash."""
    by_end = {
        end: file
        for end in ("vocab.json", "merges.txt", "vocab.bpe")
        for name, file in files.items()
        if name.endswith(end)
    }
    vocab, merges = by_end.get("vocab.json"), by_end.get("merges.txt", by_end.get("vocab.bpe"))
    return None if vocab is None or merges is None else Tokenizer.from_gpt2(vocab, merges, end_token)
