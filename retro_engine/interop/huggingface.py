"""Hugging Face folders of GPT-2, Llama, Mistral and Qwen2 as plain decoders of this project, and what `retro export` wrote.

Reads config.json with model.safetensors (or its shards, or pytorch_model.bin); needs no transformers. What a config asks for
and this model does not compute is refused by its name.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retro_engine.config import ModelConfig, check_model
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import MissingInputError, StoreError, UsageError, nearest
from retro_engine.interop.archives import read_archive
from retro_engine.interop.exports import MODEL_TYPE, read_export
from retro_engine.model.memory import MappedTensors

LLAMA_FAMILY = ("llama", "mistral", "qwen2")
KNOWN = ("gpt2", *LLAMA_FAMILY)
CHUNK = 64  # m of the imported config; a retro-fit may choose another
LONGEST = 2048  # tokens of a training sequence, where the original takes more
MAX_JSON = 64 << 20  # bytes of a config or an index
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
State = dict[str, Tensor]
LLAMA_READ = frozenset({
    "num_attention_heads", "num_hidden_layers", "hidden_size", "hidden_act", "head_dim", "attention_bias", "mlp_bias",
    "max_position_embeddings", "vocab_size", "intermediate_size", "num_key_value_heads", "rms_norm_eps", "rope_theta",
    "rope_scaling", "rope_parameters", "partial_rotary_factor", "sliding_window", "use_sliding_window",
    "max_window_layers", "layer_types",
})  # fmt: skip
GPT2_READ = frozenset({
    "n_embd", "n_layer", "n_head", "n_positions", "n_inner", "vocab_size", "activation_function", "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx", "add_cross_attention", "layer_norm_epsilon",
})  # fmt: skip
# Settings that change what is computed, with what turns them off; None does always.
OFF: dict[str, tuple[Any, ...]] = {
    "qk_norm": (False,), "use_qk_norm": (False,), "clip_qkv": (), "rope_interleaved": (False,), "quantization_config": (),
    "num_experts": (0,), "num_local_experts": (0, 1), "n_routed_experts": (0,), "logit_scale": (1,), "alibi": (False,),
    "attn_logit_softcapping": (), "final_logit_softcapping": (), "embedding_multiplier": (1,), "logits_scaling": (1,),
    "residual_multiplier": (1,), "attention_multiplier": (), "parallel_attn": (False,), "use_parallel_residual": (False,),
    "is_encoder_decoder": (False,), "no_rope_layers": ([],), "attention_chunk_size": (), "rope_parameters": (),
    "rope_scaling": (), "sliding_window": (), "partial_rotary_factor": (1,), "head_dim": (), "add_cross_attention": (False,),
    "is_decoder": (False, True), "use_bias": (), "prune_heads": ({},), "pruned_heads": ({},), "q_lora_rank": (), "kv_lora_rank": (),
}  # fmt: skip
HARMLESS = frozenset({
    "model_type", "tie_word_embeddings", "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version",
    "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "hidden_dropout", "attn_pdrop",
    "embd_pdrop", "resid_pdrop", "initializer_range", "pretraining_tp", "is_llama_config", "transformers.js_config",
    "output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward", "id2label", "label2id",
    "problem_type", "task_specific_params", "n_ctx", "reorder_and_upcast_attn", "summary_activation", "gradient_checkpointing",
    "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj", "rotary_width",
})  # fmt: skip


def read_folder(folder: str | Path) -> tuple[ModelConfig, State, list[str]]:
    """The decoder of a Hugging Face folder: its config, its weights under our names, and notes for the user.

    Raises StoreError naming the setting, the tensors that are missing or extra, or the architecture that is not known.
    """
    folder = Path(folder)
    values = read_json(folder / "config.json")
    state = read_weights(folder)
    if values.get("model_type") == MODEL_TYPE:
        return *read_export(values, state, str(folder)), []
    return convert_decoder(values, state, str(folder))


def convert_decoder(values: dict[str, Any], state: State, name: str) -> tuple[ModelConfig, State, list[str]]:
    """The same from the values of a config.json and a state dict; `name` is for errors."""
    config, names, notes = read_decoder(values, len(state), name)
    is_gpt2 = values["model_type"] == "gpt2"
    if is_gpt2:
        state = _split_gpt2(state, config, name)
    return config, _renamed(state, names, "transformer." if is_gpt2 else "", name), notes


def read_decoder(values: dict[str, Any], num_tensors: int, name: str) -> tuple[ModelConfig, dict[str, str], list[str]]:
    """The config of a config.json's values, for each of our tensors the original's name, and notes for the user."""
    kind = values.get("model_type")
    if kind not in KNOWN:
        why = nearest(str(kind), list(KNOWN)) or f"known: {', '.join(KNOWN)}"
        raise StoreError(f"{name} has the architecture {kind}", why, "export it as one of these, or import its weights")
    layers = _whole(values, "n_layer" if kind == "gpt2" else "num_hidden_layers", name)
    if layers > num_tensors:  # before anything is made for each
        raise StoreError(f"{name} does not fit its config", f"it has {layers} layers, and {num_tensors} tensors")
    config, names = _gpt2(values, name) if kind == "gpt2" else _llama(values, name)
    notes = _check_rest(values, GPT2_READ if kind == "gpt2" else LLAMA_READ, name)
    try:
        check_model(config)
    except UsageError as error:
        raise StoreError(f"{name}: {error.what}", error.why) from error
    if kind != "gpt2" and config.max_position_embeddings:
        notes.append(f"it takes {config.max_position_embeddings} tokens at most: the original's sliding window")
    return config, names, notes


def check_tokenizer(tokenizer: Tokenizer, config: ModelConfig, name: str) -> None:
    """Raise StoreError where the tokenizer has ids that the embedding has no row for."""
    if tokenizer.vocab_size > config.vocab_size:
        raise StoreError(
            f"the tokenizer of {name} has {tokenizer.vocab_size} entries",
            f"the embedding has {config.vocab_size} rows",
            "--tokenizer PATH names the model's own",
        )


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MissingInputError(f"{path} does not exist", "a Hugging Face folder has one", "name the model's folder")
    if path.stat().st_size > MAX_JSON:
        raise StoreError(f"{path} is larger than {MAX_JSON:,} bytes", "it is no model's settings")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is not JSON", str(error)) from error
    if not isinstance(values, dict):
        raise StoreError(f"{path} holds no settings", f"it is a {type(values).__name__}")
    return values


def read_weights(folder: Path) -> State:
    """All tensors of a folder: one file, or the shards that an index names."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if index.is_file():
            named = read_json(index).get("weight_map")
            if not isinstance(named, dict):
                raise StoreError(f"{index} has no weight_map", "it names the file of every tensor")
            files = sorted({str(name) for name in named.values()})
            for name in files:
                if Path(name).name != name:
                    raise StoreError(f"{index} names {name}", "shards lie beside their index")
            return {key: value for name in files for key, value in _read_tensors(folder / name).items()}
        if (folder / single).is_file():
            return _read_tensors(folder / single)
    raise MissingInputError(f"{folder} has no weights", "expected model.safetensors or pytorch_model.bin")


