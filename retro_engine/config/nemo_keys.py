"""Keys of NeMo's settings files that are no settings here: renamed, without a meaning, or of one value; names of others.

docs/coming-from.md is the page of these tables. Reads and gives leaves (key, value); what is refused is refused at once.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from retro_engine.config.fields import ModelConfig
from retro_engine.config.values import require
from retro_engine.errors import UsageError

Leaf = tuple[str, Any]
Refusal = tuple[str, str, str]  # what, why, what to do
_REFERENCE = re.compile(r"\$\{(\.*)([\w.]+)\}")
FEW = 3  # keys that have a note each
_SAME = "its value is what is done anyway"

_HOW = "how a step is computed is chosen here; what it computes is the same"
_SAVED = "exp_manager.keep_best, keep_last_n and checkpoint_every_n_steps say which checkpoints are kept"
_RUN = "a run is its folder, exp_manager.exp_dir"
_TOKENIZER = "the store has its tokenizer (retro prepare --tokenizer FILE)"
_TABLE = "a row of the store is a chunk: neighbors do not depend on split, seed or length"
_LIGHTNING = "the training loop is this project's"
MEANINGLESS = {  # a key, or with a point at its end a section, that names something this project does not have
    "name": _RUN,
    "cluster_type": "jobs are started with torchrun",
    "model.mcore_gpt": "there is one model",
    "model.version": "there is one model",
    "model.data.data_impl": "the store has one format",
    "model.data.index_mapping_dir": "the store has its own index",
    "model.data.skip_warmup": "the store is mapped, not read ahead",
    "model.use_flash_attention": "the fastest attention that is installed is used",
    "model.transformer_engine": "it is not used",
    "model.tokenizer.": _TOKENIZER,
    "model.make_vocab_size_divisible_by": "the vocabulary is the tokenizer's, without rows of padding",
    "model.gradient_as_bucket_view": _HOW,
    "model.gradient_accumulation_fusion": _HOW,
    "model.bias_activation_fusion": _HOW,
    "model.bias_dropout_add_fusion": _HOW,
    "model.masked_softmax_fusion": _HOW,
    "model.get_attention_mask_from_fusion": _HOW,
    "model.apply_query_key_layer_scaling": _HOW,
    "model.persist_layer_norm": _HOW,
    "model.grad_div_ar_fusion": _HOW,
    "model.grad_allreduce_chunk_size_mb": _HOW,
    "model.overlap_p2p_comm": _HOW,
    "model.batch_p2p_comm": _HOW,
    "model.sync_batch_comm": _HOW,
    "model.use_cpu_initialization": _HOW,
    "model.onnx_safe": _HOW,
    "model.apex_transformer_log_level": _LIGHTNING,
    "model.native_amp_init_scale": "the scale of fp16 gradients is torch's",
    "model.native_amp_growth_interval": "the scale of fp16 gradients is torch's",
    "model.hysteresis": "the scale of fp16 gradients is torch's",
    "model.activations_checkpoint_method": "model.activations_checkpoint_granularity is of every layer",
    "model.activations_checkpoint_num_layers": "model.activations_checkpoint_granularity is of every layer",
    "model.nsys_profile.": "it is not used",
    "model.retro.retro_block_size": _TABLE,
    "model.retro.retro_verify_neighbor_count": _TABLE,
    "model.retro.retro_split_preprocessing": _TABLE,
    "model.retro.retro_neighbor_dirs": _TABLE,
    "trainer.benchmark": _LIGHTNING,
    "trainer.logger": "exp_manager.create_tensorboard_logger and create_wandb_logger say what is logged",
    "trainer.enable_checkpointing": "checkpoints are always written",
    "trainer.enable_model_summary": _LIGHTNING,
    "trainer.enable_progress_bar": _LIGHTNING,
    "trainer.num_sanity_val_steps": _LIGHTNING,
    "trainer.use_distributed_sampler": "data is shared out among processes by the store's stream",
    "trainer.replace_sampler_ddp": "data is shared out among processes by the store's stream",
    "trainer.limit_test_batches": "training tests nothing; retro eval does",
    "exp_manager.name": _RUN,
    "exp_manager.version": _RUN,
    "exp_manager.use_datetime_version": _RUN,
    "exp_manager.log_step_timing": "seconds a step are always logged",
    "exp_manager.create_checkpoint_callback": "checkpoints are always written",
    "exp_manager.checkpoint_callback_params.": _SAVED,
}

RENAMED = {  # the same setting under another name
    "exp_manager.explicit_log_dir": "exp_manager.exp_dir",
    "exp_manager.checkpoint_callback_params.every_n_train_steps": "exp_manager.checkpoint_every_n_steps",
    "model.seed": "seed",
    "model.num_layers": "model.dec_num_layers",
    "model.position_embedding_type": "model.position_embedding",
    "model.share_embeddings_and_output_weights": "model.share_embeddings",
    "model.data.seq_length": "model.encoder_seq_length",
    "model.data.reset_attention_mask": "model.reset_attention",
    "model.retro.retro_chunk_length": "model.chunk_size",
    "model.retro.retro_num_neighbors": "model.num_neighbors",
    "model.retro.retro_num_retrieved_chunks": "model.retrieved_length",  # in chunks there, in tokens here
    "model.retro.retro_encoder_num_layers": "model.enc_num_layers",
    "model.retro.retro_encoder_hidden_dropout": "model.hidden_dropout",
    "model.retro.retro_encoder_attention_dropout": "model.attention_dropout",
}
_CHUNK_LENGTH = "model.retro.retro_chunk_length"
_CHUNKS = "model.retro.retro_num_retrieved_chunks"
_VALUES = {("model.position_embedding_type", "learned_absolute"): "learned"}

_PADDING = "sequences are whole chunks of the store"
_WEIGHTS = "weights are imported first"
_IMPORT = "retro import MODEL.nemo --out models/nemo, then --init-from models/nemo"
ONLY: dict[str, tuple[tuple[Any, ...], str, str]] = {  # values that are as here; of any other: why not, what to do
    "restore_from_path": ((None,), _WEIGHTS, _IMPORT),
    "model.restore_from_path": ((None,), _WEIGHTS, _IMPORT),
    "model.resume_from_checkpoint": ((None,), "a run goes on by itself", "--resume RUN"),
    "trainer.max_epochs": ((None, -1), "trainer.max_steps ends a run", "trainer.max_epochs=-1"),
    "exp_manager.resume_ignore_no_checkpoint": ((None, True), "a run without a checkpoint begins at step 0", "true"),
    "exp_manager.wandb_logger_kwargs": ((None,), "it is a section", "exp_manager.wandb_logger_kwargs.name=NAME"),
    "model.kv_channels": ((None,), "a head has hidden_size / num_attention_heads features", "leave it out"),
    "model.use_scaled_init_method": ((True,), "what layers add is scaled at the start", "true, or leave it out"),
    "model.do_layer_norm_weight_decay": ((False,), "weight decay is of matrices", "false"),
    "model.headscale": ((False,), "heads have no scale of their own", "false"),
    "model.transformer_block_type": (("pre_ln",), "norms stand before a layer's parts", "pre_ln"),
    "model.openai_gelu": ((False,), "it is an activation here", "model.activation=gelu_tanh"),
    "model.normalize_attention_scores": ((True,), "attention weights sum to 1", "true"),
    "model.attention_type": (("multihead",), "there is one", "multihead"),
    "model.pre_process": ((True,), "there are no pipeline stages", "true"),
    "model.post_process": ((True,), "there are no pipeline stages", "true"),
    "model.fp32_residual_connection": ((False,), "the residual has the layers' type", "trainer.precision=32"),
    "model.fp16_lm_cross_entropy": ((False,), "the loss is computed in fp32", "false"),
    "model.fp8": ((None, False), "there is no training in fp8", "trainer.precision=bf16-mixed"),
    "model.virtual_pipeline_model_parallel_size": ((None,), "there are no pipeline stages", "null"),
    "model.data.reset_position_ids": ((False,), "positions run on over documents", "model.data.reset_attention_mask"),
    "model.data.eod_mask_loss": ((False,), "ends of documents are learned", "false"),
    "model.data.no_seqlen_plus_one_input_tokens": ((None, False), _PADDING, "false"),
    "model.data.pad_samples_to_global_batch_size": ((None, False), _PADDING, "false"),
    "model.data.validation_drop_last": ((None, True), "validation takes whole batches", "trainer.limit_val_batches"),
    "model.data.data_prefix.train": (
        (),
        "it is a list",
        "model.data.data_prefix=[STORE] with model.data.splits_string",
    ),
    "model.data.data_prefix.validation": ((), "it is a list", "model.data.valid_store=STORE"),
    "model.data.data_prefix.test": ((), "it is a list", "retro eval RUN model.data.store=STORE"),
    "model.data.knn_index": ((None,), "neighbors are a table of the store", "model.data.neighbors=NAME"),
    "model.data.retrieval_prefix": ((None,), "neighbors are a table of the store", "model.data.neighbors=NAME"),
}

OTHERS = {  # names of megatron-core's and retro-pytorch's settings, for the hint of a key that has one
    "retro_retrieved_length": "model.retrieved_length",
    "retro_num_retrieved_chunks": "model.retrieved_length",
    "retro_project_dir": "model.data.store",
    "train_iters": "trainer.max_steps",
    "eval_interval": "trainer.val_check_interval",
    "eval_iters": "trainer.limit_val_batches",
    "save_interval": "exp_manager.checkpoint_every_n_steps",
    "log_interval": "trainer.log_every_n_steps",
    "lr_warmup_iters": "model.optim.sched.warmup_steps",
    "use_distributed_optimizer": "model.optim.name",
    "bf16": "trainer.precision",
    "fp16": "trainer.precision",
    "dim_head": "model.num_attention_heads",
    "clip_grad": "model.optim.clip",
    "adam_eps": "model.optim.eps",
    "muon_momentum": "model.optim.momentum",
    "recompute_granularity": "model.activations_checkpoint_granularity",
    "split": "model.data.splits_string",
    "data_path": "model.data.blend",
    "max_seq_len": "model.encoder_seq_length",
    "knn": "model.num_neighbors",
    "enc_dim": "model.encoder_hidden_size",
    "enc_depth": "model.enc_num_layers",
    "enc_cross_attn_layers": "model.enc_cross_attention",
    "dec_dim": "model.hidden_size",
    "dec_depth": "model.dec_num_layers",
    "dec_cross_attn_layers": "model.dec_cross_attention",
    "heads": "model.num_attention_heads",
    "dec_attn_dropout": "model.attention_dropout",
    "dec_ff_dropout": "model.ffn_dropout",
}


# their name of a setting, without its section -> ours
ELSEWHERE = {name.rsplit(".", 1)[-1]: ours for name, ours in RENAMED.items()} | OTHERS


def translate(
    sources: Sequence[Sequence[Leaf]], preset: dict[str, Any], say: Callable[[str], None]
) -> tuple[list[Leaf], list[Refusal]]:
    """Leaves of this project's names, and the refusals of those that have none; later sources win. `say` hears of all that
    change nothing at once, and of each that has another name.
    """
    leaves = [leaf for source in sources for leaf in source]
    said = dict(leaves)
    kept: list[Leaf] = []
    nothing: dict[str, str] = {}
    refused: dict[str, Refusal] = {}
    for source in sources:
        renamed = dict(_renamed(source, said, [*preset.items(), *leaves], say))
        for key, value in source:
            if key in RENAMED or _is_count(key, value):
                continue
            if key in ONLY:
                if _is_ours(key, value):
                    nothing[key] = _SAME
                else:
                    refused[key] = _refusal(key, value)
            elif (reason := _meaningless(key)) is not None:
                nothing[key] = reason
            elif key not in renamed:
                kept.append((key, _pointed(key, value, said)))
        kept += renamed.items()
    _say_nothing(nothing, say)
    return kept, list(refused.values())


def _is_count(key: str, value: Any) -> bool:
    """NeMo's model.data.neighbors says how many there are, where a table has a name."""
    return key == "model.data.neighbors" and type(value) is int


