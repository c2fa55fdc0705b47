"""Checkpoint files that do not fit: named, never half loaded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import small_config, small_inputs, small_model
from safetensors.torch import save_file

from retro_engine.errors import MissingInputError, StoreError
from retro_engine.model.retro import RetroModel
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


GROWN = """
import sys
from retro_engine.bench.machine import resident_mib
from retro_engine.train.adapters import load_model
before = resident_mib(is_peak=True)
model = load_model(sys.argv[1], sys.argv[2])
print(resident_mib(is_peak=True) - before, *sorted({"torch._dynamo", "sympy", "numba"} & set(sys.modules)))
"""


def test_no_second_copy_is_made(tmp_path: Path) -> None:
    """In fp32 the file's pages are enough, which nobody has read yet; in int8 one fp32 matrix at a time is there beside."""
    config = small_config(hidden_size=512, num_attention_heads=4, ffn_hidden_size=2048, vocab_size=16000)
    (tmp_path / "config.json").write_text(config_to_json(config))
    state = RetroModel(config).state_dict()
    save_file(state, tmp_path / "model.safetensors")
    size = sum(4 * value.numel() for value in state.values()) / 2**20
    embedding = 4 * 16000 * 512 / 2**20  # the largest matrix; stays in its file
    for weights, most in (("fp32", 16), ("int8", size / 4 + embedding + 40)):
        command = [sys.executable, "-c", GROWN, str(tmp_path), weights]
        grown, *modules = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        assert float(grown) < most < size, weights
        assert not modules, "PyTorch's compiler is loaded to draw weights that are read"


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
