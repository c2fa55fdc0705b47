"""What must go together in a run's settings, each rule with the value and the fix. What one setting may be is on its field."""

import math
from dataclasses import fields

from retro_engine.config.fields import Config, LoraConfig, ModelConfig, OptimConfig, TrainedModelConfig, base_config
from retro_engine.config.values import MANY, check_fields, require


def check_model(c: ModelConfig) -> None:
    """Raise UsageError for the first field of a ModelConfig that breaks a rule."""
    check_fields(c, "model.")
    _check_model_rules(c)


def _check_model_rules(c: ModelConfig) -> None:
    _check_widths(c)
    _check_cross_layers(c)
    _check_positions(c)
    if c.reads_prefix:
        _check_prefix(c)
    if c.init == "retrieval_ready" and c.retrieval:
        _check_retrieval_ready(c)
    if c.mup:
        require(c.init == "standard", "model.mup", True, "retrieval_ready sets its own scales", "model.init=standard")
        rule = "width scaling is relative to base widths"
        require(c.mup_base_hidden_size is not None, "model.mup", True, rule, "model.mup_base_hidden_size=64")
        check_model(base_config(c))


def _check_widths(c: ModelConfig) -> None:
    heads, width = c.num_attention_heads, c.hidden_size
    require(width % heads == 0, "model.hidden_size", width, f"must be a multiple of num_attention_heads={heads}")
    key, rule = "model.encoder_hidden_size", f"must be a multiple of the encoder's heads ({c.encoder_heads})"
    require(c.encoder_width % c.encoder_heads == 0, key, c.encoder_width, rule)
    groups = c.key_value_heads
    require(heads % groups == 0, "model.num_query_groups", groups, f"must divide num_attention_heads={heads}")


def _check_cross_layers(c: ModelConfig) -> None:
    if not c.retrieval or c.reads_prefix:
        return
    for name, layers in (("dec_cross_attention", c.dec_num_layers), ("enc_cross_attention", c.enc_num_layers)):
        key, crossing = f"model.{name}", getattr(c, name)
        rule = f"layers are 0-based and there are {layers}"
        require(all(0 <= layer < layers for layer in crossing), key, crossing, rule, f"set {key}")
    rule, fix = "a RETRO cross-attends in at least one decoder layer", "model.retrieval=false is the plain decoder"
    require(bool(c.dec_cross_attention), "model.dec_cross_attention", "[]", rule, fix)


