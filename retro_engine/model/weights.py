"""Weights in and out: our safetensors files, and the state dicts of the two removed implementations.

Reads and writes `model.safetensors` and `config.json`; nothing is unpickled. The names and row orders of
megatron-core and NeMo were read off their parameters; docs/model.md has the table of differences.
"""

import json
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retro_engine.config import ModelConfig, architecture, preset_model
from retro_engine.errors import MissingInputError, StoreError, UsageError
from retro_engine.model.retro import RetroModel

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
VERSION = 2  # 1 had q, k and v in one matrix


def config_to_json(config: ModelConfig) -> str:
    return json.dumps({"model_type": "retro_engine", "version": VERSION, **architecture(config)}, indent=1) + "\n"


def read_config(folder: str | Path) -> ModelConfig:
    """The architecture saved in FOLDER/config.json. Raises StoreError for another project's or a newer file."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise MissingInputError(f"{path} does not exist", "a checkpoint folder has a config.json", "retro train")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise StoreError(f"{path} is not JSON", str(error), "take the file from a complete checkpoint") from error
    if not isinstance(values, dict) or values.pop("model_type", None) != "retro_engine":
        raise StoreError(f"{path} is not a retro-engine config", "model_type is not retro_engine")
    version = values.pop("version", None)
    if version != VERSION:
        do = "update retro-engine" if isinstance(version, int) and version > VERSION else "train it again"
        raise StoreError(f"{path} has version {version}", f"this program reads version {VERSION}", do)
    unknown = sorted(set(values) - {item.name for item in fields(ModelConfig)})
    if unknown:
        raise StoreError(f"{path} has unknown fields: {', '.join(unknown)}", "it was written by another version")
    return ModelConfig(**values)


def load_model(folder: str | Path, dtype: torch.dtype | None = None) -> RetroModel:
    """The model of a checkpoint folder, in evaluation mode; `dtype` None = as saved."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        raise MissingInputError(f"{path} does not exist", "a checkpoint folder has a model.safetensors", "retro train")
    config = read_config(folder)
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{path} cannot be read", str(error), "resume from another checkpoint") from error
    model = RetroModel(config)
    load_state(model, state, str(path))
    return model.to(dtype or model.embedding.weight.dtype).eval()


def load_state(model: RetroModel, state: dict[str, Tensor], name: str) -> None:
    """Copy `state` into `model`, whose type becomes the state's. Raises StoreError listing what does not fit."""
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    wrong = [
        f"{key} {found[key]}, expected {shape}" for key, shape in expected.items() if found.get(key, shape) != shape
    ]
    if missing or extra or wrong:
        parts = [f"missing {missing[:8]}"] * bool(missing) + [f"extra {extra[:8]}"] * bool(extra) + wrong[:8]
        raise StoreError(f"{name} does not fit the model", "; ".join(parts), "check the config beside the weights")
    model.to(state["embedding.weight"].dtype)
    model.load_state_dict(state)


def import_state_dict(state_dict: dict[str, Tensor], metadata: dict[str, str], source: str) -> RetroModel:
    """A RetroModel with the weights of another implementation, computing exactly what that one computes.

    source "mcore" (megatron-core <= 0.15 `RetroModel`) or "nemo" (NeMo <= 1.23); `metadata` as strings: mcore
    L, enc, m, k, hidden, ffn, heads, pos, rotary, tie, ns; nemo dec, enc, dec_ca, enc_ca, version, chunk, k,
    hidden, ffn, heads, pad_id, eod_id, ns. Raises StoreError for tensors missing, extra or of another shape.
    """
    if source not in ("mcore", "nemo"):
        raise UsageError(f"source={source!r} is not known", "one of mcore, nemo")
    try:
        if source == "mcore":
            config, state = _from_mcore(dict(state_dict), metadata)
        else:
            config, state = _from_nemo(dict(state_dict), metadata)
    except KeyError as error:
        raise StoreError(f"{error.args[0]} is missing", f"a {source} state dict or its metadata has it") from error
    model = RetroModel(config)
    load_state(model, state, f"the {source} state dict")
    return model.eval()


