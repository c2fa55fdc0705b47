"""FLOPs of a step, from the configuration, and of a device: MFU is the share of the second that the first is.

Letters: n sequence length, m chunk length, r tokens per neighbor, k neighbors, d width, c encoder width.
"""

import functools
import time

import torch

from retro_engine.config import ModelConfig

H100_FLOPS = 989e12  # a second, dense bf16 (NVIDIA H100 SXM datasheet)


def forward_flops(config: ModelConfig, num_tokens: int, num_neighbor_tokens: int) -> float:
    """Multiply-adds x 2 of a forward over `num_tokens` decoder tokens and `num_neighbor_tokens` valid neighbor
    tokens. Padding is not counted; norms, activations and softmax are left out, as is usual.
    """
    d, c = config.hidden_size, config.encoder_width
    share = config.key_value_heads / config.num_attention_heads
    ffn_matrices = 3 if config.activation == "swiglu" else 2
    layer = 4 * d * d * (1 + share) + 2 * ffn_matrices * d * config.ffn_hidden_size
    per_token = config.dec_num_layers * layer + 2 * d * config.vocab_size
    cores = attention_flops(config, num_tokens, num_neighbor_tokens)
    if num_neighbor_tokens == 0:
        return num_tokens * per_token + cores
    if config.reads_prefix:  # through the decoder's layers alone
        return num_tokens * per_token + num_neighbor_tokens * config.dec_num_layers * layer + cores
    encoder_share = config.encoder_key_value_heads / config.encoder_heads
    crossing, encoder_crossing = len(config.cross_layers), len(config.enc_cross_attention)
    per_token += crossing * 4 * d * d + encoder_crossing * 4 * d * c * encoder_share
    encoder_layer = 4 * c * c * (1 + encoder_share) + 2 * ffn_matrices * c * config.encoder_ffn_width
    per_neighbor_token = config.enc_num_layers * encoder_layer + encoder_crossing * 4 * c * c
    per_neighbor_token += crossing * 4 * c * d * share + (2 * d * c if c != d else 0)  # keys and values; the input
    return num_tokens * per_token + num_neighbor_tokens * per_neighbor_token + cores


def attention_flops(config: ModelConfig, num_tokens: int, num_neighbor_tokens: int) -> float:
    """The share of `forward_flops` that is scores and weighted values, m queries over each key of a neighbor."""
    d, c, m = config.hidden_size, config.encoder_width, config.chunk_size
    per_neighbor_token = config.enc_num_layers * 4 * config.r * c + len(config.enc_cross_attention) * 4 * m * c
    per_neighbor_token += len(config.cross_layers) * 4 * m * d
    if config.reads_prefix:
        per_neighbor_token = config.dec_num_layers * (2 * config.r + 4 * m) * d
    per_token = config.dec_num_layers * 2 * config.encoder_seq_length * d
    return num_tokens * per_token + num_neighbor_tokens * per_neighbor_token


def training_flops(config: ModelConfig, num_tokens: int, num_neighbor_tokens: int) -> float:
    """Forward and backward: three times the forward."""
    return 3 * forward_flops(config, num_tokens, num_neighbor_tokens)


@functools.cache
def peak_flops(device: torch.device) -> float:
    """A second's, once measured in a process: the datasheet's bf16 rate on an H100, a matmul elsewhere (bf16 on another
    GPU, fp32 of 2048^3 on a CPU: a bf16 run there can pass 1).
    """
    is_gpu = device.type == "cuda"
    if is_gpu and "H100" in torch.cuda.get_device_name(device):
        return H100_FLOPS
    size = 8192 if is_gpu else 2048
    own = torch.Generator(device).manual_seed(0)  # nothing is taken from the run's random numbers
    a = torch.rand(size, size, device=device, dtype=torch.bfloat16 if is_gpu else torch.float32, generator=own)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        if is_gpu:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)
