"""Every setting as a typed dataclass: type, default, what it may be, and its unit or its section of the paper.

Names are NeMo RETRO's where NeMo has one. A new setting is a line here; what must go together is in rules.py.
"""

import math
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from retro_engine.config.values import checked, choice, count_or_share, number, only, shares

ONE_STAGE = "the encoder reads a decoder state in the middle of the stack"  # why there is no pipeline


@dataclass(kw_only=True)
class ModelConfig:
    """What the network computes (docs/model.md). Lengths in tokens, widths in features, layers 0-based."""

    vocab_size: int = number(0, low=0)  # V; 0 = the tokenizer's [entries]
    encoder_seq_length: int = number(2048, low=1)  # n: of a training sequence (NeMo's name for it) [tokens]
    chunk_size: int = number(64, low=1, high=65535)  # m: of a chunk, which must be the store's [tokens]
    retrieved_length: int | None = number(None, low=1)  # r: read of a neighbor; None = 2m [tokens]
    num_neighbors: int = number(2, low=1)  # k: read a chunk [neighbors]
    hidden_size: int = number(768, low=1)  # d: the decoder's width [features]
    ffn_hidden_size: int = number(3072, low=1)  # the decoder's FFN width [features]
    num_attention_heads: int = number(12, low=1)  # h: of the decoder [heads]
    num_query_groups: int | None = number(None, low=1)  # key/value heads; None = num_attention_heads [heads]
    dec_num_layers: int = number(6, low=1)  # of the decoder [layers]
    enc_num_layers: int = number(4, low=0)  # of the neighbor encoder [layers]
    # decoder layers, from 0, that read neighbors by chunked cross-attention
    dec_cross_attention: list[int] = field(default_factory=lambda: [3, 4, 5])
    # encoder layers, from 0, that read the chunk a neighbor is for; [] = a neighbor can be encoded once and kept
    enc_cross_attention: list[int] = field(default_factory=lambda: [3])
    encoder_hidden_size: int | None = number(None, low=1)  # the encoder's width; None = hidden_size [features]
    encoder_num_attention_heads: int | None = number(None, low=1)  # of the encoder; None = num_attention_heads [heads]
    # None = ffn_hidden_size, scaled with the encoder's width [features]
    encoder_ffn_hidden_size: int | None = number(None, low=1)
    retrieval: bool = True  # False = a plain decoder: reads no neighbors
    # cross_attention: encoded neighbors, chunked cross-attention; prefix: their keys and values before the decoder's
    # own
    reading: str = choice("cross_attention", "prefix")
    # with reading=prefix: the token before the neighbors; None = no token [id]
    sink_id: int | None = number(None, low=0)
    normalization: str = choice("rmsnorm", "layernorm")  # of what enters a layer's parts
    layernorm_epsilon: float = number(1e-5, low=0, high=1)  # added to the variance before its root [number]
    # of the FFN; gelu is with erf, gelu_tanh GPT-2's approximation
    activation: str = choice("swiglu", "gelu", "gelu_tanh")
    bias: bool = False  # biases on every linear layer
    qk_bias: bool | None = None  # biases on q and k; None = bias, or true with init=retrieval_ready
    v_bias: bool | None = None  # biases on v; None = bias
    share_embeddings: bool = True  # output head = embedding
    output_bias: bool = False  # a learned bias per vocabulary entry
    # of the embedding at the input; None = 1, or sqrt(d) with init=retrieval_ready [factor]
    embedding_scale: float | None = number(None, low=1e-12, high=1e6)
    position_embedding: str = choice("rope", "learned", "none")  # decoder self-attention
    encoder_position_embedding: str = choice("rope", "learned", "none")  # the same, in the encoder
    cca_position_embedding: str = choice("rope", "none")  # chunked cross-attention
    cca_query_offset: bool = True  # query i at position i + m - 1 (the paper); False = at i
    # rows of learned positions (0 = encoder_seq_length), or a bound of others (0 = none) [positions]
    max_position_embeddings: int = number(0, low=0)
    rotary_percentage: float = number(1.0, low=0, high=1)  # of the head width that is rotated [share]
    # of the angles: feature pair i turns by base^(-2i/e) a position [number]
    rotary_base: float = number(10000.0, low=1, high=1e12)
    # of the decoder's self-attention: each frequency is divided by its own (scaled positions); None = all by 1
    rotary_factors: list[float] | None = None
    rotary_interleaved: bool = False  # pairs are neighboring features; False = features of both halves
    rotary_table_precision: str = choice("float32", "model")  # type of the angles, sines and cosines
    # last = left-aligned, floor(n/m) chunks; first = ceil(n/m), the first is short
    partial_chunk: str = choice("last", "first")
    mask_neighbors: bool = True  # padding and missing neighbors are never attended
    reset_attention: bool = True  # attention does not cross documents
    cca_reset: bool = True  # nor do a chunk's neighbors reach tokens of another document than its last token's
    cca_bias_everywhere: bool = False  # the CCA output bias reaches tokens that attend nothing, too
    encoder_ca_residual: str = choice("input", "norm")  # input: y + CA(norm y); norm: norm y + CA(norm y)
    encoder_final_norm: bool = True  # a norm after the encoder's last layer
    decoder_final_norm: bool = True  # a norm after the decoder's last layer
    eod_id: int | None = None  # with pad_id: document_ids are derived from the tokens when none are given [id]
    pad_id: int | None = None  # the token of padding, as eod_id's of ends [id]
    hidden_dropout: float = number(0.1, low=0, high=0.999)  # of what attention and FFN add to the residual [share]
    attention_dropout: float = number(0.1, low=0, high=0.999)  # of attention weights [share]
    ffn_dropout: float = number(0.0, low=0, high=0.999)  # of the FFN's hidden features [share]
    init: str = choice("standard", "retrieval_ready")  # docs/retrieval-ready.md
    init_method_std: float = number(0.02, low=0, high=1e3)  # standard deviation of new weights [number]
    mup: bool = False  # width scaling of arXiv 2203.03466 (docs/mup.md), relative to the base widths
    mup_base_hidden_size: int | None = number(None, low=1)  # set where mup is [features]
    # None = ffn_hidden_size, scaled with the width [features]
    mup_base_ffn_hidden_size: int | None = number(None, low=1)
    # None = encoder_hidden_size, scaled with the width [features]
    mup_base_encoder_hidden_size: int | None = number(None, low=1)
    mup_base_num_attention_heads: int | None = number(None, low=1)  # None = num_attention_heads [heads]

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
        """Decoder layers that cross-attend to neighbors; empty without retrieval, and where neighbors stand in front."""
        return sorted(self.dec_cross_attention) if self.retrieval and not self.reads_prefix else []

    @property
    def reads_prefix(self) -> bool:
        """Whether neighbors are read in front of the decoder's own keys."""
        return self.retrieval and self.reading == "prefix"

    @property
    def first_position(self) -> int:
        """Of a text: what is before it is for the token and the neighbors in front."""
        if not self.reads_prefix:
            return 0
        return self.num_neighbors * self.r + (self.sink_id is not None)

    def positions_in_front(self, neighbor_tokens: int) -> int:
        """Positions that a text loses to so many tokens of neighbors at a time."""
        if not self.reads_prefix or not neighbor_tokens:
            return 0
        return max(self.first_position, neighbor_tokens + (self.sink_id is not None))

    @property
    def encodes_alone(self) -> bool:
        """Whether a neighbor's keys and values depend on nothing but its own tokens and the weights."""
        return self.reads_prefix or bool(self.cross_layers) and not self.enc_cross_attention

    @property
    def num_reading_layers(self) -> int:
        """Decoder layers that meet keys and values of neighbors."""
        return self.dec_num_layers if self.reads_prefix else len(self.cross_layers)

    @property
    def encoded_shape(self) -> tuple[int, int, int]:
        """Keys and values of a neighbor's token in the layers that read it: (c, g, e)."""
        return 2 * self.num_reading_layers, self.key_value_heads, self.head_width