class _Taker:
    """Moves tensors out of a foreign state dict, so that what is left over can be reported."""

    def __init__(self, state: dict[str, Tensor]):
        self.state, self.taken = state, dict[str, Tensor]()

    def module(self, target: str, source: str) -> None:
        """Weight and bias of one module."""
        self.modules([target], source)

    def modules(self, targets: list[str], source: str, heads: int = 1) -> None:
        """Weight and bias of modules whose rows are stacked in one, per head as [first; second; ...]."""
        for kind in ("weight", "bias"):
            tensor = self.state.pop(f"{source}.{kind}")
            rows = tensor.reshape(heads, len(targets), -1, *tensor.shape[1:])
            for part, target in enumerate(targets):
                self.taken[f"{target}.{kind}"] = rows[:, part].flatten(0, 1).contiguous()

    def attention(self, target: str, source: str, heads: int) -> None:
        self.modules([f"{target}.q", f"{target}.k", f"{target}.v"], source, heads)

    def tensor(self, target: str, source: str) -> None:
        self.taken[target] = self.state.pop(source)

    def done(self) -> dict[str, Tensor]:
        """What was taken, and what was not under its own name: `load_state` reports that as extra."""
        return self.taken | self.state


def _key_value_names(crossing: list[int], target: str) -> list[str]:
    """Where the keys and values of a layer's cross-attention are: the decoder's lie together."""
    if target.startswith("encoder."):
        return [f"{target}.cross.k", f"{target}.cross.v"]
    place = sorted(crossing).index(int(target.removeprefix("layers.")))
    return [f"neighbor_projection.k.{place}", f"neighbor_projection.v.{place}"]


def _from_mcore(state: dict[str, Tensor], meta: dict[str, str]) -> tuple[ModelConfig, dict[str, Tensor]]:
    layers, heads = int(meta["L"]), int(meta["heads"])
    crossing = [i for i in range(layers) if f"decoder.layers.{i}.cross_attention.attn.linear_q.weight" in state]
    is_learned = meta["pos"] == "learned_absolute"
    values: dict[str, Any] = {
        "position_embedding": {"learned_absolute": "learned", "rope": "rope", "none": "none"}[meta["pos"]],
        "encoder_position_embedding": "learned" if is_learned else "none",
        "rotary_percentage": float(meta.get("rotary", "1.0")),
    }
    if is_learned:
        values["max_position_embeddings"] = state["embedding.position_embeddings.weight"].shape[0]
    config = preset_model(
        "mcore",
        vocab_size=state["embedding.word_embeddings.weight"].shape[0],
        encoder_seq_length=int(meta["ns"]),
        chunk_size=int(meta["m"]),
        retrieved_length=int(meta.get("retrieved_length", 2 * int(meta["m"]))),
        num_neighbors=int(meta["k"]),
        hidden_size=int(meta["hidden"]),
        ffn_hidden_size=int(meta["ffn"]),
        num_attention_heads=heads,
        dec_num_layers=layers,
        enc_num_layers=int(meta["enc"]),
        dec_cross_attention=crossing,
        layernorm_epsilon=float(meta.get("ln_eps", "1e-5")),
        share_embeddings=meta["tie"] == "True",
        **values,
    )
    take = _Taker(state)
    take.tensor("embedding.weight", "embedding.word_embeddings.weight")
    if is_learned:
        take.tensor("position_embedding.weight", "embedding.position_embeddings.weight")
    if not config.share_embeddings:
        take.tensor("head.weight", "output_layer.weight")

    names_kv = partial(_key_value_names, crossing)

    def layer(target: str, source: str, is_crossing: bool, ffn_norm: str) -> None:
        take.module(f"{target}.attention_norm", f"{source}.input_layernorm")
        take.attention(f"{target}.attention", f"{source}.self_attention.linear_qkv", heads)
        take.module(f"{target}.attention.out", f"{source}.self_attention.linear_proj")
        if is_crossing:
            take.module(f"{target}.cross_norm", f"{source}.pre_cross_attn_layernorm")
            take.module(f"{target}.cross.q", f"{source}.cross_attention.attn.linear_q")
            take.modules(names_kv(target), f"{source}.cross_attention.attn.linear_kv", heads)
            take.module(f"{target}.cross.out", f"{source}.cross_attention.attn.linear_proj")
        take.module(f"{target}.ffn_norm", f"{source}.{ffn_norm}")
        take.module(f"{target}.ffn.up", f"{source}.mlp.linear_fc1")
        take.module(f"{target}.ffn.down", f"{source}.mlp.linear_fc2")

    for i in range(layers):
        layer(f"layers.{i}", f"decoder.layers.{i}", i in crossing, "pre_mlp_layernorm")
    for i in range(config.enc_num_layers):
        source = f"decoder.layers.{crossing[0]}.cross_attention.encoder.layers.{i}"
        layer(f"encoder.layers.{i}", source, i == 0, "pre_mlp_layernorm.norm" if i == 0 else "pre_mlp_layernorm")
    return config, take.done()


