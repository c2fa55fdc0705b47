"""A copying circuit for a decoder that is given: encoder, keys and values by construction, queries by least squares.

What `initialization.retrieval_ready` builds where embeddings are free, is fitted here to those of a trained decoder, and
changes nothing that it computes: the output of chunked cross-attention stays 0, only what training has to find behind it
is there. docs/retrieval-ready.md has the derivation and the measurements.
Letters: B sequences, N tokens, L neighbors, R tokens per neighbor, D width, G key/value heads, E head width, S code width.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from retro_engine.config import ModelConfig
from retro_engine.model.attention import SelfAttention
from retro_engine.model.initialization import ROTARY_PAIRS
from retro_engine.model.retro import RetroModel

PEAK_LOGIT = 40.0  # of a head that looks one token back or ahead: given rotary frequencies may be slow
NEIGHBOR_GAIN = 0.3  # of the codes of the tokens beside a token, against its own embedding
MATCH_LOGITS = (10.0, 20.0)  # of a token at itself, in the heads of a group in turn
RIDGE = 0.01  # of the mean square of the decoder's states


def unmet(c: ModelConfig) -> str | None:
    """The first condition that `c` breaks; None = cross-attention can be fitted."""
    pairs = int(c.encoder_width // c.encoder_heads * c.rotary_percentage) // 2
    for holds, rule in (
        (c.encoder_width == c.hidden_size, "the encoder is as wide as the decoder"),
        (c.enc_num_layers > 0, "there is an encoder layer"),
        (_code_blocks(c) > 0, "the encoder has at least three heads"),
        (
            _code_blocks(c) * c.encoder_width // c.encoder_heads >= c.head_width,
            "an encoder head is as wide as a decoder's",
        ),
        (c.encoder_position_embedding == "rope" and not c.rotary_interleaved, "the encoder has half-split RoPE"),
        (pairs >= ROTARY_PAIRS, f"an encoder head has at least {2 * ROTARY_PAIRS} rotary dimensions"),
        (c.cca_position_embedding == "none", "chunked cross-attention matches tokens wherever they stand"),
        (c.encoder_seq_length >= c.r, "a training sequence is as long as a neighbor"),
    ):
        if not holds:
            return rule
    return None


@torch.no_grad()
def fit_cross_attention(model: RetroModel, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Overwrite encoder and cross-attention, their outputs apart. `batches`: tokens and document ids [b, n] each.

    1. The first encoder layer's heads look one token back or ahead and write codes of what they see (whitened
       embeddings, randomly projected) into the two thirds of the space where embeddings vary least.
    2. Keys are a token's own code and its predecessor's; values the code of its successor.
    3. In each cross-attending layer the query of a token is fitted so that it is the key which the same token has in
       an encoded neighbor of the same text; a token then reads what followed it there.
    """
    c = model.config
    read, encoder = model.neighbor_projection, model.encoder
    assert read is not None and encoder is not None
    generator = torch.Generator().manual_seed(0)
    keys_GED, values_GED = _build(model, generator)
    for k, v in zip(read.k, read.v):
        k.weight.copy_(keys_GED.flatten(0, 1))
        v.weight.copy_(values_GED.flatten(0, 1))
    D, G, E, device = c.hidden_size, c.key_value_heads, c.head_width, keys_GED.device
    squares = {layer: torch.zeros(D, D, device=device) for layer in c.cross_layers}  # of states
    products = {layer: torch.zeros(D, G, E, device=device) for layer in c.cross_layers}  # of states and keys
    moments = torch.zeros(G, E, E, device=device)  # of keys
    count = 0
    for tokens, documents in batches:
        keys, is_inside = _keys_of_itself(model, tokens, documents)
        count += len(keys)
        moments += torch.einsum("nge,ngf->gef", keys, keys)
        for layer, state in _states(model, tokens, documents).items():
            squares[layer] += state[is_inside].T @ state[is_inside]
            products[layer] += torch.einsum("nd,nge->dge", state[is_inside], keys)
    whiten = _inverse_root(moments / max(1, count))  # [g, e, e]: every direction of a key counts alike
    for k in read.k:
        k.weight.copy_(torch.einsum("gef,gfd->ged", whiten, k.weight.unflatten(0, (G, E))).flatten(0, 1))
    heads = c.num_attention_heads // G
    for layer, square in squares.items():
        ridge = RIDGE * square.diagonal().mean() * torch.eye(D, device=device)
        wanted = torch.einsum("dge,gef->dgf", products[layer], whiten)
        fitted = torch.linalg.solve(square + ridge, wanted.flatten(1)).unflatten(1, (G, E))
        cross = model.layers[layer].cross
        matches = (fitted * wanted).sum((0, 2)) * cross.scale / max(1, count)  # mean logit of a token at itself
        for head in range(c.num_attention_heads):
            group, place = divmod(head, heads)
            if heads == 1 or place < heads - 1:  # with grouped queries one head of each group stays free
                gain = MATCH_LOGITS[place % len(MATCH_LOGITS)] / matches[group].clamp(min=1e-6)
                cross.q.weight[head * E : (head + 1) * E] = fitted[:, group].T * gain