def spelled_out(c: ModelConfig) -> ModelConfig:
    """The same model with what None, 0 and the order of layers stand for written out: equal where the models are."""
    rows = c.max_position_embeddings
    if not rows and "learned" in (c.position_embedding, c.encoder_position_embedding):
        rows = c.encoder_seq_length
    return replace(
        c,
        retrieved_length=c.r,
        num_query_groups=c.key_value_heads,
        encoder_hidden_size=c.encoder_width,
        encoder_num_attention_heads=c.encoder_heads,
        encoder_ffn_hidden_size=c.encoder_ffn_width,
        qk_bias=c.has_qk_bias,
        v_bias=c.has_v_bias,
        embedding_scale=c.input_scale,
        max_position_embeddings=rows,
        dec_cross_attention=sorted(set(c.dec_cross_attention)),
        enc_cross_attention=sorted(set(c.enc_cross_attention)),
    )


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


@dataclass(kw_only=True)
class SchedConfig:
    """Learning-rate schedule, in optimizer steps."""

    # how the rate comes down after the warm-up: as a cosine, in a line at the end (WSD), or not
    name: str = choice("CosineAnnealing", "WSD", "constant")
    warmup_steps: int = number(100, low=0)  # in which the rate rises to optim.lr [steps]
    # CosineAnnealing: at min_lr, at the end, as NeMo's; WSD: at lr, before the decay [steps]
    constant_steps: int = number(0, low=0)
    min_lr: float = number(6e-5, low=0, high=1e38)  # the rate at the end [rate]
    max_steps: int | None = number(None, low=1)  # of the schedule; None = trainer.max_steps [steps]
    warmup_ratio: float | None = None  # NeMo's other way to say warmup_steps: of max_steps [share]
    constant_ratio: float | None = None  # NeMo's other way to say constant_steps: of max_steps [share]


