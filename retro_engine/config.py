"""Every setting as a typed dataclass, the presets, and how a run's settings are put together.

Order, later wins: defaults < preset < file < environment (`RETRO_CONFIG__MODEL__MICRO_BATCH_SIZE=8`) <
overrides (`key=value`, `+key=value`, `++key=value`, `~key`). Names are NeMo RETRO's where NeMo has one.
Reads YAML files; writes nothing.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from retro_engine.errors import UsageError, nearest
from retro_engine.nemo_names import map_names, refuse_unspeakable
from retro_engine.progress import note
from retro_engine.yaml_file import read_yaml

ENVIRONMENT_PREFIX = "RETRO_CONFIG__"


@dataclass
class ModelConfig:
    """What the network computes (docs/model.md). Lengths in tokens, widths in features, layers 0-based."""

    vocab_size: int = 0  # V; 0 = the tokenizer's
    encoder_seq_length: int = 2048  # n: tokens of a training sequence (NeMo's name for it)
    chunk_size: int = 64  # m
    retrieved_length: int | None = None  # r: tokens per neighbor; None = 2m
    num_neighbors: int = 2  # k: neighbors per chunk
    hidden_size: int = 768  # d
    ffn_hidden_size: int = 3072
    num_attention_heads: int = 12  # h
    num_query_groups: int | None = None  # key/value heads; None = num_attention_heads
    dec_num_layers: int = 6
    enc_num_layers: int = 4
    dec_cross_attention: list[int] = field(default_factory=lambda: [3, 4, 5])
    enc_cross_attention: list[int] = field(default_factory=lambda: [3])
    encoder_hidden_size: int | None = None  # None = hidden_size
    encoder_num_attention_heads: int | None = None  # None = num_attention_heads
    encoder_ffn_hidden_size: int | None = None  # None = ffn_hidden_size, scaled with the encoder's width
    retrieval: bool = True  # False = a plain decoder: no encoder, no chunked cross-attention
    normalization: str = "rmsnorm"  # rmsnorm | layernorm
    layernorm_epsilon: float = 1e-5
    activation: str = "swiglu"  # swiglu | gelu (erf) | gelu_tanh (GPT-2's approximation)
    bias: bool = False  # biases on every linear layer
    qk_bias: bool | None = None  # biases on q and k; None = bias, or true with init=retrieval_ready
    v_bias: bool | None = None  # biases on v; None = bias
    share_embeddings: bool = True  # output head = embedding
    output_bias: bool = False  # a learned bias per vocabulary entry
    embedding_scale: float | None = None  # None = 1, or sqrt(d) with init=retrieval_ready
    position_embedding: str = "rope"  # rope | learned | none: decoder self-attention
    encoder_position_embedding: str = "rope"  # the same, in the encoder
    cca_position_embedding: str = "rope"  # rope | none: chunked cross-attention
    cca_query_offset: bool = True  # query i at position i + m - 1 (the paper); False = at i
    max_position_embeddings: int = (
        0  # rows of learned positions (0 = encoder_seq_length), or a bound of others (0 = none)
    )
    rotary_percentage: float = 1.0  # share of the head width that is rotated
    rotary_base: float = 10000.0
    # of the decoder's self-attention: each frequency is divided by its own (scaled positions); None = all by 1
    rotary_factors: list[float] | None = None
    rotary_interleaved: bool = False
    rotary_table_precision: str = "float32"  # float32 | model: type of the angles, sines and cosines
    partial_chunk: str = "last"  # last = left-aligned, floor(n/m) chunks | first = ceil(n/m), the first is short
    mask_neighbors: bool = True  # padding and missing neighbors are never attended
    reset_attention: bool = True  # attention does not cross documents
    cca_reset: bool = True  # nor do a chunk's neighbors reach tokens of another document than its last token's
    cca_bias_everywhere: bool = False  # the CCA output bias reaches tokens that attend nothing, too
    encoder_ca_residual: str = "input"  # input: y + CA(norm y) | norm: norm y + CA(norm y)
    encoder_final_norm: bool = True
    decoder_final_norm: bool = True
    eod_id: int | None = None  # with pad_id: document_ids are derived from the tokens when none are given
    pad_id: int | None = None
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    ffn_dropout: float = 0.0
    init: str = "standard"  # standard | retrieval_ready (docs/retrieval-ready.md)
    init_method_std: float = 0.02
    mup: bool = False  # width scaling of arXiv 2203.03466 (docs/mup.md), relative to the base widths:
    mup_base_hidden_size: int | None = None  # set where mup is
    mup_base_ffn_hidden_size: int | None = None  # None = ffn_hidden_size, scaled with the width
    mup_base_encoder_hidden_size: int | None = None  # None = encoder_hidden_size, scaled with the width
    mup_base_num_attention_heads: int | None = None  # None = num_attention_heads

    @property
    def r(self) -> int:
        """Tokens per neighbor."""
        return self.retrieved_length if self.retrieved_length is not None else 2 * self.chunk_size

    @property
    def most_tokens(self) -> int | None:
        """Of a sequence: learned positions, or what imported weights were bounded to (a sliding window); None = any."""
        if self.position_embedding == "learned":
            return self.max_position_embeddings or self.encoder_seq_length
        return self.max_position_embeddings or None

    @property
    def head_width(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def encoder_width(self) -> int:
        return self.encoder_hidden_size or self.hidden_size

    @property
    def encoder_heads(self) -> int:
        return self.encoder_num_attention_heads or self.num_attention_heads

    @property
    def encoder_key_value_heads(self) -> int:
        """GQA in the decoder carries over to an encoder with the same number of heads."""
        return self.key_value_heads if self.encoder_heads == self.num_attention_heads else self.encoder_heads

    @property
    def encoder_ffn_width(self) -> int:
        return self.encoder_ffn_hidden_size or self.ffn_hidden_size * self.encoder_width // self.hidden_size

    @property
    def has_qk_bias(self) -> bool:
        return self.qk_bias if self.qk_bias is not None else self.bias or self.init == "retrieval_ready"

    @property
    def has_v_bias(self) -> bool:
        return self.bias if self.v_bias is None else self.v_bias

    @property
    def input_scale(self) -> float:
        """The factor on the embedding at the input."""
        if self.embedding_scale is not None:
            return self.embedding_scale
        return self.hidden_size**0.5 if self.init == "retrieval_ready" else 1.0

    @property
    def cross_layers(self) -> list[int]:
        """Decoder layers that cross-attend to neighbors; empty without retrieval."""
        return sorted(self.dec_cross_attention) if self.retrieval else []


def base_config(c: ModelConfig) -> ModelConfig:
    """The model whose hyperparameters a muP run of `c` transfers: the same at the base widths."""
    base = c.mup_base_hidden_size or c.hidden_size
    heads = c.mup_base_num_attention_heads or c.num_attention_heads

    def scaled(width: int | None) -> int | None:
        return None if width is None else max(1, width * base // c.hidden_size)

    return replace(
        c,
        mup=False,
        hidden_size=base,
        ffn_hidden_size=c.mup_base_ffn_hidden_size or max(1, c.ffn_hidden_size * base // c.hidden_size),
        encoder_hidden_size=c.mup_base_encoder_hidden_size or scaled(c.encoder_hidden_size),
        encoder_ffn_hidden_size=scaled(c.encoder_ffn_hidden_size),
        num_attention_heads=heads,
        num_query_groups=c.num_query_groups and max(1, c.num_query_groups * heads // c.num_attention_heads),
    )


def base_head_width(c: ModelConfig, is_encoder: bool) -> int:
    """Features of an attention head at the base widths."""
    base = base_config(c)
    return base.encoder_width // base.encoder_heads if is_encoder else base.head_width


@dataclass
class SchedConfig:
    """Learning-rate schedule, in optimizer steps."""

    name: str = "CosineAnnealing"  # CosineAnnealing | WSD | constant
    warmup_steps: int = 100
    constant_steps: int = 0  # CosineAnnealing: at min_lr, at the end, as NeMo's; WSD: at lr, before the decay
    min_lr: float = 6e-5
    max_steps: int | None = None  # None = trainer.max_steps
    warmup_ratio: float | None = None  # NeMo's other way to say warmup_steps and constant_steps: shares of max_steps
    constant_ratio: float | None = None


@dataclass
class OptimConfig:
    name: str = "adamw"  # adamw | distributed_fused_adam: parameters and optimizer state are sharded over processes
    lr: float = 6e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.1
    clip: float | None = 1.0  # global gradient norm; None = off
    sched: SchedConfig = field(default_factory=SchedConfig)


@dataclass
class DataConfig:
    store: str | None = None  # folder of the chunk store to train on
    neighbors: str | None = None  # table: a name under STORE/neighbors/ or a folder; None = the only one
    valid_store: str | None = None  # None = the validation share of `store`
    valid_neighbors: str | None = None
    questions: str | None = None  # JSON lines of questions to tune on; `store` has their documents (docs/tuning.md)
    valid_questions: str | None = None  # None = the validation share of `questions`
    question_neighbors: str = "data"  # data = those that rows name | retrieval = from `store` | both
    question_template: str = "question: {question}\nanswer:"  # NeMo's
    question_retriever: str = "bm25"
    splits_string: str = "98,2,0"  # shares of the documents: train, validation, test
    dataloader_type: str = "cyclic"  # cyclic (sequences shuffled anew each epoch) | single (one pass, in order)
    shuffle_documents: bool | None = None  # before they are packed; None = with cyclic; the corpus' order is single's
    neighbor_dropout: float = 0.0  # share of the training batches that see no neighbors
    self_neighbor_steps: int = 0  # first steps in which a chunk's neighbor is the chunk itself with what follows it
    num_workers: int = 1  # steps whose batches are made ahead, in the background; 0 = none
    data_prefix: list[str] | None = None  # NeMo's name of `store`; ["none"] = see model.retro


@dataclass
class RetroConfig:
    """NeMo's `model.retro.` section."""

    retro_project_dir: str | None = None  # NeMo's name of model.data.store


