"""Plain PyTorch twins of every op: the fallback on any device and the oracle of the fast backends.

Shape letters: B batch, N tokens, M chunk length, L chunks, K neighbors, R tokens per neighbor, H query
heads, G key/value heads, E head width, P rotated pairs. Half-precision inputs are rotated in fp32.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from retro_kernels.blocks import TYPES as BLOCK_TYPES
from retro_kernels.blocks import dequantize, rounded
from retro_kernels.checks import is_transformed
from retro_kernels.dropout import factors
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def rope(
    x_BNHE: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, interleaved: bool = False
) -> Tensor:
    """Rotate the first 2P features of every head by its token's angle (RoPE, arXiv 2104.09864 eq. 34)."""
    if positions is None:
        cos, sin = cos[: x_BNHE.shape[1]], sin[: x_BNHE.shape[1]]
    else:
        cos, sin = cos[positions], sin[positions]
    cos, sin = cos.detach().unsqueeze(-2), sin.detach().unsqueeze(-2)  # [n, 1, P] or [b, n, 1, P]
    compute = torch.float32 if x_BNHE.dtype in (torch.float16, torch.bfloat16) else x_BNHE.dtype
    cos, sin = cos.to(compute), sin.to(compute)
    P = cos.shape[-1]
    rotated, rest = x_BNHE[..., : 2 * P].to(compute), x_BNHE[..., 2 * P :]
    if interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    else:
        first, second = rotated[..., :P], rotated[..., P:]
    first, second = first * cos - second * sin, second * cos + first * sin
    out = torch.stack((first, second), -1).flatten(-2) if interleaved else torch.cat((first, second), -1)
    out = out.to(x_BNHE.dtype)
    return torch.cat((out, rest), -1) if rest.shape[-1] else out