@dataclass(kw_only=True)
class OptimConfig:
    # distributed_fused_adam: parameters and optimizer state are sharded over processes; muon: the layers' matrices, and AdamW for all else
    name: str = choice("adamw", "distributed_fused_adam", "muon")
    lr: float = number(6e-4, low=1e-12, high=1e38)  # the highest learning rate [rate]
    # AdamW's decay of the mean and of the square of gradients
    betas: list[float] = checked(
        [0.9, 0.95], lambda betas: len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)"
    )
    eps: float = number(1e-8, low=0, high=1)  # AdamW's: beside the root of a gradient's mean square [gradient]
    momentum: float = number(0.95, low=0, high=1 - 1e-9)  # muon's decay of the mean of gradients [share]
    weight_decay: float = number(0.1, low=0, high=1e6)  # of matrices [rate]
    clip: float | None = number(1.0, low=1e-12, high=math.inf)  # global gradient norm; None = off [norm]
    sched: SchedConfig = field(default_factory=SchedConfig)


@dataclass(kw_only=True)
class DataConfig:
    store: str | None = None  # folder of the chunk store to train on
    # several stores by weight, [.5,A,.5,B]: the share of the sequences that each gives; `store` is the first of them
    blend: list[str] | None = None
    neighbors: str | None = None  # table: a name under STORE/neighbors/ or a folder; None = the only one
    valid_store: str | None = None  # store to validate on; None = the validation share of `store`
    valid_neighbors: str | None = None  # the table of valid_store, as `neighbors` is of `store`
    questions: str | None = None  # JSON lines of questions to tune on; `store` has their documents (docs/tuning.md)
    valid_questions: str | None = None  # None = the validation share of `questions`
    # data = those that rows name; retrieval = from `store`; both
    question_neighbors: str = choice("data", "retrieval", "both")
    # what the model reads of a question (NeMo's)
    question_template: str = checked(
        "question: {question}\nanswer:", lambda text: "{question}" in text, "it has no {question}"
    )
    question_retriever: str = "bm25"  # how `store` is searched for questions
    # reading=prefix: of the questions, that read other questions' passages beside their own [share]
    question_distractors: float = number(0.0, low=0, high=1)
    # reading=prefix: of the questions, that read none of their own passages [share]
    question_absent: float = number(0.0, low=0, high=1)
    # how questions are answered that read none of their own passages
    question_absent_answer: str = checked("not in the documents", lambda text: bool(text.strip()), "it is empty")
    splits_string: str = shares("98,2,0")  # shares of the documents: train, validation, test
    # cyclic: sequences shuffled anew each epoch; single: one pass, in order
    dataloader_type: str = choice("cyclic", "single")
    shuffle_documents: bool | None = None  # before they are packed; None = with cyclic; the corpus' order is single's
    neighbor_dropout: float = number(0.0, low=0, high=1)  # of the training batches, that see no neighbors [share]
    # the first, in which a chunk's neighbor is the chunk itself with what follows it [steps]
    self_neighbor_steps: int = number(0, low=0)
    num_workers: int = number(1, low=0, high=1024)  # whose batches are made ahead, in the background; 0 = none [steps]
    data_prefix: list[str] | None = None  # NeMo's name of `store`; ["none"] = see model.retro


LORA_TARGETS = ("q", "k", "v", "out", "gate", "up", "down")


@dataclass(kw_only=True)
class LoraConfig:
    """Adapters that learn beside frozen weights (arXiv 2106.09685; docs/tuning.md)."""

    rank: int = number(0, low=0, high=4096)  # of the adapters; 0 = no adapters [features]
    alpha: float = number(16.0, low=1e-6, high=1e6)  # what an adapter gives is scaled by alpha / rank [number]
    # the linear layers that have one, by name (q, k, v, out, gate, up, down); None = all
    targets: list[str] | None = checked(
        None,
        lambda names: names is None or bool(names) and set(names) <= set(LORA_TARGETS),
        f"linear layers are {', '.join(LORA_TARGETS)}",
    )
    dropout: float = number(0.0, low=0, high=0.999)  # of an adapter's input [share]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def chosen(self) -> tuple[str, ...]:
        return LORA_TARGETS if self.targets is None else tuple(self.targets)


