"""What a training step would take, on paper: memory, FLOPs and communication of one GPU, from the settings alone.

Every neighbor is taken as full and every token as labelled. Nothing is run. docs/scaling.md has the assumptions.
Letters: T decoder tokens and W neighbor tokens of a micro-batch, D width, C encoder width, F FFN width, G width of
the keys, V vocabulary; t processes that share every matrix.
"""

from dataclasses import astuple, dataclass
from typing import Any

from retro_engine.config import Config, ModelConfig
from retro_engine.errors import UsageError
from retro_engine.model.flops import H100_FLOPS, attention_flops, describe_flops, forward_flops, token_flops
from retro_engine.train.parallel import micro_batches, strategy_of
from retro_engine.train.precision import Precision

MATMUL_FLOPS = 800e12  # what large bf16 products on random data reach there (the power limit keeps them below)
ATTENTION_FLOPS = 350e12  # the cores: FlashAttention-2 reaches 35 % on an H100 (arXiv 2407.08608)
HBM_BYTES = 3.0e12  # a second, copy; the datasheet says 3.35
NVLINK_BYTES = 450e9  # a second and direction, each GPU to the others of its node (NVLink 4: 900 both ways)
NETWORK_BYTES = 50e9  # a second, direction and GPU, to other nodes (one 400 Gb/s port a GPU, as in a DGX H100)
NODE = 8  # GPUs
GPU_BYTES = 80e9
LAYER_PASSES = 3  # over what a layer keeps: written, read in the forward pass, read in the backward pass
AGAIN_PASSES = 2  # more with recomputation: written and read once more
OPTIMIZER_PASSES = 11  # over fp32 parameters: norm 1, clipping 2, AdamW reads 4 and writes 3, zeroing 1
LOSS_TOKENS = 512  # of one slice of the head: model/loss.py


@dataclass(frozen=True)
class Part:
    """Parameters of one part of the network: `cut` over the processes that share matrices, `whole` in each of them. Of these are
    `hidden` in matrices from features to features, of which there are `matrices`.
    """

    cut: int = 0
    whole: int = 0
    tensors: int = 0
    hidden: int = 0
    matrices: int = 0

    def __add__(self, other: "Part") -> "Part":
        return Part(*(a + b for a, b in zip(astuple(self), astuple(other))))

    def times(self, count: int) -> "Part":
        return Part(*(count * a for a in astuple(self)))

    @property
    def total(self) -> int:
        return self.cut + self.whole

    def here(self, t: int) -> float:
        """Of one of `t` processes; a vocabulary that t does not divide adds up to t rows."""
        return self.cut / t + self.whole


def _linear(inputs: int, outputs: int, has_bias: bool, is_row: bool = False) -> Part:
    """`is_row`: cut along its inputs, so that every process has the whole bias."""
    bias = outputs if has_bias else 0
    return Part(inputs * outputs + (0 if is_row else bias), bias if is_row else 0, 1 + has_bias, inputs * outputs, 1)


@dataclass(frozen=True)
class Parameters:
    """Of each part; a cross-attending decoder layer is `decoder` + `cross`."""

    decoder: Part
    cross: Part
    encoder: Part
    encoder_cross: Part
    projection: Part  # keys and values of the neighbors, of all cross-attending layers
    root: Part  # embeddings, head, final norms
    total: Part


