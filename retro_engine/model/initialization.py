"""Initial weights: `standard` (normal) and `retrieval_ready` (a copying circuit that is there at step 0).

A decoder that reads from neighbors needs an induction circuit: find the current token in the neighbor, read
what follows it, write that to the output. `retrieval_ready` builds it in: positional heads made by q and k
biases alone, W_k = W_q (a token matches itself) and W_o = W_v' (what is read is written back) in
cross-attention. docs/retrieval-ready.md has the derivation and the measurements.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from retro_engine.config import ModelConfig, base_config
from retro_engine.model.attention import NeighborProjection, SelfAttention
from retro_engine.model.decoder import DecoderLayer
from retro_engine.model.encoder import Encoder
from retro_engine.model.linear import BlockLinear, Int8Linear, Linear

ROTARY_PAIRS = 6  # the fastest rotary pairs carry the positional heads
PEAK_LOGIT = 8.0  # attention logit of a positional head at its offset
EMBEDDING_STD = 0.06
COPY_GAIN = 0.7


class Network(Protocol):
    """What of a `RetroModel` has weights: retro.py, which begins with them, is not imported here."""

    config: ModelConfig
    embedding: nn.Embedding
    position_embedding: nn.Embedding | None
    layers: Sequence[DecoderLayer]
    encoder: Encoder | None
    neighbor_projection: NeighborProjection | None
    encoder_input: Linear | None
    head: Linear | Int8Linear | BlockLinear | None

    def __init__(self, config: ModelConfig) -> None: ...
    def modules(self) -> Iterator[nn.Module]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


def initialize(model: Network, generator: torch.Generator | None = None) -> None:
    """Overwrite every parameter of `model` as `model.config.init` says."""
    config = model.config
    with torch.no_grad():
        _normal(model, config, generator)
        if config.init == "retrieval_ready":
            _retrieval_ready(model, config, generator)


def _normal(model: Network, config: ModelConfig, generator: torch.Generator | None) -> None:
    """N(0, std) everywhere, residual outputs divided by sqrt(2 x layers); biases 0, norms 1. With muP hidden matrices
    have std / sqrt(w).

    With `retrieval_ready` biases outside the circuit stay torch's, uniform in +-1/sqrt(fan_in), as in what docs/ measured.

    std is `init_method_std`, or 1/sqrt(fan_in) with `retrieval_ready`, whose circuit needs W_v W_v' near identity.
    """

    width_of = width_multipliers(model)
    multipliers = {id(parameter): width_of[name] for name, parameter in model.named_parameters() if name in width_of}

    def fill(weight: Tensor, gain: float = 1.0) -> None:
        std = weight.shape[1] ** -0.5 if config.init == "retrieval_ready" else config.init_method_std
        std /= math.sqrt(multipliers.get(id(weight), 1.0))
        nn.init.normal_(weight, std=std * gain, generator=generator)

    if config.init == "standard":
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
    std = EMBEDDING_STD if config.init == "retrieval_ready" else config.init_method_std
    nn.init.normal_(model.embedding.weight, std=std, generator=generator)
    if model.position_embedding is not None:
        nn.init.normal_(model.position_embedding.weight, std=std, generator=generator)
    if model.head is not None:
        nn.init.normal_(model.head.weight, std=std, generator=generator)
    if model.encoder_input is not None:
        fill(model.encoder_input.weight)
    layers: list[tuple[nn.Module, int]] = [(layer, config.dec_num_layers) for layer in model.layers]
    if model.encoder is not None:
        layers += [(layer, config.enc_num_layers) for layer in model.encoder.layers]
    for layer, depth in layers:
        residual_gain = 1 / math.sqrt(2 * (config.dec_num_layers if config.init == "retrieval_ready" else depth))
        for name, linear in layer.named_modules():
            if not isinstance(linear, nn.Linear):
                continue
            if name == "cross.out" and isinstance(layer, DecoderLayer):  # its keys and values lie elsewhere
                assert model.neighbor_projection is not None
                place = config.cross_layers.index(layer.index)
                fill(model.neighbor_projection.k[place].weight)
                fill(model.neighbor_projection.v[place].weight)
            fill(linear.weight, residual_gain if name.endswith(("out", "down")) else 1.0)


def width_multipliers(model: Network) -> dict[str, float]:
    """w = fan_in / fan_in_base of every hidden matrix, by its name; empty without muP.

    Embeddings, norms, biases and the output head are not among them: their width-dependence is not of a matrix from one
    hidden width to another (arXiv 2203.03466 table 8).
    """
    if not model.config.mup:
        return {}
    config = base_config(model.config)
    with torch.device("meta"):
        fan_in = {name: parameter.shape[-1] for name, parameter in type(model)(config).named_parameters()}
    fan_in.setdefault("encoder_input.weight", config.hidden_size)  # not there where both base widths are the same
    hidden = {name: parameter for name, parameter in model.named_parameters() if is_hidden_matrix(name, parameter)}
    return {name: parameter.shape[1] / fan_in[name] for name, parameter in hidden.items()}


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """A matrix between two hidden widths: neither an embedding nor the output head."""
    return parameter.dim() == 2 and "embedding" not in name and not name.startswith("head.")


def _retrieval_ready(model: Network, config: ModelConfig, generator: torch.Generator | None) -> None:
    first = config.cross_layers[0] if config.cross_layers else min(1, config.dec_num_layers - 1)
    for layer in model.layers[: first + 1]:
        _positional_head(layer.attention, config, head=0, offset=-1)
    nn.init.normal_(model.layers[0].attention.out.weight, std=COPY_GAIN * config.hidden_size**-0.5, generator=generator)
    for place, index in enumerate(config.cross_layers):
        cross, read = model.layers[index].cross, model.neighbor_projection
        assert read is not None
        read.k[place].weight.copy_(cross.q.weight)
        cross.out.weight.copy_(COPY_GAIN * read.v[place].weight.T)
    if model.encoder is not None:
        attention = model.encoder.layers[0].attention
        _positional_head(attention, config, head=0, offset=-1)
        _positional_head(attention, config, head=1, offset=1)
        attention.out.weight.copy_(attention.v.weight.T)


def _positional_head(attention: SelfAttention, config: ModelConfig, head: int, offset: int) -> None:
    """Make `head` attend to the token at `offset` whatever it is.

    With b_k = a (1, 0) and b_q = a (cos(offset w), sin(offset w)) on each of the fastest pairs, RoPE turns their
    product into a^2 cos((key - query - offset) w): a peak of PEAK_LOGIT at the offset.
    """
    width = attention.head_width
    pairs = int(width * config.rotary_percentage) // 2
    frequency = config.rotary_base ** (-torch.arange(pairs) / pairs)
    amplitude = torch.zeros(pairs)
    amplitude[:ROTARY_PAIRS] = math.sqrt(PEAK_LOGIT * math.sqrt(width) / ROTARY_PAIRS)
    assert attention.q.bias is not None and attention.k.bias is not None, "retrieval_ready needs q and k biases"
    start = head * width
    attention.q.bias[start : start + pairs] = (amplitude * torch.cos(offset * frequency)).to(attention.q.bias)
    attention.q.bias[start + pairs : start + 2 * pairs] = (amplitude * torch.sin(offset * frequency)).to(
        attention.q.bias
    )
    attention.k.bias[start : start + pairs] = amplitude.to(attention.k.bias)
    for linear in (attention.q, attention.k):
        linear.weight[start : start + width] *= 0.3
