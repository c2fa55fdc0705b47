"""What settings may be: choices, bounds and what must go together, each with the value, the rule and the fix."""

import math
from typing import Any

from retro_engine.config.fields import Config, ModelConfig, TrainedModelConfig, TrainerConfig, base_config, flat_keys
from retro_engine.errors import UsageError, nearest

# Accepted at their defaults alone.
NOT_BUILT = {
    "retro_model_file": None,
    "megatron_amp_O2": False,
}


def require(condition: bool, key: str, value: Any, rule: str, fix: str = "") -> None:
    """Raise UsageError for a setting where a condition does not hold."""
    if not condition:
        raise UsageError(f"{key}={value} cannot be used", rule, fix)


MODEL_CHOICES = {
    "normalization": ("rmsnorm", "layernorm"),
    "activation": ("swiglu", "gelu", "gelu_tanh"),
    "position_embedding": ("rope", "learned", "none"),
    "encoder_position_embedding": ("rope", "learned", "none"),
    "cca_position_embedding": ("rope", "none"),
    "rotary_table_precision": ("float32", "model"),
    "partial_chunk": ("last", "first"),
    "encoder_ca_residual": ("input", "norm"),
    "init": ("standard", "retrieval_ready"),
}
CHOICES = {
    "model.optim.name": ("adamw", "distributed_fused_adam"),  # the same
    "model.optim.sched.name": ("CosineAnnealing", "WSD", "constant"),
    "model.data.dataloader_type": ("cyclic", "single"),
    "model.data.question_neighbors": ("data", "retrieval", "both"),
    "trainer.accelerator": ("auto", "cpu", "gpu"),
    "trainer.strategy": ("auto", "ddp", "fsdp"),
    "trainer.precision": ("auto", "32", "bf16-mixed", "16-mixed", "64"),
    "model.activations_checkpoint_granularity": (None, "selective", "full"),
}
_MANY = 2**31
MODEL_BOUNDS: tuple[tuple[str, float, float], ...] = (
    ("vocab_size", 0, _MANY),
    ("encoder_seq_length", 1, _MANY),
    ("chunk_size", 1, 65535),
    ("retrieved_length", 1, _MANY),
    ("num_neighbors", 1, _MANY),
    ("hidden_size", 1, _MANY),
    ("ffn_hidden_size", 1, _MANY),
    ("num_attention_heads", 1, _MANY),
    ("num_query_groups", 1, _MANY),
    ("dec_num_layers", 1, _MANY),
    ("enc_num_layers", 0, _MANY),
    ("encoder_hidden_size", 1, _MANY),
    ("encoder_num_attention_heads", 1, _MANY),
    ("encoder_ffn_hidden_size", 1, _MANY),
    ("max_position_embeddings", 0, _MANY),
    ("layernorm_epsilon", 0, 1),
    ("rotary_percentage", 0, 1),
    ("rotary_base", 1, 1e12),
    ("hidden_dropout", 0, 0.999),
    ("attention_dropout", 0, 0.999),
    ("ffn_dropout", 0, 0.999),
    ("init_method_std", 0, 1e3),
    ("embedding_scale", 1e-12, 1e6),
    ("mup_base_hidden_size", 1, _MANY),
    ("mup_base_ffn_hidden_size", 1, _MANY),
    ("mup_base_encoder_hidden_size", 1, _MANY),
    ("mup_base_num_attention_heads", 1, _MANY),
)
BOUNDS: tuple[tuple[str, float, float], ...] = (
    ("seed", 0, 2**63 - 1),
    ("model.micro_batch_size", 1, _MANY),
    ("model.global_batch_size", 1, _MANY),
    ("model.optim.lr", 1e-12, 1e38),
    ("model.optim.weight_decay", 0, 1e6),
    ("model.optim.clip", 1e-12, math.inf),
    ("model.optim.sched.warmup_steps", 0, _MANY),
    ("model.optim.sched.constant_steps", 0, _MANY),
    ("model.optim.sched.min_lr", 0, 1e38),
    ("model.optim.sched.max_steps", 1, _MANY),
    ("model.data.neighbor_dropout", 0, 1),
    ("model.data.self_neighbor_steps", 0, _MANY),
    ("model.unfreeze_step", 0, _MANY),
    ("model.unfreeze_every", 1, _MANY),
    ("model.data.num_workers", 0, 1024),
    ("model.tensor_model_parallel_size", 1, _MANY),
    ("trainer.num_nodes", 1, _MANY),
    ("trainer.max_skipped_steps", 1, _MANY),
    ("trainer.loss_spike", 1, math.inf),
    ("trainer.max_steps", 1, _MANY),
    ("trainer.max_time_s", 1e-3, math.inf),
    ("trainer.accumulate_grad_batches", 1, _MANY),
    ("trainer.log_every_n_steps", 1, _MANY),
    ("exp_manager.checkpoint_every_n_steps", 1, _MANY),
    ("exp_manager.keep_last_n", 0, _MANY),
    ("inference.tokens_to_generate", 1, _MANY),
    ("inference.min_tokens_to_generate", 0, _MANY),
    ("inference.repetition_penalty", 1e-6, 1e6),
    ("inference.retro_inference.ft_neighbours", 0, _MANY),
    ("inference.retro_inference.retro_num_neighbors", 1, _MANY),
    ("inference.retro_inference.retro_gpt_retrieved_length", 1, _MANY),
)