def _check_positions(c: ModelConfig) -> None:
    rows = c.max_position_embeddings or c.encoder_seq_length
    require(
        not c.retrieval or c.reads_prefix or c.encoder_position_embedding != "learned" or rows >= c.r,
        "model.encoder_position_embedding",
        "learned",
        f"neighbors have {c.r} tokens and there are {rows} learned positions",
        f"model.max_position_embeddings={c.r}",
    )
    require(
        c.position_embedding != "rope" or c.encoder_seq_length <= (c.max_position_embeddings or MANY),
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


def _check_prefix(c: ModelConfig) -> None:
    conditions = {
        "whole chunks from the first token on (partial_chunk=last)": c.partial_chunk == "last",
        "missing neighbors are not read (mask_neighbors=true)": c.mask_neighbors,
        "texts do not read one another (reset_attention=true, cca_reset=true)": c.reset_attention and c.cca_reset,
        "there is nothing to read neighbors with from the first step on (init=standard)": c.init == "standard",
        f"sink_id is below vocab_size={c.vocab_size}": c.sink_id is None
        or not c.vocab_size
        or c.sink_id < c.vocab_size,
    }
    for rule, holds in conditions.items():
        require(holds, "model.reading", "prefix", rule, "change that, or set model.reading=cross_attention")


def _check_retrieval_ready(c: ModelConfig) -> None:
    pairs = int(c.head_width * c.rotary_percentage) // 2
    encoder_pairs = int(c.encoder_width // c.encoder_heads * c.rotary_percentage) // 2
    ropes = [f"{name}position_embedding" for name in ("", "encoder_", "cca_")]
    no_rope = [name for name in ropes if getattr(c, name) != "rope"]
    conditions = {  # rule: the setting that breaks it
        "share_embeddings must be true": "" if c.share_embeddings else "share_embeddings",
        "the encoder must be as wide as the decoder": "" if c.encoder_width == c.hidden_size else "encoder_hidden_size",
        "the encoder must have at least one layer": "" if c.enc_num_layers >= 1 else "enc_num_layers",
        "the encoder must have two heads for its two offsets": "" if c.encoder_heads >= 2 else "encoder_heads",
        "no grouped queries": "" if c.key_value_heads == c.num_attention_heads else "num_query_groups",
        "at least 12 rotary dimensions a head (num_attention_heads, rotary_percentage)": ""
        if min(pairs, encoder_pairs) >= 6
        else "rotary_percentage"
        if c.rotary_percentage < 1
        else "num_attention_heads",
        "RoPE in decoder, encoder and CCA": "".join(no_rope[:1]),
        "q and k need biases": "" if c.has_qk_bias else "qk_bias",
        "half-split RoPE": "rotary_interleaved" if c.rotary_interleaved else "",
    }
    for rule, name in conditions.items():
        if name:
            key = "model.encoder_num_attention_heads" if name == "encoder_heads" else f"model.{name}"
            rule = f"model.init=retrieval_ready: {rule}"
            require(False, key, getattr(c, name), rule, "change that, or set model.init=standard")


def check(config: Config) -> None:
    """Raise UsageError for the first setting of a run that breaks a rule."""
    check_fields(config)
    _check_model_rules(config.model)
    _check_lengths(config.model)
    _check_batch(config)
    _check_schedule(config)
    _check_freezing(config.model)
    _check_questions(config)
    _check_lora(config)
    _check_parallel(config)


def _check_lengths(m: TrainedModelConfig) -> None:
    length, rows = m.encoder_seq_length, m.max_position_embeddings
    rule = f"training sequences are whole chunks of model.chunk_size={m.chunk_size} tokens"
    fix = f"use {max(1, length // m.chunk_size) * m.chunk_size}"
    require(length % m.chunk_size == 0, "model.encoder_seq_length", length, rule, fix)
    key, rule = "model.max_position_embeddings", f"sequences have model.encoder_seq_length={length} tokens"
    has_room = m.position_embedding != "learned" or not rows or rows >= length
    require(has_room, key, rows, rule, f"{key}={length}")
    most, front = m.most_tokens or MANY, m.first_position
    require(
        not m.reads_prefix or front + length <= most,
        "model.encoder_seq_length",
        length,
        f"the model has {most} positions, {front} of them for the neighbors in front (model.reading=prefix)",
        f"use {max(1, (most - front) // m.chunk_size) * m.chunk_size}, or fewer or shorter neighbors",
    )


def _check_batch(config: Config) -> None:
    total, micro = config.model.global_batch_size, config.model.micro_batch_size
    if total is None:
        return
    rule = f"must be a multiple of model.micro_batch_size={micro}"
    require(total % micro == 0, "model.global_batch_size", total, rule)
    key, steps = "trainer.accumulate_grad_batches", config.trainer.accumulate_grad_batches
    require(steps == 1, key, steps, "follows from model.global_batch_size when that is set")


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
        rule = "without cross-attention there is nothing else that could learn"
        require(
            bool(m.cross_layers), "model.freeze_decoder", True, rule, "model.lora.rank=8 adds adapters to the decoder"
        )
        share = m.data.neighbor_dropout
        rule = "a frozen decoder learns nothing from a batch without neighbors"
        require(
            share == 0 or m.lora.rank > 0, "model.data.neighbor_dropout", share, rule, "model.data.neighbor_dropout=0"
        )


def _check_questions(config: Config) -> None:
    m, data = config.model, config.model.data
    for name in ("question_distractors", "question_absent"):
        key, value = f"model.data.{name}", getattr(data, name)
        require(not value or data.questions is not None, key, value, "it is of questions", "set model.data.questions")
        require(not value or m.reads_prefix, key, value, "passages are shared in front", "model.reading=prefix")
    total = data.question_distractors + data.question_absent
    require(total <= 1, "model.data.question_distractors", data.question_distractors, "with question_absent at most 1")
    is_compiled = config.trainer.compile and m.reads_prefix and data.questions is not None
    require(not is_compiled, "trainer.compile", True, "shared passages have no fixed shape", "trainer.compile=false")


def _check_lora(config: Config) -> None:
    m, lora = config.model, config.model.lora
    if not lora.rank:
        for item in fields(LoraConfig):
            key, value = f"model.lora.{item.name}", getattr(lora, item.name)
            rule = "without model.lora.rank it means nothing"
            require(value == getattr(LoraConfig(), item.name), key, value, rule, "set model.lora.rank")
        return
    key, frozen = "model.lora.rank", "adapters stand beside weights that are given and stay"
    require(m.init_from is not None, key, lora.rank, frozen, "model.init_from=RUN (--init-from RUN)")
    require(lora.rank <= m.hidden_size, key, lora.rank, f"must be at most model.hidden_size={m.hidden_size}")
    require(m.unfreeze_step is None, "model.unfreeze_step", m.unfreeze_step, frozen, "leave it out, or model.lora.rank")
    has_gate = m.activation == "swiglu" or "gate" not in (lora.targets or [])
    require(has_gate, "model.lora.targets", lora.targets, f"model.activation={m.activation} has no gate")
    require(not m.mup, key, lora.rank, "rates of adapters do not transfer over widths (model.mup)", "model.mup=false")
    size = m.tensor_model_parallel_size
    require(size == 1, key, lora.rank, "adapters are not cut", "model.tensor_model_parallel_size=1")
    fix = "trainer.strategy=ddp model.optim.name=adamw"
    require(not _shards(config), key, lora.rank, "weights that stay are whole in every process", fix)


def _shards(config: Config) -> bool:
    """Whether data-parallel processes share out weights and the optimizer's state."""
    return config.trainer.strategy == "fsdp" or config.model.optim.name == "distributed_fused_adam"


def _check_parallel(config: Config) -> None:
    m, size = config.model, config.model.tensor_model_parallel_size
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
    if m.optim.name == "muon":
        rule, fix = "its update is of whole matrices", "model.optim.name=adamw"
        require(size == 1, "model.optim.name", "muon", f"{rule}, and {key}={size} cuts them", fix)
        require(not _shards(config), "model.optim.name", "muon", f"{rule}, and trainer.strategy=fsdp cuts them", fix)
        require(not m.mup, "model.optim.name", "muon", "model.mup's rates are AdamW's", fix)
    default = OptimConfig()
    is_read = m.optim.name == "muon" or m.optim.momentum == default.momentum
    require(is_read, "model.optim.momentum", m.optim.momentum, "AdamW has betas", "model.optim.name=muon")
    is_whole = config.trainer.strategy != "ddp" or not _shards(config)
    require(is_whole, "trainer.strategy", "ddp", "distributed_fused_adam shards")
    is_other = config.trainer.precision in ("32", "64", "16-mixed")
    require(
        not m.megatron_amp_O2 or not is_other,
        "model.megatron_amp_O2",
        True,
        "keeps bf16 weights",
        "trainer.precision=bf16",
    )
