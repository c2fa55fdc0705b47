"""GGUF files of llama and qwen2 as plain decoders: what their metadata asks for is computed or refused by its name.

Reads one .gguf file; weights are dequantised to fp32 and brought into a Hugging Face folder's form, which
`interop.huggingface` converts.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from retro_engine.config import ModelConfig
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import StoreError
from retro_engine.interop.gguf_file import GgufFile, read_gguf_file
from retro_engine.interop.gguf_tokenizer import gguf_chat, gguf_tokenizer
from retro_engine.interop.huggingface import State, convert_decoder

KINDS = ("llama", "qwen2")
LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROOT = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
FACTORS = "rope_freqs.weight"  # what each rotary frequency is divided by
NEEDED = {
    "num_attention_heads": "attention.head_count",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
READ = {  # optional ones
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.sliding_window",
    "context_length", "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type",
    "rope.scaling.factor",
}  # fmt: skip
HARMLESS = {  # what they say changes nothing here
    "vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.original_context_length",
    "attention.layer_norm_epsilon",
}  # fmt: skip
OFF = {"attention.causal": True, "rope.scaling.attn_factor": 1.0, "rope.scaling.yarn_log_multiplier": 0.0}
Read = tuple[ModelConfig, State, Tokenizer, list[str]]


def read_gguf(path: str | Path, tokenizer: Tokenizer | None = None, end_token: str | None = None) -> Read:
    """The decoder of a GGUF file, its tokenizer (or the one that is given) and notes for the user; `end_token` ends a
    document of the file's own tokenizer (None: what it says).

    Raises StoreError for what is damaged or not supported.
    """
    file = read_gguf_file(Path(path))
    values, tokenizer, notes = read_header(file, tokenizer, end_token)
    config, state, more = convert_decoder(values, _weights(file, values), str(path))
    return config, state, tokenizer, notes + more


def read_header(
    file: GgufFile, tokenizer: Tokenizer | None = None, end_token: str | None = None
) -> tuple[dict[str, Any], Tokenizer, list[str]]:
    """Settings as a Hugging Face config has them, the tokenizer (the file's or the one that is given), and notes."""
    kind = file.fields.get("general.architecture")
    if kind not in KINDS:
        raise StoreError(f"{file.name} has the architecture {str(kind)[:80]}", f"known in GGUF: {', '.join(KINDS)}")
    values = _config(file, str(kind))
    if tokenizer is None:
        return values, *gguf_tokenizer(file.fields, file.name, end_token)
    tokenizer.chat_files = gguf_chat(file.fields, file.name)
    return values, tokenizer, []


def _weights(file: GgufFile, values: dict[str, Any]) -> State:
    return dict(each_weight(file, values))


def each_weight(file: GgufFile, values: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor under Hugging Face's name, in fp32; no two are held at a time."""
    heads = {"q_proj": values["num_attention_heads"], "k_proj": values["num_key_value_heads"]}
    for theirs in file.tensors:
        if theirs == FACTORS:
            continue
        name, weight = name_of(theirs), file.values(theirs)
        kind = name.split(".")[-2:][0]
        if values["model_type"] == "llama" and kind in heads:
            weight = _halves_apart(weight, heads[kind], values["rotary_width"], f"{file.name}: {name}")
        yield name, weight


def name_of(name: str) -> str:
    """A tensor of GGUF under Hugging Face's name."""
    part, _, kind = name.rpartition(".")
    if part in ROOT:
        return f"{ROOT[part]}.{kind}"
    words = part.split(".")
    if len(words) == 3 and words[0] == "blk" and words[2] in LAYER:
        return f"model.layers.{words[1]}.{LAYER[words[2]]}.{kind}"
    return name  # reported as extra


def _halves_apart(weight: Tensor, heads: int, rotary_width: int, name: str) -> Tensor:
    """Rotary pairs lie beside each other in GGUF's llama; half of what is rotated apart here. Weights or biases."""
    if len(weight) % heads or len(weight) // heads < rotary_width:
        raise StoreError(f"{name} has {len(weight)} rows", f"{heads} heads of at least {rotary_width} are expected")
    by_head = weight.reshape(heads, len(weight) // heads, -1)
    pairs = by_head[:, :rotary_width].reshape(heads, rotary_width // 2, 2, -1).transpose(1, 2)
    out = by_head.clone()
    out[:, :rotary_width] = pairs.reshape(heads, rotary_width, -1)
    return out.reshape(weight.shape)


def _config(file: GgufFile, kind: str) -> dict[str, Any]:
    """The metadata as values of a Hugging Face config, `rotary_width` among them."""
    said = {key.removeprefix(f"{kind}."): value for key, value in file.fields.items() if key.startswith(f"{kind}.")}
    missing = [key for key in NEEDED.values() if key not in said]
    if missing:
        raise StoreError(f"{file.name} does not say its {', '.join(missing)}", "the file's metadata has it")
    for key, value in said.items():
        is_known = key in READ or key in HARMLESS or key in NEEDED.values()
        is_off = not isinstance(value, str | list | np.ndarray) and value == OFF.get(key, 0)
        if not is_known and not is_off:
            raise StoreError(
                f"{file.name}: {kind}.{key}={str(value)[:60]} is not supported", "this model does not compute it"
            )
    values = {ours: _number(said, key, file.name, is_whole=ours != "rms_norm_eps") for ours, key in NEEDED.items()}
    heads, width = values["num_attention_heads"], values["hidden_size"]
    values["num_key_value_heads"] = _number(said, "attention.head_count_kv", file.name, heads)
    values["max_position_embeddings"] = _number(said, "context_length", file.name, 1 << 20)
    values["sliding_window"] = _number(said, "attention.sliding_window", file.name, 0, least=0) or None
    head_width = width // heads
    for key in ("attention.key_length", "attention.value_length"):
        if _number(said, key, file.name, head_width) != head_width or width % heads:
            raise StoreError(
                f"{file.name}: {kind}.{key}={said.get(key)} is not supported", f"heads have {width} / {heads} features"
            )
    rotary = _number(said, "rope.dimension_count", file.name, head_width)
    if rotary > head_width or rotary % 2:
        raise StoreError(
            f"{file.name}: rope.dimension_count={rotary}", f"heads have {head_width} features, rotated in pairs"
        )
    embedding = file.tensors.get("token_embd.weight")
    return values | {
        "model_type": kind,
        "vocab_size": 0 if embedding is None else embedding.shape[0],
        "use_sliding_window": True,
        "max_window_layers": 0,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rotary_width": rotary,
        "rope_parameters": _rope(said, file, rotary, head_width),
    }


def _rope(said: dict[str, Any], file: GgufFile, rotary: int, head_width: int) -> dict[str, Any]:
    """As llama.cpp: scaling is linear where nothing is said, by `factor` or its old name, and not at all by 0."""
    kind = said.get("rope.scaling.type", "linear")
    rope: dict[str, Any] = {"rope_theta": _number(said, "rope.freq_base", file.name, 10000.0, is_whole=False)}
    rope["partial_rotary_factor"] = rotary / head_width
    factor = _number(said, "rope.scaling.factor", file.name, 0.0, is_whole=False, least=0)
    factor = factor or _number(said, "rope.scale_linear", file.name, 0.0, is_whole=False, least=0) or 1.0
    factors = [factor if kind == "linear" else 1.0] * (rotary // 2)
    if kind not in ("none", "linear"):
        raise StoreError(f"{file.name}: rope.scaling.type={str(kind)[:60]} is not supported", "known: none, linear")
    if FACTORS in file.tensors:
        scaled = file.values(FACTORS).flatten().tolist()
        if len(scaled) != rotary // 2:
            raise StoreError(f"{file.name}: {FACTORS} has {len(scaled)} values", f"expected {rotary // 2}")
        factors = [one * other for one, other in zip(factors, scaled)]
    return rope if set(factors) == {1.0} else rope | {"rope_type": "factors", "factors": factors}


def _number(said: dict[str, Any], key: str, name: str, default: Any = None, is_whole: bool = True, least: float = 1e-30) -> Any:  # fmt: skip
    """A number of the metadata. Raises StoreError for what is none, is infinite, or is below `least`."""
    value = said.get(key, default)
    if isinstance(value, np.ndarray) and len(set(value.tolist())) == 1:  # one a layer, all the same
        value = value.tolist()[0]
    is_number = (
        isinstance(value, int | float) and not isinstance(value, bool) and (isinstance(value, int) or not is_whole)
    )
    if not is_number or not least <= value < float("inf"):
        raise StoreError(f"{name}: {key}={str(value)[:60]} cannot be used", "expected a number above 0")
    return value