@dataclass
class TrainedModelConfig(ModelConfig):
    """The `model.` section: the network and how it is trained."""

    micro_batch_size: int = 4  # sequences per forward
    global_batch_size: int | None = None  # sequences per optimizer step; None = micro_batch_size x accumulation
    tensor_model_parallel_size: int = 1  # processes that share every matrix
    sequence_parallel: bool = False  # with tensor parallelism: norms and residuals are cut along the sequence
    pipeline_model_parallel_size: int = 1  # more is refused
    megatron_amp_O2: bool = False  # bf16 weights, fp32 master weights in the optimizer
    add_position_embedding: bool = False  # NeMo's name of position_embedding=learned
    activations_checkpoint_granularity: str | None = None  # selective | full: recomputed in the backward pass
    shape_file: str | None = None  # muP base widths that `retro mup base` wrote
    init_from: str | None = None  # a checkpoint or run: its weights, and what they fix of the model (docs/tuning.md)
    # with init_from a plain decoder: begin with a copying circuit (docs/tuning.md); None = where it can be built
    fit_cross_attention: bool | None = None
    freeze_decoder: bool = False  # with init_from: only the encoder and chunked cross-attention learn
    unfreeze_step: int | None = None  # the step from which the decoder learns as well; None = never
    unfreeze_every: int | None = (
        None  # from then on one decoder layer more every so many steps, the last first; None = all
    )
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    retro: RetroConfig = field(default_factory=RetroConfig)