def _from_nemo(state: dict[str, Tensor], meta: dict[str, str]) -> tuple[ModelConfig, dict[str, Tensor]]:
    heads, hidden = int(meta["heads"]), int(meta["hidden"])
    head_width = hidden // heads
    crossing = [int(part) for part in meta["dec_ca"].strip("()[] ").split(",") if part.strip()]
    encoder_crossing = [int(part) for part in meta["enc_ca"].strip("()[] ").split(",") if part.strip()]
    config = preset_model(
        "nemo",
        vocab_size=state["encoder_embedding.word_embeddings.weight"].shape[0],
        encoder_seq_length=int(meta["ns"]),
        chunk_size=int(meta["chunk"]),
        num_neighbors=int(meta["k"]),
        hidden_size=hidden,
        ffn_hidden_size=int(meta["ffn"]),
        num_attention_heads=heads,
        dec_num_layers=int(meta["dec"]),
        enc_num_layers=int(meta["enc"]),
        dec_cross_attention=crossing,
        enc_cross_attention=encoder_crossing,
        layernorm_epsilon=float(meta.get("ln_eps", "1e-5")),
        rotary_percentage=min(head_width, 32) / head_width,
        cca_query_offset=meta["version"] != "1",
        eod_id=int(meta["eod_id"]),
        pad_id=int(meta["pad_id"]),
    )
    take = _Taker(state)
    take.tensor("embedding.weight", "encoder_embedding.word_embeddings.weight")
    take.tensor("output_bias", "tokens_head.bias")

    names_kv = partial(_key_value_names, crossing)

    def self_attention(target: str, source: str) -> None:
        take.module(f"{target}.attention_norm", f"{source}.input_layernorm")
        take.attention(f"{target}.attention", f"{source}.self_attention.query_key_value", heads)
        take.module(f"{target}.attention.out", f"{source}.self_attention.dense")

    def cross_attention(target: str, source: str) -> None:
        take.module(f"{target}.cross.q", f"{source}.query")
        take.modules(names_kv(target), f"{source}.key_value", heads)
        take.module(f"{target}.cross.out", f"{source}.dense")

    def feed_forward(target: str, source: str, is_crossing: bool) -> None:
        ffn_norm = "post_inter_attention_layernorm" if is_crossing else "post_attention_layernorm"
        take.module(f"{target}.ffn_norm", f"{source}.{ffn_norm}")
        take.module(f"{target}.ffn.up", f"{source}.mlp.dense_h_to_4h")
        take.module(f"{target}.ffn.down", f"{source}.mlp.dense_4h_to_h")

    first = crossing[0]
    for i in range(config.dec_num_layers):
        target = f"layers.{i}"
        before, after = f"pre_decoder.model.layers.{i}", f"post_decoder.model.layers.{i - first}"
        self_attention(target, before if i <= first else after)
        if i in crossing:  # the first cross-attending layer is split between the two stacks
            take.module(f"{target}.cross_norm", f"{before if i == first else after}.post_attention_layernorm")
            cross_attention(target, f"{after}.inter_attention.cross_attention")
        feed_forward(target, before if i < first else after, i in crossing)
    for i in range(config.enc_num_layers):
        target, source = f"encoder.layers.{i}", f"encoder.model.layers.{i}"
        self_attention(target, source)
        if i in encoder_crossing:
            take.module(f"{target}.cross_norm", f"{source}.post_attention_layernorm")
            cross_attention(target, f"{source}.inter_attention")
        feed_forward(target, source, i in encoder_crossing)
    take.module("encoder.final_norm", "encoder.model.final_layernorm")
    take.module("final_norm", "post_decoder.model.final_layernorm")
    return config, take.done()