@dataclass
class RetroConfig:
    """NeMo's `model.retro.` section."""

    retro_project_dir: str | None = None  # NeMo's name of model.data.store


@dataclass(kw_only=True)
class TrainedModelConfig(ModelConfig):
    """The `model.` section: the network and how it is trained."""

    micro_batch_size: int = number(4, low=1)  # per forward [sequences]
    # a step; None = micro_batch_size x accumulation x groups of processes [sequences]
    global_batch_size: int | None = number(None, low=1)
    tensor_model_parallel_size: int = number(1, low=1)  # that share every matrix [processes]
    sequence_parallel: bool = False  # with tensor parallelism: norms and residuals are cut along the sequence
    # there is one: the encoder reads a decoder state in the middle of the stack [stages]
    pipeline_model_parallel_size: int = checked(1, lambda stages: stages <= 1, ONE_STAGE, "use 1")
    megatron_amp_O2: bool = False  # bf16 weights, fp32 master weights in the optimizer
    add_position_embedding: bool = False  # NeMo's name of position_embedding=learned
    # what the backward pass computes again; None = nothing
    activations_checkpoint_granularity: str | None = choice(None, "selective", "full")
    shape_file: str | None = None  # muP base widths that `retro mup base` wrote
    init_from: str | None = None  # a checkpoint or run: its weights, and what they fix of the model (docs/tuning.md)
    # with init_from a plain decoder: begin with a copying circuit (docs/tuning.md); None = where it can be built
    fit_cross_attention: bool | None = None
    freeze_decoder: bool = False  # with init_from: only the encoder and chunked cross-attention learn
    unfreeze_step: int | None = number(None, low=0)  # from which the decoder learns as well; None = never [steps]
    # from then on one decoder layer more every so many, the last first; None = all [steps]
    unfreeze_every: int | None = number(None, low=1)
    lora: LoraConfig = field(default_factory=LoraConfig)  # with init_from: adapters learn, its weights do not
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    retro: RetroConfig = field(default_factory=RetroConfig)


@dataclass(kw_only=True)
class TrainerConfig:
    num_nodes: int = number(1, low=1)  # machines [nodes]
    # a node; None = as many as torchrun started, -1 = one a GPU [processes]
    devices: int | None = checked(
        None, lambda number: number is None or number >= 1 or number == -1, "at least 1, or -1: all GPUs"
    )
    strategy: str = choice("auto", "ddp", "fsdp")  # auto = fsdp with distributed_fused_adam or tensor parallelism
    accelerator: str = choice("auto", "cpu", "gpu")  # auto = a GPU where there is one
    # bf16 is NeMo's name of bf16-mixed; auto times 32 and bf16 here
    precision: str = choice("auto", "32", "bf16-mixed", "16-mixed", "64")
    max_skipped_steps: int = number(10, low=1)  # stop after as many in a row without a usable loss [steps]
    # skip a step whose loss is this many times the running mean; None = off [factor]
    loss_spike: float | None = number(None, low=1, high=math.inf)
    max_steps: int = number(1000, low=1)  # optimizer steps of the run [steps]
    timeout_s: int = number(120, low=1)  # a process that hangs, or hashes, as long stops the others [seconds]
    # stop, with a checkpoint, after so much training; None = never [seconds]
    max_time_s: float | None = number(None, low=1e-3, high=math.inf)
    # between validations; with a point a share of an epoch of the training data: 0.25, 1.0 [steps]
    val_check_interval: int | float = count_or_share(100, low=1)
    # of a validation pass; 0 = no validation, with a point a share, None = all [batches]
    limit_val_batches: int | float | None = count_or_share(32, low=0)
    gradient_clip_val: float | None = None  # NeMo's name of model.optim.clip; 0 = off [norm]
    accumulate_grad_batches: int = number(1, low=1)  # micro-batches whose gradients make a step [batches]
    log_every_n_steps: int = number(10, low=1)  # between lines of metrics.jsonl and of the trackers [steps]
    compile: bool = False  # torch.compile(fullgraph=True) of the training forward
    # the first and the last step that torch's profiler follows, [11,13]; RUN/profile has its trace and a table; None = none
    profile_steps: list[int] | None = checked(
        None,
        lambda steps: steps is None or (len(steps) == 2 and 1 <= steps[0] <= steps[1] < steps[0] + 100),
        "the first and the last step, [11,13], of at most 100",
    )


