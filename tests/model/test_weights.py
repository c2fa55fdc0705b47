"""Checkpoint files that do not fit: named, never half loaded."""

import json
from pathlib import Path

import pytest
import torch
from helpers import small_inputs, small_model
from safetensors.torch import save_file

from retro_engine.errors import MissingInputError, StoreError
from retro_engine.model.weights import config_to_json, read_config
from retro_engine.train.adapters import load_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = small_model()
    (tmp_path / "config.json").write_text(config_to_json(model.config))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    return tmp_path


def test_round_trip(folder: Path) -> None:
    model, loaded = small_model(), load_model(folder)
    tokens, neighbors = small_inputs(model)
    assert torch.equal(model(tokens, neighbors), loaded(tokens, neighbors))
    assert not loaded.training
    assert load_model(folder, torch.float32).embedding.weight.dtype == torch.float32


@pytest.mark.parametrize(("change", "message"), [
    ({"version": 3}, "version 3"),
    ({"model_type": "gpt2"}, "not a retro-engine config"),
    ({"num_experts": 8}, "unknown fields: num_experts"),
    ({"ffn_hidden_size": 48}, "does not fit the model"),
    ({"dec_num_layers": 4}, "missing"),
    ({"hidden_size": "32"}, "hidden_size=32 cannot be used"),
    ({"retrieval": 1}, "retrieval=1 cannot be used"),
    ({"dec_cross_attention": [True]}, "dec_cross_attention"),
    ({"hidden_size": -32}, "must be at least 1"),
    ({"num_attention_heads": 5}, "must be a multiple"),
])  # fmt: skip
def test_configs_that_do_not_fit(folder: Path, change: dict[str, object], message: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(StoreError, match=message):
        load_model(folder)


def test_files_that_are_not_there_or_broken(folder: Path) -> None:
    for name, content in (("model.safetensors", b"PK\x03\x04"), ("config.json", b"{")):
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        with pytest.raises(StoreError):
            load_model(folder)
        (folder / name).unlink()
        with pytest.raises(MissingInputError):
            load_model(folder)
        (folder / name).write_bytes(raw)
    assert read_config(folder) == small_model().config