def _check_bounds(key: str, value: float | None, low: float, high: float) -> None:
    """None = off is always allowed."""
    if value is not None and not low <= value <= high:
        rule = f"must be at least {low:g}" if value < low else f"must be at most {high:g}"
        raise UsageError(f"{key}={value} cannot be used", rule if value == value else "must be a number")


def check_model(c: ModelConfig) -> None:
    """Raise UsageError for the first field of a ModelConfig that breaks a rule."""
    for name, allowed in MODEL_CHOICES.items():
        value = getattr(c, name)
        require(value in allowed, f"model.{name}", value, f"one of {', '.join(allowed)}", nearest(value, list(allowed)))
    for key, low, high in MODEL_BOUNDS:
        _check_bounds(f"model.{key}", getattr(c, key), low, high)
    heads, width = c.num_attention_heads, c.hidden_size
    require(width % heads == 0, "model.hidden_size", width, f"must be a multiple of num_attention_heads={heads}")
    require(
        c.encoder_width % c.encoder_heads == 0,
        "model.encoder_hidden_size",
        c.encoder_width,
        f"must be a multiple of the encoder's heads ({c.encoder_heads})",
    )
    require(
        heads % c.key_value_heads == 0,
        "model.num_query_groups",
        c.key_value_heads,
        f"must divide num_attention_heads={heads}",
    )
    for name, layers in (("dec_cross_attention", c.dec_num_layers), ("enc_cross_attention", c.enc_num_layers)):
        for layer in getattr(c, name):
            require(
                not c.retrieval or 0 <= layer < layers,
                f"model.{name}",
                getattr(c, name),
                f"layers are 0-based and there are {layers}",
                f"set model.{name}",
            )
    require(
        not c.retrieval or bool(c.dec_cross_attention),
        "model.dec_cross_attention",
        "[]",
        "a RETRO cross-attends in at least one decoder layer",
        "model.retrieval=false is the plain decoder",
    )
    rows = c.max_position_embeddings or c.encoder_seq_length
    require(
        not c.retrieval or c.encoder_position_embedding != "learned" or rows >= c.r,
        "model.encoder_position_embedding",
        "learned",
        f"neighbors have {c.r} tokens and there are {rows} learned positions",
        f"model.max_position_embeddings={c.r}",
    )
    _check_positions(c)
    if c.init == "retrieval_ready" and c.retrieval:
        _check_retrieval_ready(c)
    if c.mup:
        require(c.init == "standard", "model.mup", True, "retrieval_ready sets its own scales", "model.init=standard")
        base = c.mup_base_hidden_size
        require(
            base is not None,
            "model.mup",
            True,
            "width scaling is relative to base widths",
            "model.mup_base_hidden_size=64",
        )
        check_model(base_config(c))


def _check_positions(c: ModelConfig) -> None:
    require(
        c.position_embedding != "rope" or c.encoder_seq_length <= (c.max_position_embeddings or _MANY),
        "model.encoder_seq_length",
        c.encoder_seq_length,
        f"the model takes {c.max_position_embeddings} tokens at most (max_position_embeddings)",
    )
    pairs = int(c.head_width * c.rotary_percentage) // 2
    require(
        c.rotary_factors is None
        or (len(c.rotary_factors) == pairs and all(0 < factor < math.inf for factor in c.rotary_factors)),
        "model.rotary_factors",
        str(c.rotary_factors)[:80],
        f"a number above 0 for each of the {pairs} rotary frequencies",
    )


