"""The presets: this project's own sizes, and other implementations as sets of fields."""

from dataclasses import fields
from typing import Any

from retro_engine.config.fields import ModelConfig
from retro_engine.config.rules import check_model
from retro_engine.errors import UsageError, nearest

_SMALL_RUN: dict[str, Any] = {  # what the small presets share: retrieval-ready, no dropout
    "model.init": "retrieval_ready",
    "model.activation": "gelu",
    "model.hidden_dropout": 0.0,
    "model.attention_dropout": 0.0,
    "model.enc_num_layers": 1,
    "model.enc_cross_attention": [],  # a neighbor's encoding depends on nothing else: it can be kept
    "model.micro_batch_size": 8,
    "model.optim.betas": [0.9, 0.98],
    "model.optim.weight_decay": 0.05,
    "model.optim.sched.warmup_steps": 50,
    "model.data.neighbor_dropout": 0.1,
}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        **_SMALL_RUN,
        "model.encoder_seq_length": 256,
        "model.hidden_size": 128,
        "model.ffn_hidden_size": 512,
        "model.num_attention_heads": 4,
        "model.dec_num_layers": 4,
        "model.dec_cross_attention": [1, 2, 3],
        "model.optim.lr": 3e-3,
    },
    "small": {
        **_SMALL_RUN,
        "model.encoder_seq_length": 256,
        "model.data.neighbor_dropout": 0.45,  # what pays for the second neighbor, and keeps the decoder good without
        "model.hidden_size": 256,
        "model.ffn_hidden_size": 1024,
        "model.num_attention_heads": 4,
        "model.dec_num_layers": 4,
        "model.dec_cross_attention": [1, 2, 3],
        "model.optim.lr": 2e-3,
    },
    "base": {"model.enc_cross_attention": []},
    # What the two removed implementations compute; widths, depths and layer lists stay the user's.
    "mcore": {
        "model.normalization": "layernorm",
        "model.activation": "gelu",
        "model.bias": True,
        "model.encoder_position_embedding": "none",
        "model.cca_position_embedding": "none",
        "model.partial_chunk": "first",
        "model.mask_neighbors": False,
        "model.encoder_ca_residual": "norm",
        "model.encoder_final_norm": False,
        "model.decoder_final_norm": False,
        "model.enc_cross_attention": [0],
        "model.cca_reset": False,
        "model.reset_attention": False,
    },
    "nemo": {
        "model.normalization": "layernorm",
        "model.activation": "gelu",
        "model.bias": True,
        "model.output_bias": True,
        "model.rotary_table_precision": "model",
        "model.cca_bias_everywhere": True,
        "model.cca_reset": False,
    },
}


def preset_model(name: str, **overrides: Any) -> ModelConfig:
    """The architecture of preset `name` with fields replaced; checked."""
    values = {key.removeprefix("model."): value for key, value in preset(name).items()}
    names = {item.name for item in fields(ModelConfig)}
    config = ModelConfig(**{key: value for key, value in values.items() if key in names} | overrides)
    check_model(config)
    return config


def preset(name: str) -> dict[str, Any]:
    """The settings of preset `name`, by dotted key."""
    if name not in PRESETS:
        raise UsageError(
            f"preset {name!r} does not exist", nearest(name, list(PRESETS)), f"one of {', '.join(PRESETS)}"
        )
    return PRESETS[name]