@dataclass
class TrainerConfig:
    num_nodes: int = 1
    devices: int | None = None  # processes a node; -1 = one a GPU; None = as many as torchrun started
    strategy: str = "auto"  # auto | ddp | fsdp; auto = fsdp with distributed_fused_adam or tensor parallelism
    accelerator: str = "auto"  # auto | cpu | gpu
    precision: str = "auto"  # auto | 32 | bf16-mixed (bf16 is NeMo's name) | 16-mixed | 64; auto times 32 and bf16 here
    max_skipped_steps: int = 10  # stop after as many steps in a row without a usable loss
    loss_spike: float | None = None  # skip a step whose loss is this many times the running mean; None = off
    max_steps: int = 1000
    max_time_s: float | None = None  # stop, with a checkpoint, after this many seconds of training
    val_check_interval: int | float = 100  # steps; with a point a share of an epoch of the training data: 0.25, 1.0
    limit_val_batches: int | float | None = (
        32  # of a validation pass; 0 = no validation, with a point a share, None = all
    )
    gradient_clip_val: float | None = None  # NeMo's name of model.optim.clip; 0 = off
    accumulate_grad_batches: int = 1
    log_every_n_steps: int = 10
    compile: bool = False  # torch.compile(fullgraph=True) of the training forward


@dataclass
class WandbConfig:
    """Arguments of wandb.init."""

    name: str | None = None  # None = the run folder's
    project: str | None = None  # None = retro-engine
    entity: str | None = None
    group: str | None = None
    id: str | None = None
    mode: str | None = None  # online | offline | disabled
    resume: Any = None