def _read_tensors(path: Path) -> State:
    if path.suffix != ".safetensors":
        return {name: value for name, value in read_archive(path).items() if isinstance(value, Tensor)}
    return MappedTensors(path)


def _refuse(name: str, key: str, value: Any, why: str) -> None:
    raise StoreError(f"{name}: {key}={str(value)[:80]} is not supported", why)


def _value(
    v: dict[str, Any], key: str, name: str, default: Any, is_right: Callable[[Any], bool], expected: str
) -> Any:  # fmt: skip
    """`default` where the key is missing or null. Raises StoreError."""
    value = default if v.get(key) is None else v[key]
    if not is_right(value):
        raise StoreError(f"{name}: {key}={str(value)[:80]} cannot be used", f"expected {expected}")
    return value


def _whole(v: dict[str, Any], key: str, name: str, default: int | None = None) -> int:
    return _value(v, key, name, default, lambda x: type(x) is int and x >= 1, expected="a whole number above 0")


def _real(v: dict[str, Any], key: str, name: str, default: float | None = None) -> float:
    is_real = lambda x: type(x) in (int, float) and 0 < x < math.inf  # noqa: E731
    return float(_value(v, key, name, default, is_real, expected="a number above 0"))


def _choice(v: dict[str, Any], key: str, name: str, default: bool) -> bool:
    return _value(v, key, name, default, lambda x: isinstance(x, bool), expected="true or false")