def attention(
    q_BNHE: Tensor,
    k_BSGE: Tensor,
    v_BSGE: Tensor,
    is_causal: bool,
    first_keys: Tensor | None,
    key_begins: Tensor | None,
    key_ends: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    query_offset: int,
    query_period: int,
    scale: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Softmax attention over each query's range of keys; exactly 0 where it is empty, whatever the values hold."""
    query, key = (
        torch.arange(q_BNHE.shape[1], device=q_BNHE.device),
        torch.arange(k_BSGE.shape[1], device=q_BNHE.device),
    )
    q_BNHE, k_BSGE = _rotated(q_BNHE, k_BSGE, cos, sin, query_offset + query % query_period)
    seen = _seen(query, key, is_causal, first_keys, key_begins, key_ends)
    any_seen = None
    if key_begins is not None or key_ends is not None or first_keys is not None:
        assert seen is not None
        any_seen = seen.any(-1, keepdim=True)
        k_BSGE, v_BSGE = (x.masked_fill(~seen.any(1)[:, :, None, None], 0) for x in (k_BSGE, v_BSGE))
        seen = seen | ~any_seen
    mask = None if seen is None else seen[:, None]
    is_plain = is_causal and seen is None
    if seed is None or not dropout:
        out = masked_attention(q_BNHE, k_BSGE, v_BSGE, mask, is_plain, 0.0, scale)
    else:
        mask = key <= query[:, None] if is_plain else mask
        kept = factors(dropout, seed, q_BNHE.shape[0], q_BNHE.shape[2], query, key)
        out = _attention_with_dropout(q_BNHE, k_BSGE, v_BSGE, mask, scale, kept)
    return out if any_seen is None else torch.where(any_seen[..., None], out, 0)


def _rotated(
    q: Tensor, k: Tensor, cos: Tensor | None, sin: Tensor | None, positions_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Queries at these positions, keys at 0, 1 ...; as they are where there are no tables."""
    if cos is None or sin is None:
        return q, k
    return rope(q, cos, sin, positions_N), rope(k, cos, sin)


def _seen(
    query_N: Tensor,
    key_S: Tensor,
    is_causal: bool,
    first_keys: Tensor | None,
    key_begins: Tensor | None,
    key_ends: Tensor | None,
) -> Tensor | None:
    """[b or 1, n or 1, s]: which keys each query sees; None = all, or causal of as many keys as queries."""
    seen, behind = None, len(key_S) - len(query_N)
    if first_keys is not None:
        seen = key_S >= first_keys[:, :, None]
    for bound, is_begin in ((key_begins, True), (key_ends, False)):
        if bound is not None:
            inside = key_S >= bound[:, None, None] if is_begin else key_S < bound[:, None, None]
            seen = inside if seen is None else seen & inside
    if is_causal and seen is not None:
        seen = seen & (key_S <= query_N[:, None] + behind)
    elif is_causal and behind:
        seen = (key_S <= query_N[:, None] + behind)[None]
    return seen


def log_sum_exp(
    q_BNHE: Tensor,
    k_BSGE: Tensor,
    is_causal: bool,
    first_keys: Tensor | None,
    key_begins: Tensor | None,
    key_ends: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    query_offset: int,
    query_period: int,
    scale: float,
) -> Tensor:
    """Of each query's scores in `attention` [b, h, n], in fp32 (float64 of float64); +inf where nothing is attended."""
    query, key = (
        torch.arange(q_BNHE.shape[1], device=q_BNHE.device),
        torch.arange(k_BSGE.shape[1], device=q_BNHE.device),
    )
    q_BNHE, k_BSGE = _rotated(q_BNHE, k_BSGE, cos, sin, query_offset + query % query_period)
    seen = _seen(query, key, is_causal, first_keys, key_begins, key_ends)
    if seen is None and is_causal:
        seen = (key <= query[:, None])[None]
    k_BSHE = k_BSGE.repeat_interleave(q_BNHE.shape[2] // k_BSGE.shape[2], 2)
    wide = torch.promote_types(q_BNHE.dtype, torch.float32)
    scores = torch.einsum("bnhe,bshe->bhns", q_BNHE.to(wide), k_BSHE.to(wide)) * scale
    if seen is not None:
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
    lse = scores.logsumexp(-1)
    return torch.where(lse == -torch.inf, torch.inf, lse)


def masked_attention(
    q_BNHE: Tensor,
    k_BSGE: Tensor,
    v_BSGE: Tensor,
    mask: Tensor | None,
    is_causal: bool = False,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """softmax(q k' scale) v; mask True = attend, broadcastable to [b, h, n, s]; 0 where a query attends nothing."""

    def attend() -> Tensor:
        return F.scaled_dot_product_attention(
            q_BNHE.transpose(1, 2),
            k_BSGE.transpose(1, 2),
            v_BSGE.transpose(1, 2),
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=q_BNHE.shape[2] != k_BSGE.shape[2],
        ).transpose(1, 2)

    if q_BNHE.dtype != torch.float64 and not is_transformed(q_BNHE, k_BSGE, v_BSGE):
        return attend()
    with sdpa_kernel(SDPBackend.MATH):  # the fused ones have gradients of the first order alone; float64 is for checks
        return attend()


def _attention_with_dropout(
    q_BNHE: Tensor, k_BSGE: Tensor, v_BSGE: Tensor, mask: Tensor | None, scale: float, kept_BHNS: Tensor
) -> Tensor:
    """As `masked_attention`, each weight times `kept`; sums in float32 or wider."""
    wide = torch.promote_types(q_BNHE.dtype, torch.float32)
    k, v = (x.to(wide).repeat_interleave(q_BNHE.shape[2] // x.shape[2], 2) for x in (k_BSGE, v_BSGE))
    scores = torch.einsum("bnhe,bshe->bhns", q_BNHE.to(wide), k) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1) * kept_BHNS
    return torch.einsum("bhns,bshe->bnhe", weights, v).to(q_BNHE.dtype)


def gradients(function: Callable[..., Tensor], grad_o: Tensor, *tensors: Tensor) -> list[Tensor | None]:
    """Of function(*tensors), to be differentiated further."""
    inputs = [x.view_as(x) for x in tensors]  # one may have been made of another: only what `function` does counts
    wanted = [x for x in inputs if x.requires_grad]
    with sdpa_kernel(SDPBackend.MATH):
        found = iter(torch.autograd.grad(function(*inputs), wanted, grad_o, create_graph=True, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in tensors]


def chunked_cross_attention(
    q_BNHE: Tensor,
    k_BLKRGE: Tensor,
    v_BLKRGE: Tensor,
    neighbor_lengths: Tensor | None,
    chunk_length: int,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float | None,
    query_offset: int,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """RETRO (arXiv 2112.04426) section 2.4: tokens um+m-1 ... um+2m-2 attend chunk u's neighbors."""
    B, N, H, E = q_BNHE.shape
    _, L, K, R, G, _ = k_BLKRGE.shape
    M = chunk_length
    if L == 0 or N < M or K * R == 0:
        return q_BNHE.masked_fill(torch.ones((), dtype=torch.bool, device=q_BNHE.device), 0)
    attending = q_BNHE[:, M - 1 : M - 1 + L * M]  # the last chunk's queries end with the sequence
    tail = L * M - attending.shape[1]
    q = F.pad(attending, (0, 0, 0, 0, 0, tail)).reshape(B * L, M, H, E)
    k = k_BLKRGE.reshape(B * L * K, R, G, E)
    v = v_BLKRGE.reshape(B * L * K, R, G, E)
    mask = any_valid = None
    if neighbor_lengths is not None:
        valid = torch.arange(R, device=q.device) < neighbor_lengths.reshape(-1, 1)  # [BLK, R]
        k = k.masked_fill(~valid[:, :, None, None], 0)  # NaN in the padding must not reach the scores
        v = v.masked_fill(~valid[:, :, None, None], 0)
        valid = valid.reshape(B * L, K * R)
        any_valid = valid.any(-1)
        mask = (valid | ~any_valid[:, None])[:, None, None, :]
    if cos is not None and sin is not None:
        q = rope(q, cos, sin, torch.arange(query_offset, query_offset + M, device=q.device))
        k = rope(k, cos, sin)
    k, v = k.reshape(B * L, K * R, G, E), v.reshape(B * L, K * R, G, E)
    if seed is None or not dropout:
        out = masked_attention(q, k, v, mask, scale=scale)
    else:
        scale = E**-0.5 if scale is None else scale
        tokens, keys = (torch.arange(n, device=q.device) for n in (L * M, K * R))
        kept = factors(dropout, seed, B, H, tokens + M - 1, keys).unflatten(2, (L, M)).transpose(1, 2).flatten(0, 1)
        out = _attention_with_dropout(q, k, v, mask, scale, kept)
    if any_valid is not None:
        out = torch.where(any_valid[:, None, None, None], out, 0)
    out = out.reshape(B, L * M, H, E)[:, : L * M - tail]
    return F.pad(out, (0, 0, 0, 0, M - 1, N - (M - 1) - (L * M - tail)))


def chunked_log_sum_exp(
    q_BNHE: Tensor,
    k_BLKRGE: Tensor,
    neighbor_lengths: Tensor | None,
    chunk_length: int,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    query_offset: int,
) -> Tensor:
    """log sum exp of each token's scores [b, h, n] in fp32 (float64 of float64); +inf where nothing is attended."""
    B, N, H, _ = q_BNHE.shape
    wide = torch.promote_types(q_BNHE.dtype, torch.float32)
    _, L, K, R, G, _ = k_BLKRGE.shape
    M = chunk_length
    out = torch.full((B, H, N), float("inf"), dtype=wide, device=q_BNHE.device)
    for u in range(L):
        tokens = torch.arange(u * M + M - 1, min(u * M + 2 * M - 1, N), device=q_BNHE.device)
        q, k = q_BNHE[:, tokens], k_BLKRGE[:, u].reshape(B * K, R, G, -1)
        if cos is not None and sin is not None:
            q = rope(q, cos, sin, query_offset + tokens - tokens[0])
            k = rope(k, cos, sin)
        k = k.reshape(B, K * R, G, -1).repeat_interleave(H // G, 2)
        scores = torch.einsum("bnhe,bshe->bhns", q.to(wide), k.to(wide)) * scale
        if neighbor_lengths is not None:
            valid = torch.arange(R, device=q.device) < neighbor_lengths[:, u, :, None]
            scores = scores.masked_fill(~valid.reshape(B, 1, 1, K * R), -float("inf"))
        lse = scores.logsumexp(-1)
        out[:, :, tokens] = torch.where(lse == -float("inf"), float("inf"), lse)
    return out


def gather_neighbors(
    table: Tensor, document: Tensor, row_lengths: Tensor, ids: Tensor, retrieved_length: int, pad_id: int
) -> tuple[Tensor, Tensor]:
    """Rows `ids` and the rows that follow in the same document, r tokens each; -1 gives length 0."""
    ids = ids.long()
    rows, M = table.shape
    is_unsigned = table.dtype == torch.uint16
    if is_unsigned:  # torch indexes signed types only
        table = table.view(torch.int16)
    span = -(-retrieved_length // M)
    row = ids.unsqueeze(-1) + torch.arange(span, device=ids.device)  # [..., span]
    is_missing = ids.unsqueeze(-1) < 0
    inside = (row < rows) & ~is_missing
    row = torch.where(inside, row, 0)
    if rows == 0:
        shape = (*ids.shape, retrieved_length)
        dtype = torch.int64 if is_unsigned else table.dtype
        return table.new_full(shape, pad_id, dtype=dtype), ids.new_zeros(ids.shape)
    inside = inside & (document[row] == document[row[..., :1]])
    lengths = torch.where(inside, row_lengths[row].to(ids.dtype).clamp(0, M), 0)
    # a continuation counts only while every row before it is full
    is_full = (lengths == M).to(ids.dtype).cumprod(-1)
    lengths = torch.where(F.pad(is_full[..., :-1], (1, 0), value=1) > 0, lengths, 0)
    tokens = (table[row].long() & 0xFFFF if is_unsigned else table[row]).reshape(*ids.shape, span * M)[
        ..., :retrieved_length
    ]
    total = lengths.sum(-1).clamp(max=retrieved_length)
    is_token = torch.arange(retrieved_length, device=ids.device) < total.unsqueeze(-1)
    return torch.where(is_token, tokens, pad_id), total


def cross_entropy_(logits_TV: Tensor, labels_T: Tensor, has_gradient: bool) -> Tensor:
    """-log softmax(logits)[label] [t]; with `has_gradient` the gradient of their sum takes the logits' place."""
    values = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    normalizer, labels = values.logsumexp(-1, keepdim=True), labels_T[:, None]
    normalizer = torch.where(normalizer.isinf(), torch.nan, normalizer)  # as log_softmax has it: inf - inf
    losses = (normalizer - values.gather(-1, labels))[:, 0]
    if has_gradient:
        probability = values.sub_(normalizer).exp_()
        logits_TV.copy_(probability.scatter_add_(-1, labels, -torch.ones_like(probability[:, :1])))
    return losses


@dataclass(frozen=True)
class Matrix:
    """A linear layer: y = x (scale * weight)' + bias. weight [o, d]; int8 ones have a float32 scale [o].

    `blocks`: weight is uint8 [o, x], each row's blocks of this type (kernels/blocks.py), and `inputs` is d.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None
    blocks: str | None = None
    inputs: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """o, d. Raises ValueError for a row that is not the blocks of d."""
        outputs, width = self.weight.shape
        if self.blocks is None:
            return outputs, width
        kind = BLOCK_TYPES.get(self.blocks)
        is_whole = kind is not None and self.inputs and width == kind.row_bytes(self.inputs)
        if not is_whole or self.weight.dtype != torch.uint8:
            raise ValueError(
                f"weight {tuple(self.weight.shape)} of {self.weight.dtype}: expected uint8, {self.blocks} blocks of "
                f"{self.inputs} values in each row; the types are {', '.join(BLOCK_TYPES)}"
            )
        assert self.inputs is not None
        return outputs, self.inputs


@dataclass(frozen=True)
class Norm:
    """LayerNorm (arXiv 1607.06450), or RMSNorm (arXiv 1910.07467); weight and bias [d] or None."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    is_rms: bool


@dataclass(frozen=True)
class Attending:
    """What the one new token of each row reads. keys, values [b, s, g, e], with `rows` of any number of rows; int64 [b] where not
    said otherwise."""

    keys: Tensor
    values: Tensor
    scale: float
    begins: Tensor | None = None  # the first key; None = 0
    starts: Tensor | None = None  # where the new token is put, the last key; None = nothing is put, all keys are read
    valid: Tensor | None = None  # [b, s] bool
    positions: Tensor | None = None  # of the query (and the new key) in cos and sin
    cos: Tensor | None = None  # float32 [positions, rotary/2], or no rotation
    sin: Tensor | None = None
    interleaved: bool = False
    rows: Tensor | None = (
        None  # of keys and values; None = each its own. Several new tokens may be of one, at places of their own
    )

    @property
    def count(self) -> int:
        return len(self.keys if self.rows is None else self.rows)


@dataclass(frozen=True)
class SelfAttentionPart:
    """x + out(attention) for one new token a row, whose keys and values are written into the cache; attention is 0 in a row
    that has no valid key (its first key, or all that `valid` allows, behind the new token)."""

    norm: Norm
    q: Matrix
    k: Matrix
    v: Matrix
    out: Matrix
    attending: Attending


@dataclass(frozen=True)
class CrossAttentionPart:
    """x + out(attention over the neighbors' tokens); a row that has none gets 0, or with `adds_bias` out's bias."""

    norm: Norm
    q: Matrix
    out: Matrix
    attending: Attending
    adds_bias: bool = False


@dataclass(frozen=True)
class FeedForwardPart:
    """x + down(activation(up)), activation gelu or gelu_tanh; or with `gate` and swiglu x + down(silu(gate) * up)."""

    norm: Norm
    gate: Matrix | None
    up: Matrix
    down: Matrix
    activation: str


Part = SelfAttentionPart | CrossAttentionPart | FeedForwardPart


def linear(x: Tensor, matrix: Matrix) -> Tensor:
    """[..., d] -> [..., o]; weights in int8 and blocks are multiplied in fp32, blocks with rounded inputs."""
    if matrix.blocks is not None:
        weight = dequantize(matrix.weight, matrix.blocks, matrix.shape[1])
        y = F.linear(rounded(x).float(), weight)
        return (y if matrix.bias is None else y + matrix.bias).to(x.dtype)
    if matrix.scale is None:
        return F.linear(x, matrix.weight, matrix.bias)
    y = F.linear(x.float(), matrix.weight.float()) * matrix.scale
    return (y if matrix.bias is None else y + matrix.bias).to(x.dtype)


def normalize(x: Tensor, norm: Norm) -> Tensor:
    if norm.is_rms:
        return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def step(x_BD: Tensor, part: Part) -> Tensor:
    """[b, d] -> [b, d], for one new token a row."""
    normed = normalize(x_BD, part.norm)
    if isinstance(part, FeedForwardPart):
        wide = linear(normed, part.up)
        if part.gate is not None:
            return x_BD + linear(F.silu(linear(normed, part.gate)) * wide, part.down)
        approximate = "tanh" if part.activation == "gelu_tanh" else "none"
        return x_BD + linear(F.gelu(wide, approximate=approximate), part.down)
    a = part.attending
    query = _heads(normed, part.q, a)
    if isinstance(part, SelfAttentionPart):
        assert a.starts is not None
        rows = torch.arange(len(x_BD), device=x_BD.device) if a.rows is None else a.rows
        key = _heads(normed, part.k, a)
        a.keys[rows, a.starts] = key[:, 0].to(a.keys.dtype)
        value = linear(normed, part.v).unflatten(-1, (-1, a.keys.shape[3]))
        a.values[rows, a.starts] = value.to(a.values.dtype)
        return x_BD + linear(_read(query, a)[0], part.out)
    read, has_any = _read(query, a)
    added = linear(read, part.out)
    return x_BD + (added if part.adds_bias else torch.where(has_any, added, 0))


def _heads(normed_BD: Tensor, matrix: Matrix, a: Attending) -> Tensor:
    """Queries or keys [b, 1, heads, e], rotated."""
    x = linear(normed_BD, matrix).unflatten(-1, (-1, a.keys.shape[3]))[:, None]
    if a.cos is None or a.sin is None or a.positions is None:
        return x
    return rope(x, a.cos, a.sin, a.positions[:, None], a.interleaved)


def _read(query_B1HE: Tensor, a: Attending) -> tuple[Tensor, Tensor]:
    """[b, h * e], 0 in a row that reads nothing, and which rows [b, 1] read anything."""
    last = a.keys.shape[1] if a.starts is None else int(a.starts.max()) + 1
    places = torch.arange(last, device=a.keys.device)
    mask = torch.ones(a.count, last, dtype=torch.bool, device=a.keys.device)
    if a.starts is not None:
        mask = mask & (places <= a.starts[:, None])
    if a.begins is not None:
        mask = mask & (places >= a.begins[:, None])
    if a.valid is not None:
        mask = mask & a.valid[:, :last]
    has_any = mask.any(-1, keepdim=True)
    mine = slice(None) if a.rows is None else a.rows
    keys, values = (x[mine, :last].to(query_B1HE.dtype) for x in (a.keys, a.values))
    read = masked_attention(query_B1HE, keys, values, (mask | ~has_any)[:, None, None], scale=a.scale)
    return torch.where(has_any, read.flatten(1), 0), has_any