@dataclass
class ExpManagerConfig:
    exp_dir: str | None = None  # the run's folder; --out sets it
    create_tensorboard_logger: bool | None = None  # None = where TensorBoard is installed
    create_wandb_logger: bool = False
    wandb_logger_kwargs: WandbConfig = field(default_factory=WandbConfig)
    resume_if_exists: bool = True
    checkpoint_every_n_steps: int = 500
    keep_last_n: int = 2  # checkpoints
    keep_best: bool = True  # and the one with the lowest validation loss


@dataclass
class RetroInferenceConfig:
    retro_gpt_retrieved_length: int | None = None  # tokens per neighbor; None = the model's r
    retro_num_neighbors: int | None = None  # None = the model's k
    ft_neighbours: int = 0  # best neighbors that the prompt itself holds, as fine-tuned models want: passed over ...
    reuse_top: bool = False  # ... unless these shall be read as well


@dataclass
class InferenceConfig:
    greedy: bool = True
    temperature: float = 1.0
    top_k: int = 0  # 0 = all
    top_p: float = 1.0
    tokens_to_generate: int = 64
    min_tokens_to_generate: int = 0  # the end of the document does not come before
    repetition_penalty: float = 1.0  # logits of tokens seen are divided (or, below 0, multiplied) by it
    add_BOS: bool = False  # begin with the tokenizer's beginning-of-document token
    end_strings: list[str] = field(default_factory=list)  # the text ends before the first of these
    compute_logprob: bool = False  # log-probabilities of the prompt's and the generated tokens
    all_probs: bool = False  # of every entry of the vocabulary at each of them
    pad_prompt: bool = True  # left-pad so that the prompt's last token ends a chunk
    retro_inference: RetroInferenceConfig = field(default_factory=RetroInferenceConfig)