def _renamed(
    source: Sequence[Leaf], said: dict[str, Any], leaves: Sequence[Leaf], say: Callable[[str], None]
) -> Iterator[Leaf]:
    """What `source` says under another name. Raises UsageError where it says it under both, and differently."""
    own = {key: value for key, value in source if value is not None}
    for key, value in list(own.items()):
        target = "model.num_neighbors" if _is_count(key, value) else RENAMED.get(key)
        if target is None or value == "None":  # Python's word for null, in YAML
            continue
        meant = _followed(key, value, said, target)
        if meant in (None, f"${{{target}}}"):  # nothing is said, or that it is the same
            continue
        if key == _CHUNKS:
            meant = _in_tokens(key, meant, said, leaves)
        elif isinstance(meant, str):
            meant = _VALUES.get((key, meant), meant)
        other = _followed(target, own.get(target, meant), said)
        require(other in (meant, None), key, value, f"{target}={other} says otherwise", "name one")
        own[target] = meant  # so do two names of others
        say(f"{key}={value} is {target}={meant} here")
        yield target, meant


def _in_tokens(key: str, chunks: Any, said: dict[str, Any], leaves: Sequence[Leaf]) -> Any:
    """Other than in the model, a neighbor's length is counted in chunks; those of model.init_from are not known yet."""
    sizes = [leaf for leaf in leaves if leaf[0] in (_CHUNK_LENGTH, "model.chunk_size") and leaf[1] is not None]
    size = _followed(*sizes[-1], said) if sizes else ModelConfig().chunk_size
    is_known = type(size) is int and (bool(sizes) or said.get("model.init_from") is None)
    require(is_known, key, chunks, "how long a chunk is, is not said", "model.chunk_size=64")
    return chunks * size if type(chunks) is int else chunks


