"""Hugging Face folders: logits of transformers to 1e-5, and what does not fit is named."""

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizer_helpers import llama2

from retro_engine.errors import MissingInputError, StoreError, UsageError
from retro_engine.generate.generator import Generator
from retro_engine.interop.huggingface import OFF, check_tokenizer, convert_decoder, read_folder
from retro_engine.model.decode_cache import new_cache
from retro_engine.model.decoding import step
from retro_engine.model.retro import RetroModel
from retro_engine.model.weights import load_state, new_model

LLAMA = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "initializer_range": 0.2,
}  # fmt: skip
GPT2 = {"vocab_size": 90, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 128, "initializer_range": 0.2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2),
    "gpt2_untied": ("GPT2", GPT2 | {"tie_word_embeddings": False, "n_inner": 100, "activation_function": "gelu"}),
    "llama": ("Llama", LLAMA),
    "smollm2": ("Llama", LLAMA | {"tie_word_embeddings": True, "rope_theta": 100000.0}),
    "llama_biases": ("Llama", LLAMA | {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 6}),
    "mistral": ("Mistral", LLAMA | {"sliding_window": None}),
    "mistral_window": ("Mistral", LLAMA | {"sliding_window": 100}),
    "llama_linear": ("Llama", LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama3": (
        "Llama",
        LLAMA
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "qwen2_window": ("Qwen2", LLAMA | {"use_sliding_window": True, "sliding_window": 80, "max_window_layers": 1}),
    "qwen2": ("Qwen2", LLAMA | {"tie_word_embeddings": True, "rope_theta": 1e6}),
}


def make(name: str, folder: Path, **save: Any) -> Any:
    """A small random model of transformers, saved to `folder`; biases and norms are random too."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    kind, values = CASES[name]
    torch.manual_seed(1)
    model = getattr(transformers, f"{kind}ForCausalLM" if kind != "GPT2" else "GPT2LMHeadModel")(
        getattr(transformers, f"{kind}Config")(**values)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder, **save)
    return model


def ours(folder: Path) -> RetroModel:
    config, state, _ = read_folder(folder)
    model = RetroModel(config)
    load_state(model, state, str(folder))
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    theirs, model = make(name, tmp_path), ours(tmp_path)
    tokens = torch.randint(0, 90, (2, 37), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, found = theirs(tokens).logits, model(tokens)
    error = (found - expected).abs()
    assert error.max() <= 1e-5 * max(1.0, float(expected.abs().max())), (
        f"max {error.max():.2e}, mean {error.mean():.2e}"
    )
    assert float(expected.std()) > 0.1  # the weights are large enough to tell
    cache = new_cache(model, 2, 37)
    with torch.no_grad():
        stepped = torch.cat([step(model, cache, tokens[:, i : i + 1]) for i in range(37)], 1)
    assert (stepped - expected).abs().max() <= 1e-4


def test_shards_and_torch_files_are_the_same(tmp_path: Path) -> None:
    make("qwen2", tmp_path / "sharded", max_shard_size="30KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    make("qwen2", tmp_path / "whole")
    state = load_file(tmp_path / "whole" / "model.safetensors")
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    torch.save(state, old / "pytorch_model.bin")
    tokens = torch.arange(30)[None]
    expected = ours(tmp_path / "whole")(tokens)
    for name in ("sharded", "old"):
        assert torch.equal(ours(tmp_path / name)(tokens), expected), name


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A Llama folder with values of its config or its tensors changed."""
    base = tmp_path_factory.mktemp("llama")
    make("llama", base)
    config, state = json.loads((base / "config.json").read_text()), load_file(base / "model.safetensors")

    def changed(values: dict[str, Any] | None = None, tensors: dict[str, torch.Tensor | None] | None = None) -> Path:
        folder = tmp_path_factory.mktemp("changed")
        (folder / "config.json").write_text(json.dumps(config | (values or {})))
        merged = {**state, **(tensors or {})}
        save_file({name: value for name, value in merged.items() if value is not None}, folder / "model.safetensors")
        return folder

    return changed


