"""Weights in and out: our safetensors files.

Reads and writes `model.safetensors` and `config.json`; nothing is unpickled.
"""

import json
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from retro_engine.config import ModelConfig, architecture, check_model
from retro_engine.data import files
from retro_engine.data.checkpoint_files import CONFIG_FILE
from retro_engine.errors import MissingInputError, StoreError, UsageError, read_error
from retro_engine.model.retro import RetroModel

VERSION = 2  # 1 had q, k and v in one matrix


def config_to_json(config: ModelConfig) -> str:
    return json.dumps({"model_type": "retro_engine", "version": VERSION, **architecture(config)}, indent=1) + "\n"


def read_config(folder: str | Path) -> ModelConfig:
    """The architecture saved in FOLDER/config.json. Raises StoreError for another project's or a newer file."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise MissingInputError(f"{path} does not exist", "a checkpoint folder has a config.json", "retro train")
    try:
        values = files.read_json(path)
    except OSError as error:
        raise read_error(error, path, "take the file from a complete checkpoint") from error
    except ValueError as error:
        raise StoreError(f"{path} is not JSON", str(error), "take the file from a complete checkpoint") from error
    if not isinstance(values, dict) or values.pop("model_type", None) != "retro_engine":
        raise StoreError(f"{path} is not a retro-engine config", "model_type is not retro_engine")
    version = values.pop("version", None)
    if version != VERSION:
        do = "update retro-engine" if isinstance(version, int) and version > VERSION else "train it again"
        raise StoreError(f"{path} has version {version}", f"this program reads version {VERSION}", do)
    return read_architecture(values, str(path))


def read_architecture(values: dict[str, Any], name: str) -> ModelConfig:
    """The config that `architecture` wrote. Raises StoreError for fields or values that no version of it had."""
    kinds = get_type_hints(ModelConfig)
    unknown = sorted(set(values) - set(kinds))
    if unknown:
        raise StoreError(f"{name} has unknown fields: {', '.join(unknown)}", "it was written by another version")
    for key, value in values.items():
        if not _is_of(value, kinds[key]):
            raise StoreError(f"{name}: {key}={str(value)[:80]} cannot be used", f"it is a {type(value).__name__}")
    config = ModelConfig(**values)
    try:
        check_model(config)
    except UsageError as error:
        raise StoreError(f"{name}: {error.what}", error.why) from error
    return config


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value of JSON is of a field's type: int for float, but no bool for a number."""
    if get_origin(kind) is UnionType:
        return any(_is_of(value, one) for one in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_of(one, get_args(kind)[0]) for one in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)


def new_model(config: ModelConfig, state: dict[str, Tensor], name: str) -> RetroModel:
    """A model on these weights themselves: none is drawn, none is copied. What does not fit is refused (`load_state`)."""
    if config.dec_num_layers + config.enc_num_layers * config.retrieval > len(state):
        raise StoreError(
            f"{name} does not fit the model",
            f"{config.dec_num_layers} layers, and {len(state)} tensors",
            "check the config beside the weights",
        )
    model = undrawn_model(config)
    _check_shapes(model, state, name)
    dtype = state["embedding.weight"].dtype
    model.load_state_dict({key: value.to(dtype) for key, value in state.items()}, assign=True)
    return model


def undrawn_model(config: ModelConfig) -> RetroModel:
    """A model whose parameters have no memory yet."""
    with torch.device("meta"), _Undrawn():
        return RetroModel(config)


class _Undrawn(TorchFunctionMode):
    """Parameters are not filled: on no device that is free (PyTorch loads its compiler to draw on "meta")."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("normal_", "uniform_", "kaiming_uniform_", "ones_", "zeros_", "fill_", "zero_"):
            return next(iter((*args, *(kwargs or {}).values())))  # the tensor, as it is
        return func(*args, **(kwargs or {}))


def load_state(model: RetroModel, state: dict[str, Tensor], name: str) -> None:
    """Copy `state` into `model`, whose type becomes the state's. Raises StoreError listing what does not fit."""
    _check_shapes(model, state, name)
    model.to(state["embedding.weight"].dtype)
    model.load_state_dict(state)


def _check_shapes(model: RetroModel, state: dict[str, Tensor], name: str) -> None:
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    wrong = [
        f"{key} {found[key]}, expected {shape}" for key, shape in expected.items() if found.get(key, shape) != shape
    ]
    wrong += [f"{key} is {value.dtype}" for key, value in state.items() if not value.is_floating_point()]
    if missing or extra or wrong:
        parts = [f"missing {missing[:8]}"] * bool(missing) + [f"extra {extra[:8]}"] * bool(extra) + wrong[:8]
        raise StoreError(f"{name} does not fit the model", "; ".join(parts), "check the config beside the weights")
