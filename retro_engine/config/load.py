"""How a run's settings are put together.

Order, later wins: defaults < preset < file < environment (`RETRO_CONFIG__MODEL__MICRO_BATCH_SIZE=8`) <
overrides (`key=value`, `+key=value`, `++key=value`, `~key`). Reads YAML files; writes nothing.
"""

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from retro_engine.config.fields import Config, ModelConfig, TrainedModelConfig, flat_keys
from retro_engine.config.hints import kind_of, nearest_key, require_settings, wrong_type
from retro_engine.config.nemo_keys import RENAMED, translate
from retro_engine.config.nemo_names import as_list, map_names, refuse_unspeakable
from retro_engine.config.presets import preset
from retro_engine.config.rules import check
from retro_engine.config.values import require
from retro_engine.config.yaml_file import read_yaml
from retro_engine.errors import UsageError
from retro_engine.progress import note

ENVIRONMENT_PREFIX = "RETRO_CONFIG__"


def load_config(
    overrides: Sequence[str | tuple[str, Any]] | None = None,
    preset_name: str | None = None,
    file: str | None = None,
    say: Callable[[str], None] = note,
) -> Config:
    """Defaults, preset, file, environment and overrides, merged, typed and checked.

    An override is `key=value` as on the command line, or a pair (key, value). Raises UsageError naming the key (of those
    that are no settings all), the nearest known one and the rule; MissingInputError for the file.
    """
    known = flat_keys(Config())
    from_preset = preset(preset_name) if preset_name else {}
    from_file = flat_keys(read_yaml(Path(file))) if file is not None else {}
    typed = _environment(known) + [_parse_override(item) if isinstance(item, str) else item for item in overrides or []]
    leaves, refused = translate([_leaves(list(from_file.items())), _leaves(typed)], from_preset, say)
    leaves = [(key, as_list(key, value)) for key, value in [*_leaves(list(from_preset.items())), *leaves]]
    require_settings([key for key, _ in leaves], known, refused)
    for key, value in leaves:
        refuse_unspeakable(key, value)
    config = _filled(leaves, known)
    # a file that a run, or `config show`, wrote says every default: nobody asked for those
    asked = {key for key, value in from_file.items() if value != known.get(key)}
    map_names(config, asked | {key for key, _ in _leaves(typed)}, say)
    _read_shape_file(config.model)
    if config.model.init_from is None:  # else what the model inherits is not known yet: train/retrofit.py checks
        check(config)
    return config


def _filled(leaves: Sequence[tuple[str, Any]], known: dict[str, Any]) -> Config:
    """The defaults with `leaves` in their place, of their types. Raises UsageError."""
    if all(type(value) in (bool, int, float) and type(value) is type(known[key]) for key, value in leaves):
        plain = Config()  # nothing to convert or to resolve: without a fifth of a second for the library that does
        for key, value in leaves:
            *sections, name = key.split(".")
            setattr(functools.reduce(getattr, sections, plain), name, value)
        return plain
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException, ValidationError

    tree = OmegaConf.structured(Config)
    for key, value in leaves:
        try:
            OmegaConf.update(tree, key, value)
        except ValidationError as error:
            raise wrong_type(key, value) from error
        except OmegaConfBaseException as error:
            why = str(error).splitlines()[0]
            raise UsageError(f"{key}={value!r:.200} does not fit", why, f"expected {kind_of(key)}") from error
    try:
        config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise UsageError("the settings do not resolve", str(error).splitlines()[0], "retro config show") from error
    assert isinstance(config, Config), type(config)
    return config


def named_keys(overrides: Sequence[str], with_environment: bool = True) -> set[str]:
    """The keys that overrides, and the environment, name."""
    asked = _environment(flat_keys(Config())) if with_environment else []
    return {RENAMED.get(key, key) for key, _ in _leaves([*asked, *map(_parse_override, overrides)])}


def asked_accelerator(overrides: Sequence[str], device: str | None) -> str:
    """What --device, or trainer.accelerator among `overrides` or in the environment, asks for; auto without a word."""
    key = "trainer.accelerator"
    named = [_parse_override(text) for text in overrides]
    asked = [*_environment(flat_keys(Config())), *named]
    found = load_config([(name, value) for name, value in asked if name == key], say=lambda text: None).trainer
    if device is not None and any(name == key for name, _ in named) and found.accelerator != device:
        raise UsageError(f"--device {device} and {key}={found.accelerator}", "they say different things", "name one")
    return device or found.accelerator


def _environment(known: dict[str, Any]) -> list[tuple[str, Any]]:
    """Settings in environment variables; some of NeMo's names have capitals, which those lose."""
    names = {key.lower(): key for key in known}
    found = []
    for name in sorted(os.environ):
        if name.startswith(ENVIRONMENT_PREFIX):
            key = name.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
            found.append(_parse_override(f"{names.get(key, key)}={os.environ[name]}"))
    return found


def _leaves(settings: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Settings of single keys; a value that is a section gives several."""
    return [leaf for key, value in settings for leaf in (flat_keys({key: value}) if value else {key: value}).items()]


def _read_shape_file(m: TrainedModelConfig) -> None:
    """The base widths that model.shape_file holds; what it said is in the settings then."""
    if m.shape_file is None:
        return
    for key, value in flat_keys(read_yaml(Path(m.shape_file))).items():
        name = key.removeprefix("model.")
        is_width = name in [item.name for item in fields(ModelConfig) if item.name.startswith("mup_base_")]
        is_whole = value is None or (isinstance(value, int) and not isinstance(value, bool))
        rule = f"it holds {key}: {value}; expected base widths"
        require(is_width and is_whole, "model.shape_file", m.shape_file, rule, "retro mup base writes one")
        setattr(m, name, value)
    m.shape_file = None


def _parse_override(text: str) -> tuple[str, Any]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(text)
    except (HydraException, ValueError, RecursionError) as error:  # a number of 5,000 digits, lists in lists in lists
        raise UsageError(
            f"{text!r:.200} is not an override",
            str(error).splitlines()[0],
            "write key=value, with quotes around odd characters",
        ) from error
    key = str(parsed.key_or_group)
    if parsed.is_sweep_override():
        value = text.split("=", 1)[1]
        if key == "model.data.splits_string":  # a shell has taken the quotes that NeMo's commands have around it
            return key, value
        raise UsageError(
            f"{text!r} is a sweep",
            "one run takes one value a key",
            f"""start a run per value; one value with commas is '{key}="{value}"'""",
        )
    if not parsed.is_delete():
        return key, parsed.value()
    defaults = flat_keys(Config())
    if key not in defaults:
        raise UsageError(f"~{key}: there is no such setting", nearest_key(key, defaults))
    return key, defaults[key]


def architecture(config: ModelConfig) -> dict[str, Any]:
    """The fields of ModelConfig alone, JSON-ready: a checkpoint's config.json."""
    names = {item.name for item in fields(ModelConfig)}
    return {name: value for name, value in asdict(config).items() if name in names}


def to_yaml(config: Config) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))