@pytest.mark.parametrize(("values", "message"), [
    ({"model_type": "bloom"}, "architecture bloom\n.*known: gpt2, llama"),
    ({"model_type": "lama"}, "did you mean llama"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "rope_parameters": None}, "low_freq_factor=None"),
    ({"rope_scaling": {"type": "dynamic", "factor": 8.0}, "rope_parameters": None}, "rope_scaling=dynamic"),
    ({"rope_scaling": {"type": "linear", "factor": "8"}, "rope_parameters": None}, "factor=8 cannot be used"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters="),
    ({"sliding_window": 32}, "sliding_window=32"),
    ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types="),
    ({"qk_norm": True}, "qk_norm=True"),
    ({"quantization_config": {"bits": 4}}, "quantization_config="),
    ({"logit_scale": 0.5}, "logit_scale=0.5"),
    ({"num_local_experts": 8}, "num_local_experts=8"),
    ({"partial_rotary_factor": 1.5, "rope_parameters": None}, "partial_rotary_factor=1.5"),
    ({"num_hidden_layers": -1}, "num_hidden_layers=-1 cannot be used"),
    ({"num_hidden_layers": "3"}, "num_hidden_layers=3 cannot be used"),
    ({"num_hidden_layers": 1 << 40}, "does not fit its config|cannot be used"),
    ({"num_attention_heads": 7}, "7 heads of hidden_size=48"),
    ({"num_key_value_heads": 4}, "must divide num_attention_heads"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings=yes"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_scaling=yarn"),
    ({"head_dim": 16}, "head_dim=16"),
    ({"hidden_act": "relu"}, "hidden_act=relu"),
    ({"attention_bias": True}, "attention_bias=True"),
    ({"hidden_size": None}, "hidden_size=None cannot be used"),
    ({"num_attention_heads": "many"}, "num_attention_heads=many cannot be used"),
    ({"num_hidden_layers": 4}, r"missing \['model.layers.3.input_layernorm.weight'"),
    ({"num_hidden_layers": 2}, r"extra \['model.layers.2.input_layernorm.weight'"),
])  # fmt: skip
def test_configs_that_do_not_fit(llama: Callable[..., Path], values: dict[str, Any], message: str) -> None:
    with pytest.raises(StoreError, match=message):
        read_folder(llama(values))


def test_tensors_that_do_not_fit(llama: Callable[..., Path]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(StoreError, match=rf"missing \['{name}'\]; extra \['odd'\]"):
        read_folder(llama(tensors={name: None, "odd": torch.zeros(2)}))
    with pytest.raises(StoreError, match=r"layers.1.ffn.up.weight \(79, 48\), expected \(80, 48\)"):
        ours(llama(tensors={name: torch.zeros(79, 48)}))


def test_files_that_are_not_there_or_broken(llama: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="config.json does not exist"):
        read_folder(tmp_path)
    folder = llama()
    (folder / "model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(StoreError, match="model.safetensors cannot be read"):
        read_folder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(MissingInputError, match="has no weights"):
        read_folder(folder)
    index = folder / "model.safetensors.index.json"
    for weights, message in (({"a": "../../x"}, "shards lie beside"), (None, "no weight_map")):
        index.write_text(json.dumps({"weight_map": weights}))
        with pytest.raises(StoreError, match=message):
            read_folder(folder)
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(MissingInputError, match="gone.safetensors does not exist"):
        read_folder(folder)
    for text in ("{", "[]"):
        (folder / "config.json").write_text(text)
        with pytest.raises(StoreError, match=r"config.json (is not JSON|holds no settings)"):
            read_folder(folder)


def test_a_tokenizer_with_more_entries_than_rows(small_store: Any) -> None:
    from helpers import small_config

    with pytest.raises(StoreError, match=r"has 300 entries\n.*embedding has 299 rows"):
        check_tokenizer(small_store.tokenizer, small_config(vocab_size=299), "it")
    check_tokenizer(small_store.tokenizer, small_config(vocab_size=320), "it")


def test_beyond_the_window_it_takes_no_more(tmp_path: Path) -> None:
    make("mistral_window", tmp_path)
    config, _, notes = read_folder(tmp_path)
    assert (config.max_position_embeddings, config.encoder_seq_length) == (100, 64)
    assert notes == ["it takes 100 tokens at most: the original's sliding window"]
    tokenizer = llama2()
    model = RetroModel(replace(config, vocab_size=tokenizer.vocab_size))
    with pytest.raises(UsageError, match="the model has 100 positions"):
        Generator(model, tokenizer).generate("The castle", 99)


def test_what_is_not_known_is_said(llama: Callable[..., Path]) -> None:
    assert read_folder(llama({"unsloth_version": "1", "_note": 1, "qk_norm": False, "num_experts": None}))[2] == [
        "not known and not used: unsloth_version"
    ]


def test_special_files_are_not_read(llama: Callable[..., Path]) -> None:
    """A pipe would be waited for without end."""
    folder = llama()
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(MissingInputError):
            read_folder(folder)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_values_in_a_config(
    llama_values: tuple[dict[str, Any], dict[str, torch.Tensor]], data: st.DataObject
) -> None:
    """Typed, and quick: nothing is made of a size that no tensor has."""
    values, state = llama_values
    key = data.draw(st.sampled_from(sorted(set(values) | OFF.keys())))
    odd = st.sampled_from(
        [None, True, -1, 0, 1 << 62, 3, 0.5, float("nan"), float("inf"), "8", [], {}, {"factor": -1}, [[]]]
    )
    changed = values | {key: data.draw(odd)}
    with contextlib.suppress(StoreError):
        config, found, _ = convert_decoder(changed, state, "it")
        new_model(config, found, "it")


@pytest.fixture(scope="module")
def llama_values(llama: Callable[..., Path]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    folder = llama()
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
