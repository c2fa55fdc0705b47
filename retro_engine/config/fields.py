"""Every setting as a typed dataclass, each with its unit or its section of the paper. Names are NeMo RETRO's where NeMo has one."""

from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any


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


def flat_keys(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value for every leaf of a (nested) dataclass or dict."""
    leaves: dict[str, Any] = {}
    items = {f.name: getattr(node, f.name) for f in fields(node)} if is_dataclass(node) else node
    for name, value in items.items():
        is_branch = is_dataclass(value) or isinstance(value, dict)
        leaves |= flat_keys(value, f"{prefix}{name}.") if is_branch else {f"{prefix}{name}": value}
    return leaves