def _is_ours(key: str, value: Any) -> bool:
    value = None if value == "None" else value
    return any(value == one and type(value) is type(one) for one in ONLY[key][0])


def _refusal(key: str, value: Any) -> Refusal:
    _, why, do = ONLY[key]
    is_value = do in ("true", "false", "null", "pre_ln", "multihead")
    return f"{key}={value} cannot be used", why, f"{key}={do}" if is_value else do


def _meaningless(key: str) -> str | None:
    sections = [part for part in MEANINGLESS if part.endswith(".") and f"{key}.".startswith(part)]
    return MEANINGLESS.get(key, MEANINGLESS[sections[0]] if sections else None)


def _say_nothing(nothing: dict[str, str], say: Callable[[str], None]) -> None:
    """A note for each of a few keys that change nothing; one for many, those of one reason together."""
    reasons: dict[str, list[str]] = {}
    for key, why in nothing.items():
        reasons.setdefault(why, []).append(key)
        if len(nothing) <= FEW:
            say(f"{key} means nothing here: {why}")
    if len(nothing) > FEW:
        lines = [f"{', '.join(keys)}: {why}" for why, keys in reasons.items()]
        say("\n  ".join([f"{len(nothing)} settings change nothing here:", *lines]))


def _pointed(key: str, value: Any, said: dict[str, Any]) -> Any:
    """The value of a setting; a reference to what has another name here, or is none, as one that holds here."""
    if not (isinstance(value, str) and (found := _REFERENCE.fullmatch(value))):
        return value
    up, name = found.groups()
    name = ".".join([*(key.split(".")[: -len(up)] if up else []), name])
    if name in RENAMED:
        return f"${{{RENAMED[name]}}}" if RENAMED[name] != key else _followed(key, value, said)
    return _followed(key, value, said) if name in ONLY or _meaningless(name) is not None else f"${{{name}}}"


def _followed(key: str, value: Any, said: dict[str, Any], until: str = "") -> Any:
    """What a value stands for that is a reference (`${model.x}`, `${.x}`) to what is said; a reference where it is to
    another key, or to `until`.
    """
    for _ in range(len(said) + 1):
        if not (isinstance(value, str) and (found := _REFERENCE.fullmatch(value))):
            return value
        up, name = found.groups()
        key = ".".join([*(key.split(".")[: -len(up)] if up else []), name])
        if key not in said or key == until:
            return f"${{{key}}}"
        value = said[key]
    raise UsageError(f"{key}={value} does not fit", "references go round in a circle", "write the value out")