def _length(positions: int) -> int:
    """Tokens of a training sequence: whole chunks, at most what the original takes."""
    return max(CHUNK, min(positions, LONGEST) // CHUNK * CHUNK)


def _check_rest(v: dict[str, Any], read: frozenset[str], name: str) -> list[str]:
    """Refuse what changes the computation and is not read; a note names what is not known at all."""
    for key, off in OFF.items():
        if key not in read and v.get(key) not in (None, *off):
            _refuse(name, key, v[key], "this model does not compute it")
    odd = sorted(key for key in v.keys() - read - HARMLESS - OFF.keys() if not key.startswith("_"))
    return [f"not known and not used: {', '.join(odd)[:300]}"] if odd else []


def _window(v: dict[str, Any], layers: int, positions: int, name: str) -> int:
    """The shortest sliding window of a layer, where one is shorter than the model's positions; else 0.

    Up to it attention is the original's exactly; the model takes no more.
    """
    kinds = v.get("layer_types") or []
    if not isinstance(kinds, list) or not {*map(str, kinds)} <= {"full_attention", "sliding_attention"}:
        _refuse(name, "layer_types", kinds, "known: full_attention, sliding_attention")
    is_used = v["model_type"] != "qwen2" or _choice(v, "use_sliding_window", name, False)
    if v.get("sliding_window") is None or not is_used:
        return 0
    window = _whole(v, "sliding_window", name)
    first = v.get("max_window_layers", 0) if v["model_type"] == "qwen2" else 0
    if not isinstance(first, int) or first >= layers or window >= positions:
        return 0
    if window < CHUNK:
        _refuse(name, "sliding_window", window, f"a chunk has {CHUNK} tokens")
    return window


def rotary_factors(rope: dict[str, Any], width: int, base: float, name: str) -> list[float] | None:
    """What each of width / 2 rotary frequencies is divided by; None where they are not scaled.

    rope_type linear, llama3 (arXiv 2407.21783, as transformers computes it), or `factors` as they are.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "factors":
        return list(rope["factors"])
    if kind not in ("linear", "llama3"):
        _refuse(name, "rope_scaling", kind, "known: linear, llama3")
    factor = _real(rope, "factor", name)
    if kind == "linear":
        return [factor] * (width // 2)
    low, high = _real(rope, "low_freq_factor", name), _real(rope, "high_freq_factor", name)
    old = _real(rope, "original_max_position_embeddings", name)
    if high <= low:
        _refuse(name, "high_freq_factor", high, f"low_freq_factor is {low}")
    factors = []
    for pair in range(width // 2):
        turns = old / (2 * math.pi * base ** (2 * pair / width))  # of this frequency within the old length
        share = min(1.0, max(0.0, (turns - low) / (high - low)))  # that is kept as it was
        factors.append(1 / (share + (1 - share) / factor))
    return factors


def _rope(v: dict[str, Any], name: str) -> dict[str, Any]:
    """Its settings, wherever a version of transformers keeps them."""
    rope: dict[str, Any] = {"rope_theta": v.get("rope_theta"), "partial_rotary_factor": v.get("partial_rotary_factor")}
    for key in ("rope_scaling", "rope_parameters"):
        part = v.get(key) or {}
        if not isinstance(part, dict) or any(isinstance(value, dict) for value in part.values()):
            _refuse(name, key, part, "expected an object of numbers, the same for all layers")
        rope |= part
    return rope


def _llama(v: dict[str, Any], name: str) -> tuple[ModelConfig, dict[str, str]]:
    """Config, and for each of our tensors the original's name."""
    heads, layers = _whole(v, "num_attention_heads", name), _whole(v, "num_hidden_layers", name)
    width = _whole(v, "hidden_size", name)
    rope = _rope(v, name)
    if v.get("hidden_act", "silu") not in ("silu", "swish"):
        _refuse(name, "hidden_act", v["hidden_act"], "the gated activation here is SiLU")
    head_width = _whole(v, "head_dim", name, width // heads or 1)
    if head_width * heads != width:
        _refuse(name, "head_dim", head_width, f"{heads} heads of hidden_size={width} have {width / heads:g} features")
    is_qwen = v["model_type"] == "qwen2"
    has_bias, has_ffn_bias = _choice(v, "attention_bias", name, False), _choice(v, "mlp_bias", name, False)
    if has_bias != has_ffn_bias:
        _refuse(name, "attention_bias", has_bias, f"mlp_bias is {has_ffn_bias}; here both have biases or neither")
    positions = _whole(v, "max_position_embeddings", name, LONGEST)
    window = _window(v, layers, positions, name)
    share = _real(rope, "partial_rotary_factor", name, 1.0)
    rotary = int(head_width * share + 1e-6) // 2 * 2
    if share > 1 or rotary == 0:
        _refuse(name, "partial_rotary_factor", share, f"heads have {head_width} features, rotated in pairs")
    base = _real(rope, "rope_theta", name, 10000.0)
    config = ModelConfig(
        vocab_size=_whole(v, "vocab_size", name),
        encoder_seq_length=_length(window or positions),
        max_position_embeddings=window,
        hidden_size=width,
        ffn_hidden_size=_whole(v, "intermediate_size", name),
        num_attention_heads=heads,
        num_query_groups=_whole(v, "num_key_value_heads", name, heads),
        dec_num_layers=layers,
        retrieval=False,
        layernorm_epsilon=_real(v, "rms_norm_eps", name, 1e-6),
        bias=has_bias,
        qk_bias=True if is_qwen else None,
        v_bias=True if is_qwen else None,
        share_embeddings=_choice(v, "tie_word_embeddings", name, False),
        rotary_base=base,
        rotary_percentage=min(1.0, (rotary + 0.5) / head_width),  # a product in floating point may fall below
        rotary_factors=rotary_factors(rope, rotary, base, name),
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    return config, _llama_names(config)


def _llama_names(config: ModelConfig) -> dict[str, str]:
    names = {"embedding.weight": "model.embed_tokens.weight", "final_norm.weight": "model.norm.weight"}
    if not config.share_embeddings:
        names["head.weight"] = "lm_head.weight"
    parts = {
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "ffn.gate": "mlp.gate_proj",
        "ffn.up": "mlp.up_proj",
        "ffn.down": "mlp.down_proj",
        "attention.out": "self_attn.o_proj",
        **{f"attention.{part}": f"self_attn.{part}_proj" for part in "qkv"},
    }
    biased = {"attention.q": config.has_qk_bias, "attention.k": config.has_qk_bias, "attention.v": config.has_v_bias}
    for i in range(config.dec_num_layers):
        for ours, theirs in parts.items():
            names[f"layers.{i}.{ours}.weight"] = f"model.layers.{i}.{theirs}.weight"
            if biased.get(ours, config.bias and "norm" not in ours):
                names[f"layers.{i}.{ours}.bias"] = f"model.layers.{i}.{theirs}.bias"
    return names


def _gpt2(v: dict[str, Any], name: str) -> tuple[ModelConfig, dict[str, str]]:
    activation = v.get("activation_function", "gelu_new")
    activations = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
    if activation not in activations:
        _refuse(name, "activation_function", activation, f"one of {', '.join(activations)}")
    for key, wanted in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        if _choice(v, key, name, wanted) != wanted:
            _refuse(name, key, v[key], f"only {str(wanted).lower()} is")
    width, layers, positions = (_whole(v, key, name) for key in ("n_embd", "n_layer", "n_positions"))
    is_tied = _choice(v, "tie_word_embeddings", name, True)
    config = ModelConfig(
        vocab_size=_whole(v, "vocab_size", name),
        encoder_seq_length=_length(positions),
        max_position_embeddings=positions,
        hidden_size=width,
        ffn_hidden_size=_whole(v, "n_inner", name, 4 * width),
        num_attention_heads=_whole(v, "n_head", name),
        dec_num_layers=layers,
        retrieval=False,
        normalization="layernorm",
        layernorm_epsilon=_real(v, "layer_norm_epsilon", name, 1e-5),
        activation=activations[activation],
        bias=True,
        share_embeddings=is_tied,
        position_embedding="learned",
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    names = {"embedding.weight": "wte.weight", "position_embedding.weight": "wpe.weight"}
    if not is_tied:
        names["head.weight"] = "lm_head.weight"
    parts = {"attention_norm": "ln_1", "ffn_norm": "ln_2", "attention.out": "attn.c_proj", "ffn.up": "mlp.c_fc"}
    parts |= {"ffn.down": "mlp.c_proj", **{f"attention.{part}": f"attn.{part}" for part in "qkv"}}
    for kind in ("weight", "bias"):
        names[f"final_norm.{kind}"] = f"ln_f.{kind}"
        for i in range(layers):
            names |= {f"layers.{i}.{ours}.{kind}": f"h.{i}.{theirs}.{kind}" for ours, theirs in parts.items()}
    return config, names


def _split_gpt2(state: State, config: ModelConfig, name: str) -> State:
    """GPT-2's matrices are [in, out], with q, k and v side by side in c_attn."""
    out: State = {}
    width = config.hidden_size
    for key, value in state.items():
        key = key.removeprefix("transformer.")
        if key.endswith((".attn.bias", ".attn.masked_bias")):  # the causal mask
            continue
        if ".c_" in key and key.endswith("weight") and value.dim() == 2:
            value = value.T
        if ".c_attn." not in key:
            out[key] = value
            continue
        if value.shape[:1] != (3 * width,):
            raise StoreError(f"{name}: {key} has the shape {tuple(value.shape)}", f"expected {3 * width} = 3 x n_embd")
        for part, rows in zip("qkv", value.split(width)):
            out[key.replace("c_attn", part)] = rows
    return out


def _renamed(state: State, names: dict[str, str], prefix: str, where: str) -> State:
    """Tensors under our names. Raises StoreError listing what is missing and what is left over."""
    state = {key.removeprefix(prefix): value for key, value in state.items() if not key.endswith("rotary_emb.inv_freq")}
    if "head.weight" not in names:
        state.pop("lm_head.weight", None)  # tied: the embedding again
    check_names(set(state), set(names.values()), where)
    odd = next((theirs for theirs in names.values() if state[theirs].dtype not in TYPES), None)
    if odd is not None:
        raise StoreError(f"{where}: {odd} has the type {state[odd].dtype}", "quantised weights are not read")
    return {ours: state[theirs].contiguous() for ours, theirs in names.items()}


def check_names(found: set[str], expected: set[str], where: str) -> None:
    """Raise StoreError listing the tensors that are missing and those that are left over."""
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing or extra:
        parts = [f"missing {missing[:8]}"] * bool(missing) + [f"extra {extra[:8]}"] * bool(extra)
        raise StoreError(f"{where} does not fit its config", "; ".join(parts), "check config.json beside the weights")
