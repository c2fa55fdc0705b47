"""Hugging Face folders and GGUF files of GPT-2, Llama, Mistral and Qwen2 as plain decoders of this project.

Reads config.json with model.safetensors (or its shards, or pytorch_model.bin), or one .gguf file; needs no transformers.
What a config asks for and this model does not compute is refused by its name.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retro_engine.config import ModelConfig, check_model
from retro_engine.data.chat_files import DEFAULT, ChatFiles, named_templates
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import MissingExtraError, MissingInputError, StoreError, nearest
from retro_engine.interop.archives import read_archive
from retro_engine.interop.exports import MODEL_TYPE, read_export

LLAMA_FAMILY = ("llama", "mistral", "qwen2")
KNOWN = ("gpt2", *LLAMA_FAMILY)
CHUNK = 64  # m of the imported config; a retro-fit may choose another
LONGEST = 2048  # tokens of a training sequence, where the original takes more
State = dict[str, Tensor]


def read_folder(folder: str | Path) -> tuple[ModelConfig, State, list[str]]:
    """The decoder of a Hugging Face folder: its config, its weights under our names, and notes for the user.

    Raises StoreError naming the setting, the tensors that are missing or extra, or the architecture that is not known.
    """
    folder = Path(folder)
    values = read_json(folder / "config.json")
    state = read_weights(folder)
    if values.get("model_type") == MODEL_TYPE:
        return *read_export(values, state, str(folder)), []
    return convert(values, state, str(folder))


def convert(values: dict[str, Any], state: State, name: str) -> tuple[ModelConfig, State, list[str]]:
    """The same from the values of a config.json and a state dict; `name` is for errors."""
    kind = values.get("model_type")
    if kind not in KNOWN:
        why = nearest(str(kind), list(KNOWN)) or f"known: {', '.join(KNOWN)}"
        raise StoreError(f"{name} has the architecture {kind}", why, "export it as one of these, or import its weights")
    try:
        config, names = _gpt2(values, name) if kind == "gpt2" else _llama(values, name)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{name}: its config cannot be read", f"{type(error).__name__}: {error}") from error
    check_model(config)
    if kind == "gpt2":
        state = _split_gpt2(state, config, name)
    prefix = "transformer." if kind == "gpt2" else ""
    notes = []
    window = values.get("sliding_window")
    if kind != "gpt2" and window and (kind == "mistral" or values.get("use_sliding_window")):
        notes.append(f"attention beyond {window} tokens differs from the original's sliding window")
    return config, _renamed(state, names, prefix, name), notes


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
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
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
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise MissingInputError(f"{path} does not exist", "the index names it") from error
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{path} cannot be read", str(error)) from error


def _refuse(name: str, key: str, value: Any, why: str) -> None:
    raise StoreError(f"{name}: {key}={value} is not supported", why)


def _length(positions: int) -> int:
    """Tokens of a training sequence: whole chunks, at most what the original takes."""
    return max(CHUNK, min(positions, LONGEST) // CHUNK * CHUNK)


def _llama(v: dict[str, Any], name: str) -> tuple[ModelConfig, dict[str, str]]:
    """Config, and for each of our tensors the original's name."""
    heads, width, layers = int(v["num_attention_heads"]), int(v["hidden_size"]), int(v["num_hidden_layers"])
    rope = {
        "rope_theta": v.get("rope_theta", 10000.0),
        **(v.get("rope_scaling") or {}),
        **(v.get("rope_parameters") or {}),
    }
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        _refuse(name, "rope_scaling", kind, "rotary positions are not scaled here")
    if v.get("hidden_act", "silu") != "silu":
        _refuse(name, "hidden_act", v["hidden_act"], "the gated activation here is SiLU")
    if int(v.get("head_dim") or width // heads) * heads != width:
        _refuse(name, "head_dim", v["head_dim"], f"{heads} heads of hidden_size={width} have {width // heads} features")
    is_qwen = v["model_type"] == "qwen2"
    has_bias, has_ffn_bias = bool(v.get("attention_bias")), bool(v.get("mlp_bias"))
    if has_bias != has_ffn_bias:
        _refuse(name, "attention_bias", has_bias, f"mlp_bias is {has_ffn_bias}; here both have biases or neither")
    positions = int(v.get("max_position_embeddings", LONGEST))
    is_tied = bool(v.get("tie_word_embeddings", False))
    config = ModelConfig(
        vocab_size=int(v["vocab_size"]),
        encoder_seq_length=_length(min(positions, int(v.get("sliding_window") or positions))),
        hidden_size=width,
        ffn_hidden_size=int(v["intermediate_size"]),
        num_attention_heads=heads,
        num_query_groups=int(v.get("num_key_value_heads") or heads),
        dec_num_layers=layers,
        retrieval=False,
        layernorm_epsilon=float(v.get("rms_norm_eps", 1e-6)),
        bias=has_bias,
        qk_bias=True if is_qwen else None,
        v_bias=True if is_qwen else None,
        share_embeddings=is_tied,
        rotary_base=float(rope["rope_theta"]),
        rotary_percentage=float(rope.get("partial_rotary_factor", v.get("partial_rotary_factor") or 1.0)),
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    names = {"embedding.weight": "model.embed_tokens.weight", "final_norm.weight": "model.norm.weight"}
    if not is_tied:
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
    for i in range(layers):
        for ours, theirs in parts.items():
            names[f"layers.{i}.{ours}.weight"] = f"model.layers.{i}.{theirs}.weight"
            if biased.get(ours, has_bias and "norm" not in ours):
                names[f"layers.{i}.{ours}.bias"] = f"model.layers.{i}.{theirs}.bias"
    return config, names


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
        if bool(v.get(key, wanted)) != wanted:
            _refuse(name, key, v[key], f"only {str(wanted).lower()} is")
    width, layers, positions = int(v["n_embd"]), int(v["n_layer"]), int(v["n_positions"])
    is_tied = bool(v.get("tie_word_embeddings", True))
    config = ModelConfig(
        vocab_size=int(v["vocab_size"]),
        encoder_seq_length=_length(positions),
        max_position_embeddings=positions,
        hidden_size=width,
        ffn_hidden_size=int(v.get("n_inner") or 4 * width),
        num_attention_heads=int(v["n_head"]),
        dec_num_layers=layers,
        retrieval=False,
        normalization="layernorm",
        layernorm_epsilon=float(v.get("layer_norm_epsilon", 1e-5)),
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
        if ".c_" in key and key.endswith("weight"):
            value = value.T
        if ".c_attn." not in key:
            out[key] = value
            continue
        if len(value) != 3 * width:
            shape = tuple(value.shape)
            raise StoreError(f"{name}: {key} has {shape[0]} features", f"expected {3 * width} = 3 x n_embd")
        for part, rows in zip("qkv", value.split(width)):
            out[key.replace("c_attn", part)] = rows
    return out


def _renamed(state: State, names: dict[str, str], prefix: str, where: str) -> State:
    """Tensors under our names. Raises StoreError listing what is missing and what is left over."""
    state = {key.removeprefix(prefix): value for key, value in state.items() if not key.endswith("rotary_emb.inv_freq")}
    if "head.weight" not in names:
        state.pop("lm_head.weight", None)  # tied: the embedding again
    missing, extra = sorted(set(names.values()) - state.keys()), sorted(state.keys() - set(names.values()))
    if missing or extra:
        parts = [f"missing {missing[:8]}"] * bool(missing) + [f"extra {extra[:8]}"] * bool(extra)
        raise StoreError(f"{where} does not fit its config", "; ".join(parts), "check config.json beside the weights")
    return {ours: state[theirs].contiguous() for ours, theirs in names.items()}


# --- GGUF

GGUF_LAYER = {
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
GGUF_ROOT = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
DIGIT_SPLITTERS = ("smollm",)  # whose tokenizer reads every digit alone
BYTE_LEVEL = ("gpt-2", "default", *DIGIT_SPLITTERS)


def read_gguf(path: str | Path) -> tuple[ModelConfig, State, Tokenizer]:
    """The decoder and the tokenizer of a GGUF file, dequantised to fp32. Raises StoreError for what is not supported."""
    try:
        import gguf
        from gguf.quants import dequantize
    except ImportError as error:
        raise MissingExtraError(
            "gguf is not installed", "it reads .gguf files", "pip install 'retro-engine[hf]'"
        ) from error
    path = Path(path)
    if not path.is_file():
        raise MissingInputError(f"{path} does not exist", "", "name a .gguf file")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, OSError) as error:
        raise StoreError(f"{path} is not a GGUF file", str(error)) from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    kind = fields.get("general.architecture")
    if kind not in ("llama", "qwen2"):
        raise StoreError(f"{path} has the architecture {kind}", "known in GGUF: llama, qwen2")
    state = {
        _gguf_name(str(tensor.name)): torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        for tensor in reader.tensors
    }
    values = _gguf_config(fields, kind, "lm_head.weight" not in state, str(path))
    if kind == "llama":
        for name in list(state):
            heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
            if heads is not None:
                state[name] = _halves_apart(state[name], values[heads])
    tokenizer = _gguf_tokenizer(fields, str(path))
    values["vocab_size"] = len(state["model.embed_tokens.weight"]) if "model.embed_tokens.weight" in state else 0
    config, weights, _ = convert(values, state, str(path))
    return config, weights, tokenizer


def _gguf_name(name: str) -> str:
    part, _, kind = name.rpartition(".")
    if part in GGUF_ROOT:
        return f"{GGUF_ROOT[part]}.{kind}"
    words = part.split(".")
    if len(words) == 3 and words[0] == "blk" and words[2] in GGUF_LAYER:
        return f"model.layers.{words[1]}.{GGUF_LAYER[words[2]]}.{kind}"
    return name  # reported as extra


def _gguf_config(fields: dict[str, Any], kind: str, is_tied: bool, name: str) -> dict[str, Any]:
    keys = {
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "hidden_size": "embedding_length",
        "num_hidden_layers": "block_count",
        "intermediate_size": "feed_forward_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
        "max_position_embeddings": "context_length",
    }
    missing = [key for key in keys.values() if f"{kind}.{key}" not in fields]
    if missing:
        raise StoreError(f"{name} does not say its {', '.join(missing)}", "the file's metadata has it")
    values = {ours: fields[f"{kind}.{key}"] for ours, key in keys.items()}
    rope = {"rope_theta": fields.get(f"{kind}.rope.freq_base", 10000.0)}
    scaling = fields.get(f"{kind}.rope.scaling.type", "none")
    rope["rope_type"] = "default" if scaling == "none" else scaling
    return values | {"model_type": kind, "rope_parameters": rope, "tie_word_embeddings": is_tied}


def _halves_apart(weight: Tensor, heads: int) -> Tensor:
    """Rows of rotary pairs lie beside each other in GGUF's llama; half a head apart here."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _gguf_tokenizer(fields: dict[str, Any], name: str) -> Tokenizer:
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    kind, splitter = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or splitter not in BYTE_LEVEL:
        raise StoreError(
            f"{name} has the tokenizer {kind} ({splitter})",
            f"known in GGUF: gpt2 with {', '.join(BYTE_LEVEL)}",
            "import the model's Hugging Face folder",
        )
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [(a, b) for a, _, b in (merge.partition(" ") for merge in fields["tokenizer.ggml.merges"])]
    backend = Backend(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, by_bytes]) if splitter in DIGIT_SPLITTERS else by_bytes
    backend.decoder = decoders.ByteLevel()
    control = 3  # token_type of control tokens
    backend.add_special_tokens([AddedToken(t, special=True) for t, k in zip(tokens, kinds) if k == control])
    tokenizer = Tokenizer(backend.to_str(), name)
    tokenizer.chat_files = _gguf_chat(fields, tokens, name)
    return tokenizer


def _gguf_chat(fields: dict[str, Any], tokens: list[str], name: str) -> ChatFiles:
    """Chat templates, special tokens by name, and the ids that end a text, a turn or a message."""
    templates = {
        key.removeprefix("tokenizer.chat_template").removeprefix(".") or DEFAULT: value
        for key, value in fields.items()
        if key == "tokenizer.chat_template" or key.startswith("tokenizer.chat_template.")
    }
    ids = {
        key: fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "eot", "eom", "unknown", "padding")
    }
    wrong = [f"{key}_token_id={i}" for key, i in ids.items() if i is not None and not 0 <= i < len(tokens)]
    if wrong:
        raise StoreError(
            f"{name}: {wrong[0]} is outside its {len(tokens)} tokens", "the file's metadata contradicts itself"
        )
    names = {"bos_token": ids["bos"], "eos_token": ids["eos"], "unk_token": ids["unknown"], "pad_token": ids["padding"]}
    named = {key: tokens[i] for key, i in names.items() if i is not None}
    ends = [ids[key] for key in ("eos", "eot", "eom")]
    return ChatFiles(named_templates(templates, name), named, tuple(dict.fromkeys(i for i in ends if i is not None)))