def parameters(c: ModelConfig) -> Parameters:
    """The parameters of RetroModel(c), part by part."""
    d, e, g = c.hidden_size, c.encoder_width, c.key_value_heads * c.head_width
    e_g = c.encoder_key_value_heads * (e // c.encoder_heads)

    def norm(width: int) -> Part:
        is_layer = c.normalization == "layernorm"
        return Part(0, width * (1 + is_layer), 1 + is_layer)

    def attention(width: int, source: int, groups: int) -> Part:
        keys = _linear(source, groups, c.has_qk_bias) + _linear(source, groups, c.has_v_bias)
        return _linear(width, width, c.has_qk_bias) + keys + _linear(width, width, c.bias, is_row=True)

    def ffn(width: int, features: int) -> Part:
        ups = 2 if c.activation == "swiglu" else 1
        return _linear(width, features, c.bias).times(ups) + _linear(features, width, c.bias, is_row=True)

    decoder = norm(d).times(2) + attention(d, d, g) + ffn(d, c.ffn_hidden_size)
    cross = norm(d) + _linear(d, d, c.has_qk_bias) + _linear(d, d, c.bias, is_row=True)
    encoder = norm(e).times(2) + attention(e, e, e_g) + ffn(e, c.encoder_ffn_width)
    encoder_cross = norm(e) + attention(e, d, e_g)
    crossing = len(c.cross_layers)
    projection = (_linear(e, g, c.has_qk_bias) + _linear(e, g, c.has_v_bias)).times(crossing)
    root = Part(c.vocab_size * d, 0, 1).times(1 if c.share_embeddings else 2)
    if c.output_bias:
        root += Part(c.vocab_size, 0, 1)
    if "learned" in (c.position_embedding, c.encoder_position_embedding):
        root += Part(0, (c.max_position_embeddings or c.encoder_seq_length) * d, 1)
    if c.decoder_final_norm:
        root += norm(d)
    total = decoder.times(c.dec_num_layers) + cross.times(crossing)
    if crossing:
        if c.encoder_final_norm:
            root += norm(e)
        if e != d:
            root += Part(0, d * e, 1, d * e, 1)
        total += encoder.times(c.enc_num_layers) + encoder_cross.times(len(set(c.enc_cross_attention))) + projection
    return Parameters(decoder, cross, encoder, encoder_cross, projection, root=root, total=total + root)


@dataclass(frozen=True)
class Layout:
    """How a model is trained: processes, batches, types."""

    world: int
    tensor: int
    strategy: str  # none | ddp | fsdp
    is_sequence_parallel: bool
    micro_batch: int  # sequences
    num_micro_batches: int  # of a step and process
    recompute: str | None
    precision: str  # 32 | bf16-mixed | 16-mixed | 64
    is_o2: bool  # bf16 weights, fp32 masters
    is_muon: bool = False  # one moment of the hidden matrices, and no counter
    keeps_normed: bool = False  # RMSNorm without a fused kernel, as on a CPU, keeps the normed input too

    @property
    def data(self) -> int:
        return self.world // self.tensor

    @property
    def is_autocast(self) -> bool:
        return self.precision.endswith("-mixed") and not self.is_o2

    @property
    def wide(self) -> int:
        """Bytes of a number in the residual stream; autocast leaves it in fp32."""
        return 8 if self.precision == "64" else 2 if self.is_o2 else 4

    @property
    def narrow(self) -> int:
        """Bytes of a number that matrix products read and write."""
        return 2 if self.is_autocast else self.wide

    @property
    def has_master(self) -> bool:
        return Precision(name=self.precision, is_o2=self.is_o2, strategy=self.strategy).has_master


def layout_of(config: Config, processes: int) -> Layout:
    """The layout that `retro train` would have on so many processes. Raises UsageError where it does not fit."""
    m, trainer, tensor = config.model, config.trainer, config.model.tensor_model_parallel_size
    if processes < 1 or processes % tensor:
        raise UsageError(
            f"--processes {processes} cannot be used",
            f"it must be a multiple of model.tensor_model_parallel_size={tensor}",
            f"--processes {max(1, processes // tensor) * tensor}",
        )
    return Layout(
        processes,
        tensor,
        strategy=strategy_of(config, processes // tensor),
        is_sequence_parallel=m.sequence_parallel,
        micro_batch=m.micro_batch_size,
        num_micro_batches=micro_batches(config, processes // tensor),
        recompute=m.activations_checkpoint_granularity,
        precision="bf16-mixed" if trainer.precision == "auto" else trainer.precision,
        is_o2=m.megatron_amp_O2,
        is_muon=m.optim.name == "muon",
    )


@dataclass(frozen=True)
class _Kept:
    """Bytes that one layer keeps for its backward pass."""

    plain: float
    selective: float  # the outputs of its products and attentions; its input is counted apart


def _attention_kept(c: ModelConfig, x: Layout, width: int, keys: float, heads: int) -> _Kept:
    """Per token: norm, queries (and as many `keys` features), attention, output product, residual."""
    core = x.narrow * (2 * width + keys) / x.tensor + 4 * heads / x.tensor  # q, k, v, o and the log-sum-exp
    return _Kept(_around(c, x, width) + core, core + x.narrow * width)


def _ffn_kept(c: ModelConfig, x: Layout, width: int, features: int) -> _Kept:
    ups = 2 if c.activation == "swiglu" else 1
    inner = 2 * ups * features * x.narrow / x.tensor  # what ups made, silu or gelu of it, their product
    mask = features / x.tensor if c.ffn_dropout else 0
    return _Kept(_around(c, x, width) + inner + mask, ups * features * x.narrow / x.tensor + x.narrow * width)


def _around(c: ModelConfig, x: Layout, width: int) -> float:
    """Per token: the norm before and the residual after; what lies between is narrow."""
    cut = x.tensor if x.is_sequence_parallel else 1
    residual = (x.wide + (1 if c.hidden_dropout else 0)) * width / cut  # and the mask of the dropout
    return residual + _norm_kept(c, x, width) + x.narrow * width


def _norm_kept(c: ModelConfig, x: Layout, width: int) -> float:
    cut = x.tensor if x.is_sequence_parallel else 1
    is_layer = c.normalization == "layernorm"
    return (4 * (1 + is_layer) + (x.wide * width if x.keeps_normed and not is_layer else 0)) / cut


def _stack_kept(
    c: ModelConfig, x: Layout, tokens: float, width: int, features: int, *, layers: int, reading: int, heads: int, keys: int
) -> tuple[float, float, float]:  # fmt: skip
    """Of a stack of layers, `reading` of which cross-attend as well: plain, selective, and the dearest layer's plain."""
    attend, read = (_attention_kept(c, x, width, of, heads) for of in (keys, 0))
    ffn = _ffn_kept(c, x, width, features)
    plain = tokens * (layers * (attend.plain + ffn.plain) + reading * read.plain)
    selective = tokens * (layers * (attend.selective + ffn.selective) + reading * read.selective)
    return plain, selective, tokens * (attend.plain + ffn.plain + (read.plain if reading else 0))


@dataclass(frozen=True)
class Activations:
    kept: float  # bytes from the forward to the backward pass
    layer: float  # of these or of what is computed again, the dearest layer
    traffic: float  # of all layers without recomputation


def activations(c: ModelConfig, x: Layout) -> Activations:
    """What autograd keeps of a micro-batch, as decoder.py, encoder.py, loss.py and recompute.py make it.

    Left out: token ids and masks, rotary tables.
    """
    T, d = x.micro_batch * c.encoder_seq_length, c.hidden_size
    cut = x.tensor if x.is_sequence_parallel else 1
    g, crossing = c.key_value_heads * c.head_width, len(c.cross_layers)
    stack = {"layers": c.dec_num_layers, "reading": crossing, "heads": c.num_attention_heads, "keys": 2 * g}
    plain, selective, layer = _stack_kept(c, x, T, d, c.ffn_hidden_size, **stack)
    inputs = T * x.wide * d / cut * (c.dec_num_layers + crossing)  # with the last layer's output; not the first input
    ends = T * x.wide * d / cut  # the first layer's input
    ends += T * (_norm_kept(c, x, d) if c.decoder_final_norm else -x.wide * d / cut)  # the norm keeps the last output
    ends += T * x.narrow * d + (8 if x.wide == 8 else 4) * c.vocab_size * d / x.tensor  # the loss's gradients
    if crossing:
        encoder = _encoder_kept(c, x)
        plain, selective, inputs = plain + encoder.plain, selective + encoder.selective, inputs + encoder.inputs
        layer, ends = max(layer, encoder.layer), ends + encoder.ends
    if c.reads_prefix:
        front = _front_kept(c, x)
        plain, layer, ends = plain + front.plain, max(layer, front.layer), ends + front.ends
    if x.recompute is None:
        kept = plain + ends
    else:
        kept = inputs + ends + (selective if x.recompute == "selective" else 0)
    return Activations(kept + _weight_copies(c, x), layer, plain)


@dataclass(frozen=True)
class _EncoderKept:
    plain: float
    selective: float
    inputs: float
    layer: float
    ends: float


def _front_tokens(c: ModelConfig, x: Layout) -> int:
    """Neighbors in front that run through the decoder, each behind the sink."""
    neighbors = x.micro_batch * (c.encoder_seq_length // c.chunk_size) * c.num_neighbors
    return neighbors * (c.r + (c.sink_id is not None))


def _front_kept(c: ModelConfig, x: Layout) -> _EncoderKept:
    """What model/prefix.py keeps beside a decoder's own; no layer is recomputed there."""
    N, M, d, g = c.encoder_seq_length, c.chunk_size, c.hidden_size, c.key_value_heads * c.head_width
    L, X, tokens = N // M, c.first_position, _front_tokens(c, x)
    stack = {"layers": c.dec_num_layers, "reading": 0, "heads": c.num_attention_heads, "keys": 2 * g}
    plain, _, layer = _stack_kept(c, x, tokens, d, c.ffn_hidden_size, **stack)
    plain -= layer - tokens * (_norm_kept(c, x, d) + x.narrow * d)  # of the last one keys and values are needed alone
    keys = X - c.num_neighbors * c.r + M - 1 + sum(X + min((chunk + 2) * M - 1, N) for chunk in range(L))  # of each run
    text = N * d + 2 * g * (keys - N)  # what the runs read, put together; each has a copy of its keys and values
    fronts = L * X * (2 * g * x.narrow / x.tensor + 8)  # before they are put in order, and their places
    text_kept = x.micro_batch * (text * x.narrow / x.tensor + fronts)
    passes = 1 + (c.sink_id is not None)  # through the decoder, beside the text's
    copies = passes * x.narrow * _stacked(c) if x.tensor == 1 else 0
    ends = tokens * x.wide * d + copies
    return _EncoderKept(plain + c.dec_num_layers * text_kept, 0.0, 0.0, layer + text_kept, ends)


def _encoder_kept(c: ModelConfig, x: Layout) -> _EncoderKept:
    T, d, e = x.micro_batch * c.encoder_seq_length, c.hidden_size, c.encoder_width
    W = T // c.chunk_size * c.num_neighbors * c.r
    cut = x.tensor if x.is_sequence_parallel else 1
    groups, crosses = c.encoder_key_value_heads * (e // c.encoder_heads), len(set(c.enc_cross_attention))
    stack = {"layers": c.enc_num_layers, "reading": crosses, "heads": c.encoder_heads, "keys": 2 * groups}
    plain, selective, layer = _stack_kept(c, x, W, e, c.encoder_ffn_width, **stack)
    chunk_keys = T * 2 * groups * x.narrow / x.tensor
    kv = W * 2 * c.key_value_heads * c.head_width * x.narrow / x.tensor  # of one cross-attending decoder layer
    crossing = len(c.cross_layers)
    chunk_copies = (crosses if x.is_autocast else 1) * x.narrow  # autocast makes each layer a copy of its own
    ends = W * x.wide * e / cut + T * _norm_kept(c, x, d)  # embedded neighbors; the chunks' norm
    ends += W * (_norm_kept(c, x, e) if c.encoder_final_norm else 0)
    if e != d:
        ends += W * d * x.narrow
    is_whole = x.recompute is not None  # a recomputed layer keeps its inputs as they are, in the residual's type
    ends += T * d * (x.wide if is_whole else chunk_copies) + W * e * (x.wide if x.recompute == "full" else x.narrow)
    return _EncoderKept(
        plain + crosses * chunk_keys + crossing * kv,
        selective + crosses * chunk_keys + crossing * kv,
        W * x.wide * e / cut * c.enc_num_layers,
        layer + chunk_keys,
        ends,
    )


def _weight_copies(c: ModelConfig, x: Layout) -> float:
    """Matrices copied in the forward pass and kept: those that `attention.project` stacks, and autocast's in 16 bits."""
    p, d, e = parameters(c), c.hidden_size, c.encoder_width
    crossing, crosses = len(c.cross_layers), len(set(c.enc_cross_attention))
    stacks = x.tensor == 1
    projection = 2 * e * c.key_value_heads * c.head_width * crossing
    outside = x.narrow * projection / x.tensor if (stacks or x.is_autocast) and x.recompute != "full" else 0.0
    if crossing and e != d and x.is_autocast:
        outside += x.narrow * d * e
    if x.recompute is not None:
        return outside
    if x.is_autocast:
        matrices = p.decoder.times(c.dec_num_layers) + p.cross.times(crossing)
        if crossing:
            matrices += p.encoder.times(c.enc_num_layers) + p.encoder_cross.times(crosses)
        return outside + x.narrow * matrices.cut / x.tensor
    if not stacks:
        return outside
    ups, stacked = 2 if c.activation == "swiglu" else 0, _stacked(c)
    if crossing:
        groups = c.encoder_key_value_heads * (e // c.encoder_heads)
        stacked += c.enc_num_layers * (e * (e + 2 * groups) + ups * e * c.encoder_ffn_width)
        stacked += crosses * 2 * d * groups
    return outside + x.narrow * stacked


def _stacked(c: ModelConfig) -> int:
    """Weights of the decoder's layers that one product takes together, in a copy."""
    qkv = c.hidden_size * (c.hidden_size + 2 * c.key_value_heads * c.head_width)
    ups = 2 if c.activation == "swiglu" else 0
    return c.dec_num_layers * (qkv + ups * c.hidden_size * c.ffn_hidden_size)


def _recomputed_flops(c: ModelConfig, T: float, W: float) -> float:
    """Forward FLOPs that recompute=full does twice: the layers' without the last product of each recomputed region."""
    crossing = len(c.cross_layers)
    last = c.dec_num_layers * c.ffn_hidden_size * c.hidden_size + crossing * c.hidden_size**2
    last_encoder = c.enc_num_layers * c.encoder_ffn_width * c.encoder_width if W else 0
    return forward_flops(c, int(T), int(W)) - T * 2 * (c.hidden_size * c.vocab_size + last) - W * 2 * last_encoder


def _tensor_bytes(c: ModelConfig, x: Layout) -> float:
    """Sent a micro-batch and process by what shares matrices: all-reduces of every part's output and of its input's
    gradient. Sequence parallelism has a reduce-scatter and an all-gather in place of the first, and one all-gather more.
    """
    if x.tensor == 1:
        return 0.0
    T, d, e = x.micro_batch * c.encoder_seq_length, c.hidden_size, c.encoder_width
    crossing, crosses = len(c.cross_layers), len(set(c.enc_cross_attention))
    W = T // c.chunk_size * c.num_neighbors * c.r if crossing else 0
    again = 1 if x.recompute is not None else 0  # the attention's output, and that of a cross-attention
    more = 0.5 if x.is_sequence_parallel else 0.0
    T += _front_tokens(c, x) if c.reads_prefix else 0
    decoder = T * d * (c.dec_num_layers * (4 + again + 2 * more) + crossing * (2 + (more if again else 0)) + 2)
    encoder = W * e * (c.enc_num_layers * (4 + again + 2 * more) + crosses * (2 + again + more) + 1) + W * d
    shared = decoder + (encoder + T * d * crosses if crossing else 0)
    return 2 * (x.tensor - 1) / x.tensor * shared * x.narrow


def _data_bytes(p: Parameters, x: Layout) -> float:
    """Sent a step and process by what averages gradients (and, with FSDP, gathers weights)."""
    if x.strategy == "none":
        return 0.0
    share, here = (x.data - 1) / x.data, p.total.here(x.tensor)
    if x.strategy == "ddp":  # bf16 gradients with masters are exchanged each micro-batch, fp32 ones once
        return 2 * share * here * (2 * x.num_micro_batches if x.has_master else max(4, x.wide))
    gathered = (2 * here - p.root.here(x.tensor)) * x.wide * x.num_micro_batches  # the root is gathered once
    return share * (gathered + here * max(4, x.wide))


def _data_rate(x: Layout) -> float:
    """Bytes a second and process between data-parallel processes: the GPUs of a node share all its network ports."""
    if x.world <= NODE:
        return NVLINK_BYTES
    return min(NVLINK_BYTES, NETWORK_BYTES * max(1, NODE // x.tensor))


def _memory(c: ModelConfig, x: Layout, p: Parameters, kept: Activations) -> dict[str, float]:
    """Bytes of one GPU, by what they are for."""
    here, full = p.total.here(x.tensor), max(4, x.wide)
    shards = x.data if x.strategy == "fsdp" else 1
    layer = max(p.decoder.here(x.tensor) + p.cross.here(x.tensor), p.projection.here(x.tensor))
    weights = here / shards * (x.wide if x.has_master or not x.is_o2 else 4)
    if x.has_master:
        gradients = here * (2 + 4)  # bf16, added to fp32
    else:  # FSDP adds up micro-batches before it shards
        gradients = here * full / (shards if x.num_micro_batches == 1 else 1)
    optimizer = here / shards * full * (3 if x.has_master else 2) + 4 * p.total.tensors
    if x.is_muon:
        optimizer -= full * p.total.hidden + 4 * p.total.matrices
    gathered = (4 * layer + p.root.here(x.tensor)) * x.wide if shards > 1 else 0.0  # two layers, and their gradients
    working = kept.layer * (1 if x.recompute is None else 2)  # the gradients in a layer, and what is computed again
    vocabulary = c.vocab_size / x.tensor
    logits = LOSS_TOKENS * vocabulary * (full + x.narrow)
    logits += vocabulary * c.hidden_size * x.narrow * (2 if x.is_autocast else 1)  # a slice's gradient; the cast head
    parts = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": kept.kept,
        "gathered": gathered,
        "layer": working,
        "logits": logits,
    }
    return parts | {"total": sum(parts.values()) - min(working, logits)}


def _seconds(
    x: Layout, p: Parameters, kept: Activations, products_s: float, tensor_bytes: float, data_bytes: float
) -> dict[str, float]:
    """A step's: products + memory traffic + tensor-parallel communication + what of the data-parallel communication the
    backward pass (DDP) or the whole pass (FSDP) of the micro-batches that have it does not hide.
    """
    is_sharded, steps = x.strategy == "fsdp", x.num_micro_batches
    updated = p.total.here(x.tensor) / (x.data if is_sharded else 1)
    passes = LAYER_PASSES + (AGAIN_PASSES if x.recompute is not None else 0)
    traffic_s = (passes * kept.traffic * steps + 4 * OPTIMIZER_PASSES * updated) / HBM_BYTES
    tensor_s = tensor_bytes / (NVLINK_BYTES if x.tensor <= NODE else NETWORK_BYTES)
    data_s = data_bytes / _data_rate(x)
    hides = products_s if is_sharded else products_s * 2 / 3 / (1 if x.has_master else steps)
    exposed_s = max(0.0, data_s - hides)
    return {
        "products": products_s,
        "traffic": traffic_s,
        "tensor": tensor_s,
        "data": data_s,
        "data_not_hidden": exposed_s,
        "step": products_s + traffic_s + tensor_s + exposed_s,
    }


def plan(config: Config, processes: int) -> dict[str, Any]:
    """Figures of one step of `config` on so many H100s, JSON-ready: counts, bytes, FLOPs, seconds, MFU.

    Products are at MATMUL_FLOPS, attention at ATTENTION_FLOPS.
    """
    c = config.model
    if c.lora.rank:
        why = "the figures are of training in which every weight learns"
        raise UsageError(f"model.lora.rank={c.lora.rank} cannot be planned", why, "model.lora.rank=0")
    if c.vocab_size < 1:
        raise UsageError(
            "model.vocab_size=0 cannot be planned", "there is no tokenizer to ask", "model.vocab_size=50257"
        )
    x, p = layout_of(config, processes), parameters(c)
    kept = activations(c, x)
    T = x.micro_batch * c.encoder_seq_length
    W = T // c.chunk_size * c.num_neighbors * c.r if c.num_reading_layers else 0
    steps = x.num_micro_batches
    useful = 3 * forward_flops(c, T, W) * steps / x.tensor
    again = _recomputed_flops(c, T, W) * steps / x.tensor if x.recompute == "full" else 0.0
    memory = _memory(c, x, p, kept)
    cores = attention_flops(c, T, W) * (4 if again else 3) * steps / x.tensor
    products_s = (useful + again - cores) / MATMUL_FLOPS + cores / ATTENTION_FLOPS
    tensor_bytes, data_bytes = _tensor_bytes(c, x) * steps, _data_bytes(p, x)
    seconds = _seconds(x, p, kept=kept, products_s=products_s, tensor_bytes=tensor_bytes, data_bytes=data_bytes)
    return {
        "parameters": p.total.total,
        "processes": x.world,
        "data_parallel": x.data,
        "tensor_parallel": x.tensor,
        "sequence_parallel": x.is_sequence_parallel,
        "strategy": x.strategy,
        "recompute": x.recompute,
        "precision": x.precision + (" O2" if x.is_o2 else ""),
        "micro_batch": x.micro_batch,
        "global_batch": x.micro_batch * steps * x.data,
        "tokens_per_step": T * steps * x.data,
        "bytes": {name: round(value) for name, value in memory.items()},
        "fits": memory["total"] <= 0.9 * GPU_BYTES,  # the rest: CUDA, NCCL and fragments
        "flops": useful,
        "recomputed_flops": again,
        "token_flops": token_flops(c),
        "data_bytes": round(data_bytes),
        "tensor_bytes": round(tensor_bytes),
        "seconds": seconds,
        "tokens_per_s": T * steps * x.data / seconds["step"],
        "mfu": useful / H100_FLOPS / seconds["step"],
    }


def table(figures: dict[str, Any]) -> str:
    """A plan for people to read."""
    f, b, s = figures, figures["bytes"], figures["seconds"]
    split = f"{f['strategy']}, data {f['data_parallel']} x tensor {f['tensor_parallel']}"
    split += ", sequence parallel" if f["sequence_parallel"] else ""
    rows = [
        ("parameters", f"{f['parameters']:,}"),
        ("layout", f"{f['processes']} GPUs: {split}"),
        ("step", f"{f['global_batch']} sequences, micro-batch {f['micro_batch']}: {f['tokens_per_step']:,} tokens"),
        ("types", f"{f['precision']}; recompute {f['recompute'] or 'none'}"),
        *((f"  {name}", f"{b[name] / 1e9:.2f} GB") for name in b if name != "total"),
        ("memory a GPU", f"{b['total'] / 1e9:.2f} GB of {GPU_BYTES / 1e9:.0f}{'' if f['fits'] else ': too much'}"),
        ("FLOPs", f"{f['flops'] / 1e12:.1f} T a step and GPU, and {f['recomputed_flops'] / 1e12:.1f} T computed again"),
        ("  a token", describe_flops(f["token_flops"])),
        ("sent", f"data {f['data_bytes'] / 1e9:.2f} GB, tensor {f['tensor_bytes'] / 1e9:.2f} GB a step and GPU"),
        *((f"  {name.replace('_', ' ')}", f"{s[name]:.4f} s") for name in s if name != "step"),
        ("time a step", f"{s['step']:.4f} s, {f['tokens_per_s']:,.0f} tokens/s"),
        ("MFU", f"{f['mfu']:.1%}"),
    ]
    return "\n".join(f"{name:<18} {value}" for name, value in rows) + "\non paper: nothing was run"