@dataclass(kw_only=True)
class WandbConfig:
    """Arguments of wandb.init."""

    name: str | None = None  # None = the run folder's
    project: str | None = None  # None = retro-engine
    entity: str | None = None  # user or team
    group: str | None = None  # that runs are shown in
    id: str | None = None  # of a run that goes on
    mode: str | None = None  # online, offline or disabled
    resume: Any = None  # as wandb.init takes it


@dataclass(kw_only=True)
class ExpManagerConfig:
    exp_dir: str | None = None  # the run's folder; --out sets it
    create_tensorboard_logger: bool | None = None  # None = where TensorBoard is installed
    create_wandb_logger: bool = False  # log to Weights & Biases as well
    wandb_logger_kwargs: WandbConfig = field(default_factory=WandbConfig)
    resume_if_exists: bool = True  # go on with a run that is there; False = refuse its folder
    checkpoint_every_n_steps: int = number(500, low=1)  # between checkpoints [steps]
    keep_last_n: int = number(2, low=0)  # the last, of all that are saved; 0 = all [checkpoints]
    keep_best: bool = True  # save at every validation that is the best so far, and keep that one; commands read it


@dataclass
class RetroInferenceConfig:
    retro_gpt_retrieved_length: int | None = number(None, low=1)  # read of a neighbor; None = the model's r [tokens]
    retro_num_neighbors: int | None = number(None, low=1)  # read a chunk; None = the model's k [neighbors]
    # best ones that the prompt itself holds, as fine-tuned models want: passed over ... [neighbors]
    ft_neighbours: int = number(0, low=0)
    reuse_top: bool = False  # ... unless these shall be read as well


@dataclass(kw_only=True)
class InferenceConfig:
    greedy: bool = True  # take the likeliest token; False = sample
    temperature: float = 1.0  # of sampling: logits are divided by it [factor]
    top_k: int = 0  # sample from as many likeliest; 0 = all [tokens]
    top_p: float = 1.0  # sample from the likeliest tokens of this probability together [share]
    tokens_to_generate: int = number(64, low=1)  # at most [tokens]
    min_tokens_to_generate: int = number(0, low=0)  # the end of the document does not come before [tokens]
    # logits of tokens seen are divided (or, below 0, multiplied) by it [factor]
    repetition_penalty: float = number(1.0, low=1e-6, high=1e6)
    add_BOS: bool = False  # begin with the tokenizer's beginning-of-document token
    end_strings: list[str] = field(default_factory=list)  # the text ends before the first of these
    compute_logprob: bool = False  # log-probabilities of the prompt's and the generated tokens
    all_probs: bool = False  # of every entry of the vocabulary at each of them
    pad_prompt: bool = True  # left-pad so that the prompt's last token ends a chunk
    retro_inference: RetroInferenceConfig = field(default_factory=RetroInferenceConfig)


@dataclass(kw_only=True)
class Config:
    seed: int = number(1234, low=0, high=2**63 - 1)  # of weights, order and dropout [number]
    model: TrainedModelConfig = field(default_factory=TrainedModelConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    exp_manager: ExpManagerConfig = field(default_factory=ExpManagerConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    checkpoint_dir: str | None = None  # NeMo's name of the run that `retro generate` reads
    checkpoint_name: str | None = None  # and of its checkpoint
    retro_model_file: str | None = only(None)  # NeMo's, of which this version has only the default
    prompt: str | None = None  # NeMo's name of what `retro generate` continues
    neighbors: list[str] | None = None  # texts that it reads in place of what is retrieved
    # of generation; -1 = from the checkpoint [processes]
    tensor_model_parallel_size: int = checked(
        -1, lambda size: size in (-1, 1), "generation runs in one process", "use -1"
    )
    # of generation: there is one [stages]
    pipeline_model_parallel_size: int = checked(-1, lambda stages: stages <= 1, ONE_STAGE, "use 1")
    megatron_amp_O2: bool = only(False)  # of generation: --dtype says the weights' type


def flat_keys(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value for every leaf of a (nested) dataclass or dict."""
    leaves: dict[str, Any] = {}
    items = {f.name: getattr(node, f.name) for f in fields(node)} if is_dataclass(node) else node
    for name, value in items.items():
        is_branch = is_dataclass(value) or isinstance(value, dict)
        leaves |= flat_keys(value, f"{prefix}{name}.") if is_branch else {f"{prefix}{name}": value}
    return leaves