def _check_retrieval_ready(c: ModelConfig) -> None:
    pairs = int(c.head_width * c.rotary_percentage) // 2
    encoder_pairs = int(c.encoder_width // c.encoder_heads * c.rotary_percentage) // 2
    ropes = {c.position_embedding, c.encoder_position_embedding, c.cca_position_embedding}
    conditions = {
        "share_embeddings must be true": c.share_embeddings,
        "the encoder must be as wide as the decoder (encoder_hidden_size)": c.encoder_width == c.hidden_size,
        "the encoder must have at least one layer (enc_num_layers)": c.enc_num_layers >= 1,
        "the encoder must have two heads for its two offsets (encoder_num_attention_heads)": c.encoder_heads >= 2,
        "no grouped queries (num_query_groups)": c.key_value_heads == c.num_attention_heads,
        "at least 12 rotary dimensions a head (num_attention_heads, rotary_percentage)": min(pairs, encoder_pairs) >= 6,
        "RoPE in decoder, encoder and CCA": ropes == {"rope"},
        "q and k need biases (qk_bias)": c.has_qk_bias,
        "half-split RoPE (rotary_interleaved=false)": not c.rotary_interleaved,
    }
    for rule, holds in conditions.items():
        require(holds, "model.init", "retrieval_ready", rule, "change that, or set model.init=standard")


def check(config: Config) -> None:
    """Raise UsageError for the first setting of a run that breaks a rule."""
    check_model(config.model)
    m = config.model
    require(
        m.encoder_seq_length % m.chunk_size == 0,
        "model.encoder_seq_length",
        m.encoder_seq_length,
        f"training sequences are whole chunks of model.chunk_size={m.chunk_size} tokens",
        f"use {max(1, m.encoder_seq_length // m.chunk_size) * m.chunk_size}",
    )
    rows = m.max_position_embeddings
    require(
        m.position_embedding != "learned" or not rows or rows >= m.encoder_seq_length,
        "model.max_position_embeddings",
        rows,
        f"sequences have model.encoder_seq_length={m.encoder_seq_length} tokens",
        f"model.max_position_embeddings={m.encoder_seq_length}",
    )
    values = flat_keys(config)
    for key, low, high in BOUNDS:
        _check_bounds(key, values[key], low, high)
    betas = m.optim.betas
    is_pair = len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
    require(is_pair, "model.optim.betas", betas, "two numbers in [0, 1)")
    total = m.global_batch_size
    require(
        total is None or (total >= 1 and total % m.micro_batch_size == 0),
        "model.global_batch_size",
        total,
        f"must be a multiple of model.micro_batch_size={m.micro_batch_size}",
    )
    require(
        total is None or config.trainer.accumulate_grad_batches == 1,
        "trainer.accumulate_grad_batches",
        config.trainer.accumulate_grad_batches,
        "follows from model.global_batch_size when that is set",
    )
    for key, allowed in CHOICES.items():
        require(
            values[key] in allowed,
            key,
            values[key],
            f"one of {', '.join(str(value) for value in allowed)}",
            nearest(str(values[key]), [str(value) for value in allowed]),
        )
    for key, default in NOT_BUILT.items():
        require(values[key] == default, key, values[key], "this version has only the default", f"{key}={default}")
    require(
        "{question}" in m.data.question_template,
        "model.data.question_template",
        repr(m.data.question_template),
        "it has no {question}",
    )
    _check_trainer(config.trainer)
    _check_schedule(config)
    _check_freezing(m)
    _check_parallel(config)
    splits(m.data.splits_string)


def _check_trainer(trainer: TrainerConfig) -> None:
    devices = trainer.devices
    require(devices is None or devices >= 1 or devices == -1, "trainer.devices", devices, "at least 1, or -1: all GPUs")
    for name, low in (("val_check_interval", 1), ("limit_val_batches", 0)):
        key, value = f"trainer.{name}", getattr(trainer, name)
        if isinstance(value, float):
            is_share = low < value + 1 <= 2 if low else 0 <= value <= 1
            require(is_share, key, value, "with a point it is a share, at most 1.0", f"{key}={max(1, int(value))}")
        else:
            _check_bounds(key, value, low, _MANY)


def _check_schedule(config: Config) -> None:
    optim, sched = config.model.optim, config.model.optim.sched
    key = "model.optim.sched.constant_steps"
    if sched.name == "constant":
        rule = "sched.name=constant keeps the rate anyway"
        require(not sched.constant_steps, key, sched.constant_steps, rule, f"{key}=0")
        return
    require(
        optim.lr >= sched.min_lr,
        "model.optim.lr",
        optim.lr,
        f"the rate cannot come down to model.optim.sched.min_lr={sched.min_lr:g}: it is below",
        f"model.optim.sched.min_lr={optim.lr / 10:g}, or model.optim.sched.name=constant",
    )
    total = sched.max_steps or config.trainer.max_steps
    room = total - sched.warmup_steps
    is_cosine = sched.name == "CosineAnnealing"
    rule = f"of {total} steps {sched.warmup_steps} are warm-up: none is left to come down in"
    require(not is_cosine or not sched.constant_steps or sched.constant_steps < room, key, sched.constant_steps, rule)


def _check_freezing(m: TrainedModelConfig) -> None:
    for key, value, needed, has in (
        ("model.fit_cross_attention", m.fit_cross_attention, "model.init_from", m.init_from is not None),
        ("model.freeze_decoder", m.freeze_decoder, "model.init_from", m.init_from is not None),
        ("model.unfreeze_step", m.unfreeze_step is not None, "model.freeze_decoder", m.freeze_decoder),
        ("model.unfreeze_every", m.unfreeze_every is not None, "model.unfreeze_step", m.unfreeze_step is not None),
    ):
        require(not value or has, key, value, f"without {needed} it means nothing", f"set {needed}")
    if m.freeze_decoder:
        require(m.retrieval, "model.freeze_decoder", True, "a plain decoder has nothing else that could learn")
        share = m.data.neighbor_dropout
        rule = "a frozen decoder learns nothing from a batch without neighbors"
        require(share == 0, "model.data.neighbor_dropout", share, rule, "model.data.neighbor_dropout=0")


def _check_parallel(config: Config) -> None:
    m, size = config.model, config.model.tensor_model_parallel_size
    asked = config.tensor_model_parallel_size
    require(asked in (-1, 1), "tensor_model_parallel_size", asked, "generation runs in one process", "use -1")
    for key, value in (
        ("model.pipeline_model_parallel_size", m.pipeline_model_parallel_size),
        ("pipeline_model_parallel_size", config.pipeline_model_parallel_size),
    ):
        require(value <= 1, key, value, "the encoder reads a decoder state in the middle of the stack", "use 1")
    key = "model.tensor_model_parallel_size"
    counts = {"num_attention_heads": m.num_attention_heads, "num_query_groups": m.key_value_heads}
    widths = {"ffn_hidden_size": m.ffn_hidden_size}
    if m.retrieval:
        counts |= {"encoder_num_attention_heads": m.encoder_heads, "encoder key/value heads": m.encoder_key_value_heads}
        widths |= {"encoder_ffn_hidden_size": m.encoder_ffn_width}
    for name, count in (counts | widths).items():
        require(count % size == 0, key, size, f"must divide {name}={count}")
    require(
        not m.sequence_parallel or size > 1, "model.sequence_parallel", True, "needs tensor parallelism", f"{key}=2"
    )
    if m.sequence_parallel:
        require(m.encoder_seq_length % size == 0 and m.r % size == 0, key, size, "must divide sequences and neighbors")
        rule = "sequence parallelism takes the residual before the norm"
        require(m.encoder_ca_residual == "input", "model.encoder_ca_residual", m.encoder_ca_residual, rule)
    is_fsdp = config.trainer.strategy == "fsdp" or m.optim.name == "distributed_fused_adam"
    require(config.trainer.strategy != "ddp" or not is_fsdp, "trainer.strategy", "ddp", "distributed_fused_adam shards")
    is_other = config.trainer.precision in ("32", "64", "16-mixed")
    require(
        not m.megatron_amp_O2 or not is_other,
        "model.megatron_amp_O2",
        True,
        "keeps bf16 weights",
        "trainer.precision=bf16",
    )


def splits(text: str) -> tuple[float, float, float]:
    """'98,2,0' -> shares of train, validation and test that sum to 1."""
    try:
        shares = [float(part) for part in text.strip("'\"").split(",")]
    except ValueError:
        shares = []
    good = len(shares) == 3 and min(shares) >= 0 and shares[0] > 0 and math.isfinite(sum(shares))
    require(good, "model.data.splits_string", text, "three shares: train, validation, test", "like '98,2,0'")
    return shares[0] / sum(shares), shares[1] / sum(shares), shares[2] / sum(shares)
