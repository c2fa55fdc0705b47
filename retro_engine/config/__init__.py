"""Every setting, the presets, the rules, and how a run's settings are put together: values <- fields <- rules <- presets <- load."""

from retro_engine.config.fields import (
    Config,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    SchedConfig,
    TrainedModelConfig,
    base_config,
    base_head_width,
    flat_keys,
    spelled_out,
)
from retro_engine.config.load import architecture, asked_accelerator, load_config, named_keys, to_yaml
from retro_engine.config.presets import PRESETS, preset_model
from retro_engine.config.rules import check, check_model
from retro_engine.config.values import splits

__all__ = [
    "PRESETS",
    "Config",
    "DataConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimConfig",
    "SchedConfig",
    "TrainedModelConfig",
    "architecture",
    "asked_accelerator",
    "base_config",
    "base_head_width",
    "check",
    "check_model",
    "flat_keys",
    "load_config",
    "named_keys",
    "preset_model",
    "spelled_out",
    "splits",
    "to_yaml",
]