def _code_blocks(c: ModelConfig) -> int:
    """Head widths of a code: there must be room for a token's own, the one before and the one after it."""
    per_group = c.encoder_heads // c.encoder_key_value_heads
    available = c.encoder_key_value_heads if per_group > 1 else c.encoder_heads // 2
    return min(available, c.encoder_heads // 3)


def _build(model: RetroModel, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Write the encoder; return the weights [g, e, d] that make keys and values of what it encodes."""
    c = model.config
    assert model.encoder is not None
    first = model.encoder.layers[0]
    attention, width, D = first.attention, first.attention.head_width, c.hidden_size
    embedded = model.embedding.weight * c.input_scale
    normed = first.attention_norm(embedded)
    values, vectors = torch.linalg.eigh(normed.T @ normed / len(normed))
    white = vectors * values.clamp(min=1e-3).rsqrt() @ vectors.T
    blocks = _code_blocks(c)
    S = blocks * width
    quiet, loud = vectors.T[: 2 * S], vectors.T[2 * S :]  # where embeddings vary least, and the rest
    back, ahead = quiet[0::2], quiet[1::2]  # [s, d] orthonormal: where the codes beside a token are written
    code = _orthonormal(D, S, generator).to(white).T @ white  # [s, d]
    for layer in model.encoder.layers:
        layer.attention.out.weight.zero_()
        layer.ffn.down.weight.zero_()
        if layer.is_crossing:
            layer.cross.out.weight.zero_()
    constant = white @ white @ normed.mean(0)  # the direction along which normed embeddings are most alike
    constant /= (normed @ constant).mean()
    per_group = c.encoder_heads // c.encoder_key_value_heads
    for block in range(blocks):
        head = block * per_group if per_group > 1 else 2 * block
        rows = slice(block * width, (block + 1) * width)
        for place, (offset, written) in enumerate(((-1, back), (1, ahead))):
            _look_at(attention, c, head + place, offset, constant)
            of = (head + place) // per_group * width
            attention.v.weight[of : of + width] = code[rows]
            columns = slice((head + place) * width, (head + place + 1) * width)
            attention.out.weight[:, columns] = NEIGHBOR_GAIN * written[rows].T
    own = embedded @ loud.T
    own_values, own_vectors = torch.linalg.eigh(own.T @ own / len(own))
    own_code = (own_vectors * own_values.clamp(min=1e-6 * float(own_values.max())).rsqrt()).T @ loud  # [d - 2s, d]
    keys, read = [], []
    for group in range(c.key_value_heads):
        mix, before = (
            _orthonormal(max(n, c.head_width), c.head_width, generator)[:n].to(white) for n in (len(own_code), S)
        )
        keys.append(mix.T @ own_code + before.T @ back / NEIGHBOR_GAIN)
        after = ahead.roll(-group * c.head_width, 0)[: c.head_width]
        read.append(after / NEIGHBOR_GAIN)
    return torch.stack(keys), torch.stack(read)


def _look_at(attention: SelfAttention, c: ModelConfig, head: int, offset: int, constant_D: Tensor) -> None:
    """Make an encoder head attend to the token at `offset`: `initialization`'s construction, with the embeddings'
    constant direction where it has biases."""
    width = attention.head_width
    pairs = int(width * c.rotary_percentage) // 2
    frequency = c.rotary_base ** (-torch.arange(ROTARY_PAIRS, device=constant_D.device) / pairs)
    amplitude = math.sqrt(PEAK_LOGIT / attention.scale / ROTARY_PAIRS)
    group = head // (c.encoder_heads // c.encoder_key_value_heads)
    q, k = (
        attention.q.weight[head * width : (head + 1) * width],
        attention.k.weight[group * width : (group + 1) * width],
    )
    q.zero_()
    k.zero_()
    k[:ROTARY_PAIRS] = amplitude * constant_D
    q[:ROTARY_PAIRS] = (amplitude * torch.cos(offset * frequency))[:, None] * constant_D
    q[pairs : pairs + ROTARY_PAIRS] = (amplitude * torch.sin(offset * frequency))[:, None] * constant_D


def _states(model: RetroModel, tokens: Tensor, documents: Tensor) -> dict[int, Tensor]:
    """What the cross-attention of each layer makes its queries of, [b, n, d], while it adds nothing itself."""
    states: dict[int, Tensor] = {}

    def keep(layer: int) -> torch.utils.hooks.RemovableHandle:
        def hook(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            states[layer] = model.layers[layer].cross_norm(inputs[0]).float()

        return model.layers[layer].ffn_norm.register_forward_pre_hook(hook)

    handles = [keep(layer) for layer in model.config.cross_layers]
    try:
        model.hidden(tokens, None, None, documents)
    finally:
        for handle in handles:
            handle.remove()
    return states


def _keys_of_itself(model: RetroModel, tokens: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [t, g, e] of tokens that are encoded as a neighbor, and which tokens [b, n] they are: not a neighbor's or a
    document's first, which has no predecessor there."""
    c = model.config
    B, N = tokens.shape
    L, R = N // c.r, c.r
    neighbors = tokens[:, : L * R].reshape(B, L, 1, R)
    hidden = torch.zeros(B, L, c.chunk_size, c.hidden_size, device=tokens.device)
    pairs = model.encode_neighbors(hidden, None, neighbors, None)
    is_inside = torch.zeros_like(tokens, dtype=torch.bool)
    is_inside[:, : L * R] = (torch.arange(L * R, device=tokens.device) % R) > 0
    is_inside &= (documents >= 0) & (documents == documents.roll(1, 1))
    keys = pairs[0][0].float().reshape(B, L * R, c.key_value_heads, c.head_width)
    return keys[is_inside[:, : L * R]], is_inside


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator))[0]


def _inverse_root(moments_GEE: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moments_GEE)
    scaled = values.clamp(min=1e-4 * values.amax(-1, keepdim=True) + 1e-12).rsqrt()
    return vectors * scaled[:, None] @ vectors.mT