@dataclass
class Config:
    seed: int = 1234
    model: TrainedModelConfig = field(default_factory=TrainedModelConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    exp_manager: ExpManagerConfig = field(default_factory=ExpManagerConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    # NeMo's names for what `retro generate` reads
    checkpoint_dir: str | None = None
    checkpoint_name: str | None = None
    retro_model_file: str | None = None
    prompt: str | None = None
    neighbors: list[str] | None = None
    tensor_model_parallel_size: int = -1  # -1 = from the checkpoint
    pipeline_model_parallel_size: int = -1
    megatron_amp_O2: bool = False


_SMALL_RUN: dict[str, Any] = {  # what the small presets share: retrieval-ready, no dropout
    "model.init": "retrieval_ready",
    "model.activation": "gelu",
    "model.hidden_dropout": 0.0,
    "model.attention_dropout": 0.0,
    "model.enc_num_layers": 1,
    "model.enc_cross_attention": [0],
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
    "base": {},
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


def flat_keys(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value for every leaf of a (nested) dataclass or dict."""
    leaves: dict[str, Any] = {}
    items = {f.name: getattr(node, f.name) for f in fields(node)} if is_dataclass(node) else node
    for name, value in items.items():
        is_branch = is_dataclass(value) or isinstance(value, dict)
        leaves |= flat_keys(value, f"{prefix}{name}.") if is_branch else {f"{prefix}{name}": value}
    return leaves


MEANINGLESS = {  # keys of NeMo's commands that name something this project does not have
    "cluster_type": "jobs are started with torchrun",
    "model.mcore_gpt": "there is one model",
    "model.data.data_impl": "the store has one format",
    "model.use_flash_attention": "the fastest attention that is installed is used",
    "model.transformer_engine": "it is not used",
    "exp_manager.create_checkpoint_callback": "checkpoints are always written",
}
# Accepted at their defaults alone.
NOT_BUILT = {
    "retro_model_file": None,
    "megatron_amp_O2": False,
}


def load_config(
    overrides: Sequence[str | tuple[str, Any]] | None = None,
    preset_name: str | None = None,
    file: str | None = None,
    say: Callable[[str], None] = note,
) -> Config:
    """Defaults, preset, file, environment and overrides, merged, typed and checked.

    An override is `key=value` as on the command line, or a pair (key, value). Raises UsageError naming the key,
    the nearest known one and the rule; MissingInputError for the file.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    tree = OmegaConf.structured(Config)
    known = flat_keys(Config())
    from_preset = preset(preset_name) if preset_name else {}
    from_file = flat_keys(read_yaml(Path(file))) if file is not None else {}
    typed = _environment(known) + [_parse_override(item) if isinstance(item, str) else item for item in overrides or []]
    leaves = _leaves([*from_preset.items(), *from_file.items(), *typed])
    for key in dict.fromkeys(key for key, _ in leaves if key in MEANINGLESS):
        say(f"{key} means nothing here: {MEANINGLESS[key]}")
    leaves = [(key, value) for key, value in leaves if key not in MEANINGLESS]
    for key, value in leaves:
        if key not in known and any(name.startswith(f"{key}.") for name in known):
            raise UsageError(f"{key}={value!r} does not fit", f"{key} is a section", f"retro config keys {key}")
        if key not in known:
            section = key.rsplit(".", 1)[0] if "." in key else ""
            raise UsageError(
                f"{key} is not a setting", nearest_key(key, known), f"all keys: retro config keys {section}".rstrip()
            )
        refuse_unspeakable(key, value)
        try:
            OmegaConf.update(tree, key, value)
        except OmegaConfBaseException as error:
            why = str(error).splitlines()[0]
            raise UsageError(f"{key}={value!r:.200} does not fit", why, f"expected {_kind_of(key)}") from error
    try:
        config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise UsageError("the settings do not resolve", str(error).splitlines()[0], "retro config show") from error
    assert isinstance(config, Config), type(config)
    # a file that a run, or `config show`, wrote says every default: nobody asked for those
    asked = {key for key, value in from_file.items() if value != known.get(key)}
    map_names(config, asked | {key for key, _ in _leaves(typed)}, say)
    _read_shape_file(config.model)
    if config.model.init_from is None:  # else what the model inherits is not known yet: train/retrofit.py checks
        check(config)
    return config


def named_keys(overrides: Sequence[str], with_environment: bool = True) -> set[str]:
    """The keys that overrides, and the environment, name."""
    asked = _environment(flat_keys(Config())) if with_environment else []
    return {key for key, _ in _leaves([*asked, *map(_parse_override, overrides)])}


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
        is_width = name in [key for key, *_ in MODEL_BOUNDS if key.startswith("mup_base_")]
        is_whole = value is None or (isinstance(value, int) and not isinstance(value, bool))
        rule = f"it holds {key}: {value}; expected base widths"
        _require(is_width and is_whole, "model.shape_file", m.shape_file, rule, "retro mup base writes one")
        setattr(m, name, value)
    m.shape_file = None


def _kind_of(key: str) -> str:
    """The type of a setting, as it is annotated."""
    kind: Any = Config
    for part in key.split("."):
        kind = next(item.type for item in fields(kind) if item.name == part)
    return kind.__name__ if isinstance(kind, type) else str(kind)


def nearest_key(key: str, known: dict[str, Any]) -> str:
    """`did you mean KEY (type, default X)?`, looking at whole keys first and at last names then."""
    import difflib

    close = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if not close:
        last = {name.rsplit(".", 1)[-1]: name for name in known}
        close = [last[name] for name in difflib.get_close_matches(key.rsplit(".", 1)[-1], last, n=1, cutoff=0.6)]
    if not close:
        return "no setting has a similar name"
    default = known[close[0]]
    return f"did you mean {close[0]} ({type(default).__name__}, default {default})?"


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


def _require(condition: bool, key: str, value: Any, rule: str, fix: str = "") -> None:
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
        _require(
            value in allowed, f"model.{name}", value, f"one of {', '.join(allowed)}", nearest(value, list(allowed))
        )
    for key, low, high in MODEL_BOUNDS:
        _check_bounds(f"model.{key}", getattr(c, key), low, high)
    heads, width = c.num_attention_heads, c.hidden_size
    _require(width % heads == 0, "model.hidden_size", width, f"must be a multiple of num_attention_heads={heads}")
    _require(
        c.encoder_width % c.encoder_heads == 0,
        "model.encoder_hidden_size",
        c.encoder_width,
        f"must be a multiple of the encoder's heads ({c.encoder_heads})",
    )
    _require(
        heads % c.key_value_heads == 0,
        "model.num_query_groups",
        c.key_value_heads,
        f"must divide num_attention_heads={heads}",
    )
    for name, layers in (("dec_cross_attention", c.dec_num_layers), ("enc_cross_attention", c.enc_num_layers)):
        for layer in getattr(c, name):
            _require(
                not c.retrieval or 0 <= layer < layers,
                f"model.{name}",
                getattr(c, name),
                f"layers are 0-based and there are {layers}",
                f"set model.{name}",
            )
    _require(
        not c.retrieval or bool(c.dec_cross_attention),
        "model.dec_cross_attention",
        "[]",
        "a RETRO cross-attends in at least one decoder layer",
        "model.retrieval=false is the plain decoder",
    )
    rows = c.max_position_embeddings or c.encoder_seq_length
    _require(
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
        _require(c.init == "standard", "model.mup", True, "retrieval_ready sets its own scales", "model.init=standard")
        base = c.mup_base_hidden_size
        _require(
            base is not None,
            "model.mup",
            True,
            "width scaling is relative to base widths",
            "model.mup_base_hidden_size=64",
        )
        check_model(base_config(c))


def _check_positions(c: ModelConfig) -> None:
    _require(
        c.position_embedding != "rope" or c.encoder_seq_length <= (c.max_position_embeddings or _MANY),
        "model.encoder_seq_length",
        c.encoder_seq_length,
        f"the model takes {c.max_position_embeddings} tokens at most (max_position_embeddings)",
    )
    pairs = int(c.head_width * c.rotary_percentage) // 2
    _require(
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
        _require(holds, "model.init", "retrieval_ready", rule, "change that, or set model.init=standard")


def check(config: Config) -> None:
    """Raise UsageError for the first setting of a run that breaks a rule."""
    check_model(config.model)
    m = config.model
    _require(
        m.encoder_seq_length % m.chunk_size == 0,
        "model.encoder_seq_length",
        m.encoder_seq_length,
        f"training sequences are whole chunks of model.chunk_size={m.chunk_size} tokens",
        f"use {max(1, m.encoder_seq_length // m.chunk_size) * m.chunk_size}",
    )
    rows = m.max_position_embeddings
    _require(
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
    _require(is_pair, "model.optim.betas", betas, "two numbers in [0, 1)")
    total = m.global_batch_size
    _require(
        total is None or (total >= 1 and total % m.micro_batch_size == 0),
        "model.global_batch_size",
        total,
        f"must be a multiple of model.micro_batch_size={m.micro_batch_size}",
    )
    _require(
        total is None or config.trainer.accumulate_grad_batches == 1,
        "trainer.accumulate_grad_batches",
        config.trainer.accumulate_grad_batches,
        "follows from model.global_batch_size when that is set",
    )
    for key, allowed in CHOICES.items():
        _require(
            values[key] in allowed,
            key,
            values[key],
            f"one of {', '.join(str(value) for value in allowed)}",
            nearest(str(values[key]), [str(value) for value in allowed]),
        )
    for key, default in NOT_BUILT.items():
        _require(values[key] == default, key, values[key], "this version has only the default", f"{key}={default}")
    _require(
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
    _require(
        devices is None or devices >= 1 or devices == -1, "trainer.devices", devices, "at least 1, or -1: all GPUs"
    )
    for name, low in (("val_check_interval", 1), ("limit_val_batches", 0)):
        key, value = f"trainer.{name}", getattr(trainer, name)
        if isinstance(value, float):
            is_share = low < value + 1 <= 2 if low else 0 <= value <= 1
            _require(is_share, key, value, "with a point it is a share, at most 1.0", f"{key}={max(1, int(value))}")
        else:
            _check_bounds(key, value, low, _MANY)


def _check_schedule(config: Config) -> None:
    optim, sched = config.model.optim, config.model.optim.sched
    key = "model.optim.sched.constant_steps"
    if sched.name == "constant":
        rule = "sched.name=constant keeps the rate anyway"
        _require(not sched.constant_steps, key, sched.constant_steps, rule, f"{key}=0")
        return
    _require(
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
    _require(not is_cosine or not sched.constant_steps or sched.constant_steps < room, key, sched.constant_steps, rule)


def _check_freezing(m: TrainedModelConfig) -> None:
    for key, value, needed, has in (
        ("model.fit_cross_attention", m.fit_cross_attention, "model.init_from", m.init_from is not None),
        ("model.freeze_decoder", m.freeze_decoder, "model.init_from", m.init_from is not None),
        ("model.unfreeze_step", m.unfreeze_step is not None, "model.freeze_decoder", m.freeze_decoder),
        ("model.unfreeze_every", m.unfreeze_every is not None, "model.unfreeze_step", m.unfreeze_step is not None),
    ):
        _require(not value or has, key, value, f"without {needed} it means nothing", f"set {needed}")
    if m.freeze_decoder:
        _require(m.retrieval, "model.freeze_decoder", True, "a plain decoder has nothing else that could learn")
        share = m.data.neighbor_dropout
        rule = "a frozen decoder learns nothing from a batch without neighbors"
        _require(share == 0, "model.data.neighbor_dropout", share, rule, "model.data.neighbor_dropout=0")


def _check_parallel(config: Config) -> None:
    m, size = config.model, config.model.tensor_model_parallel_size
    asked = config.tensor_model_parallel_size
    _require(asked in (-1, 1), "tensor_model_parallel_size", asked, "generation runs in one process", "use -1")
    for key, value in (
        ("model.pipeline_model_parallel_size", m.pipeline_model_parallel_size),
        ("pipeline_model_parallel_size", config.pipeline_model_parallel_size),
    ):
        _require(value <= 1, key, value, "the encoder reads a decoder state in the middle of the stack", "use 1")
    key = "model.tensor_model_parallel_size"
    counts = {"num_attention_heads": m.num_attention_heads, "num_query_groups": m.key_value_heads}
    widths = {"ffn_hidden_size": m.ffn_hidden_size}
    if m.retrieval:
        counts |= {"encoder_num_attention_heads": m.encoder_heads, "encoder key/value heads": m.encoder_key_value_heads}
        widths |= {"encoder_ffn_hidden_size": m.encoder_ffn_width}
    for name, count in (counts | widths).items():
        _require(count % size == 0, key, size, f"must divide {name}={count}")
    _require(
        not m.sequence_parallel or size > 1, "model.sequence_parallel", True, "needs tensor parallelism", f"{key}=2"
    )
    if m.sequence_parallel:
        _require(m.encoder_seq_length % size == 0 and m.r % size == 0, key, size, "must divide sequences and neighbors")
        rule = "sequence parallelism takes the residual before the norm"
        _require(m.encoder_ca_residual == "input", "model.encoder_ca_residual", m.encoder_ca_residual, rule)
    is_fsdp = config.trainer.strategy == "fsdp" or m.optim.name == "distributed_fused_adam"
    _require(
        config.trainer.strategy != "ddp" or not is_fsdp, "trainer.strategy", "ddp", "distributed_fused_adam shards"
    )
    is_other = config.trainer.precision in ("32", "64", "16-mixed")
    _require(
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
    _require(good, "model.data.splits_string", text, "three shares: train, validation, test", "like '98,2,0'")
    return shares[0] / sum(shares), shares[1] / sum(shares), shares[2] / sum(shares)


def architecture(config: ModelConfig) -> dict[str, Any]:
    """The fields of ModelConfig alone, JSON-ready: a checkpoint's config.json."""
    names = {item.name for item in fields(ModelConfig)}
    return {name: value for name, value in asdict(config).items() if name in names}


def to_yaml(config: Config) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))
