"""FLOPs of a step and of inference, from the configuration, and of a device: MFU is the share of the last that the first is.

Letters: n sequence length, m chunk length, r tokens per neighbor, k neighbors, d width, c encoder width.
"""

import functools
import time

import torch

from retro_engine.config import ModelConfig
from retro_engine.model import ops

H100_FLOPS = 989e12  # a second, dense bf16 (NVIDIA H100 SXM datasheet)
CPU_SIZES, GPU_SIZES = (256, 512, 1024, 2048), (8192,)  # of the matrices whose product is timed
LONG_S = 0.05  # of one product: a larger one would tell no more


def forward_flops(config: ModelConfig, num_tokens: int, num_neighbor_tokens: int) -> float:
    """Multiply-adds x 2 of a forward over `num_tokens` decoder tokens and `num_neighbor_tokens` valid neighbor
    tokens. Padding is not counted, nor the one token before neighbors in front; norms, activations and softmax are left out,
    as is usual.
    """
    read = inference_flops(config, num_tokens, num_neighbor_tokens, kept=True)
    return read + encoding_flops(config, num_tokens, num_neighbor_tokens)


def inference_flops(config: ModelConfig, num_tokens: int, num_neighbor_tokens: int, kept: bool) -> float:
    """Of generating or reading `num_tokens`, each computed once; `kept`: the neighbors were encoded before."""
    if not kept:
        return forward_flops(config, num_tokens, num_neighbor_tokens)
    d = config.hidden_size
    crossing = len(config.cross_layers) if num_neighbor_tokens else 0  # queries and outputs of cross-attention
    per_token = config.dec_num_layers * _layer_flops(config) + 2 * d * config.vocab_size + crossing * 4 * d * d
    per_token += config.dec_num_layers * 2 * config.encoder_seq_length * d
    return num_tokens * per_token + num_neighbor_tokens * config.num_reading_layers * 4 * config.chunk_size * d


def encoding_flops(config: ModelConfig, num_tokens: int, num_neighbor_tokens: int) -> float:
    """Of making the keys and values that neighbors are read by: through the encoder, which may read the tokens, or with
    `reading=prefix` through the decoder.
    """
    d, c = config.hidden_size, config.encoder_width
    if not num_neighbor_tokens:
        return 0.0
    if config.reads_prefix:
        return num_neighbor_tokens * config.dec_num_layers * (_layer_flops(config) + 2 * config.r * d)
    share = config.encoder_key_value_heads / config.encoder_heads
    reads = len(config.enc_cross_attention)
    layer = 4 * c * c * (1 + share) + 2 * _ffn_matrices(config) * c * config.encoder_ffn_width
    per_neighbor_token = config.enc_num_layers * layer + reads * 4 * c * c + (2 * d * c if c != d else 0)  # the input
    per_neighbor_token += len(config.cross_layers) * 4 * c * d * config.key_value_heads / config.num_attention_heads
    return num_tokens * reads * 4 * d * c * share + num_neighbor_tokens * (per_neighbor_token + _encoder_cores(config))


def attention_flops(config: ModelConfig, num_tokens: int, num_neighbor_tokens: int) -> float:
    """The share of `forward_flops` that is scores and weighted values, m queries over each key of a neighbor."""
    d = config.hidden_size
    encoding = config.dec_num_layers * 2 * config.r * d if config.reads_prefix else _encoder_cores(config)
    per_neighbor_token = encoding + config.num_reading_layers * 4 * config.chunk_size * d
    per_token = config.dec_num_layers * 2 * config.encoder_seq_length * d
    return num_tokens * per_token + num_neighbor_tokens * per_neighbor_token


def _ffn_matrices(config: ModelConfig) -> int:
    return 3 if config.activation == "swiglu" else 2


def _layer_flops(config: ModelConfig) -> float:
    """A token's in a decoder layer's matrices, without those of cross-attention."""
    d, share = config.hidden_size, config.key_value_heads / config.num_attention_heads
    return 4 * d * d * (1 + share) + 2 * _ffn_matrices(config) * d * config.ffn_hidden_size


def _encoder_cores(config: ModelConfig) -> float:
    """A neighbor token's in the encoder's attentions."""
    return (
        (config.enc_num_layers * config.r + len(config.enc_cross_attention) * config.chunk_size)
        * 4
        * config.encoder_width
    )


def training_flops(config: ModelConfig, num_tokens: int, num_neighbor_tokens: int) -> float:
    """Forward and backward: three times the forward."""
    return 3 * forward_flops(config, num_tokens, num_neighbor_tokens)


def token_flops(config: ModelConfig) -> dict[str, float]:
    """Of one token of a full sequence, whose chunks all have k whole neighbors: `training`, `inference`, `kept` (inference
    with neighbors that were encoded before, where the model lets them be kept) and `plain` (inference, retrieval off).
    """
    n = config.encoder_seq_length
    W = n // config.chunk_size * config.num_neighbors * config.r if config.num_reading_layers else 0
    found = {"training": training_flops(config, n, W), "inference": inference_flops(config, n, W, kept=False)}
    if config.encodes_alone:
        found["kept"] = inference_flops(config, n, W, kept=True)
    found["plain"] = inference_flops(config, n, 0, kept=False)
    return {name: flops / n for name, flops in found.items()}


def describe_flops(flops: dict[str, float]) -> str:
    """`token_flops` to read."""
    shown = [f"training {flops['training'] / 1e6:,.1f} M", f"inference {flops['inference'] / 1e6:,.1f} M"]
    if flops["inference"] != flops["plain"]:
        shown[1] += f" ({flops['inference'] / flops['plain']:.2f} x retrieval off)"
    if "kept" in flops:
        shown.append(f"with kept encodings {flops['kept'] / 1e6:,.1f} M ({flops['kept'] / flops['plain']:.2f} x)")
    return ", ".join(shown)


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """A second's products of `dtype`, once measured in a process: the datasheet's rate of bf16 and fp16 on an H100, else the
    best of matmuls that grow while they are quick (fp32 on a CPU by the library in use).
    """
    is_gpu = device.type == "cuda"
    if is_gpu and "H100" in torch.cuda.get_device_name(device) and dtype in (torch.bfloat16, torch.float16):
        return H100_FLOPS
    own = torch.Generator(device).manual_seed(0)  # nothing is taken from the run's random numbers
    best = 0.0
    for size in GPU_SIZES if is_gpu else CPU_SIZES:
        a = torch.rand(size, size, device=device, generator=own).to(dtype)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            ops.product(a, a)
            if is_gpu:
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        best = max(best, 2 * size**3 / min(times))
        if min(times) > LONG_S:
            break
    return best
