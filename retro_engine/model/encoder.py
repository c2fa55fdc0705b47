"""The neighbor encoder: bidirectional inside a neighbor, conditioned on the chunk that retrieved it.

Shape letters: B batch, L chunks, K neighbors, R tokens per neighbor, M chunk length, C encoder width, D width,
T valid neighbor tokens, W neighbors of the batch (b * l * k).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from retro_engine.config import ModelConfig
from retro_engine.model import ops
from retro_engine.model.attention import CrossAttention, FeedForward, Rotary, SelfAttention, norm
from retro_engine.model.recompute import run

# Packed tokens are rounded up, with padding, to one of so many sizes: memory of a size that returns is used again. When
# every batch had its own size, a training process of 800 MiB grew to 1,200 in 200 steps.
PACKED_SIZES = 16

# What the encoder may read of each chunk: begin and end [b, l], or a mask [b, l, m] where that is no range; None = all.
Seen = tuple[Tensor, Tensor] | Tensor | None


@dataclass
class NeighborLayout:
    """How neighbor tokens lie in the encoder: all [w, r, ...], or packed: the valid ones alone [t, ...].

    Everything but attention is computed on packed tokens, so padding and missing neighbors cost nothing there; the
    attention kernels skip them by length.
    """

    shape: tuple[int, int, int, int]  # b, l, k, r
    key_ends: Tensor | None  # [w] tokens that count as keys; None = all
    valid: Tensor | None = None  # [t] places of the valid tokens; None = not packed

    def padded(self, x: Tensor) -> Tensor:
        """To [w, r, ...]; 0 where there is no token."""
        B, L, K, R = self.shape
        if self.valid is None:
            return x
        out = x.new_zeros(B * L * K * R, *x.shape[1:])
        return out.index_copy(0, self.valid, x).unflatten(0, (B * L * K, R))

    def packed(self, x: Tensor) -> Tensor:
        """From [w, r, ...] or any shape of as many tokens, back to how tokens lie here."""
        B, L, K, R = self.shape
        rest = x.shape[-1]
        if self.valid is None:
            return x.reshape(B * L * K, R, rest)
        return x.reshape(-1, rest).index_select(0, self.valid)


def layout_of(tokens_BLKR: Tensor, lengths_BLK: Tensor | None, packs: bool) -> NeighborLayout:
    """Packed where `packs` and something is padding. `lengths_BLK` None = all full."""
    B, L, K, R = tokens_BLKR.shape
    if lengths_BLK is None:
        return NeighborLayout((B, L, K, R), None)
    ends = lengths_BLK.reshape(-1).clamp(min=1)  # a missing neighbor reads its padding: finite, unused
    valid = None
    if packs:
        is_valid = (torch.arange(R, device=lengths_BLK.device) < lengths_BLK.reshape(-1, 1)).reshape(-1)
        step = max(1, -(-is_valid.shape[0] // PACKED_SIZES))
        size = -(-int(is_valid.sum()) // step) * step
        if size < is_valid.shape[0]:
            valid_first = torch.sort(is_valid, descending=True, stable=True).indices
            valid = valid_first[:size].sort().values
    return NeighborLayout((B, L, K, R), ends, valid)


class EncoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, is_crossing: bool):
        super().__init__()
        width = config.encoder_width
        self.attention_norm = norm(config, width)
        self.attention = SelfAttention(config, is_encoder=True)
        if is_crossing:
            self.cross_norm = norm(config, width)
            self.cross = CrossAttention(config)
        self.is_crossing = is_crossing
        self.residual_is_norm = config.encoder_ca_residual == "norm"
        self.ffn_norm = norm(config, width)
        self.ffn = FeedForward(config, width, config.encoder_ffn_width)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self, y: Tensor, layout: NeighborLayout, hidden_BLMD: Tensor | None, hidden_seen: Seen, rotary: Rotary
    ) -> Tensor:
        """Tokens as they lie in `layout` [..., c] -> the same; `hidden` None where the layer does not cross-attend."""
        q, k, v = (layout.padded(part) for part in self.attention.project(self.attention_norm(y)))
        attended = self.attention.attend(q, k, v, rotary, is_causal=False, key_ends=layout.key_ends)
        y = y + self.dropout(self.attention.out(layout.packed(attended)))
        if self.is_crossing:
            assert hidden_BLMD is not None
            z = self.cross_norm(y)
            crossed = self._cross(layout.padded(self.cross.queries(z)), hidden_BLMD, hidden_seen, layout, rotary)
            y = (z if self.residual_is_norm else y) + self.dropout(self.cross.out(layout.packed(crossed)))
        return y + self.dropout(self.ffn(self.ffn_norm(y)))

    def _cross(
        self, q_WRHE: Tensor, hidden_BLMD: Tensor, hidden_seen: Seen, layout: NeighborLayout, rotary: Rotary
    ) -> Tensor:
        """Query position i' in 0 ... r-1 of each neighbor, key position i in 0 ... m-1 of the chunk."""
        B, L, K, R = layout.shape
        q = q_WRHE.reshape(B * L, K * R, *q_WRHE.shape[2:])
        k, v = self.cross.keys_values(hidden_BLMD.flatten(0, 1))
        dropout, scale = self.cross.dropout if self.training else 0.0, self.cross.scale
        if isinstance(hidden_seen, Tensor):
            if rotary is not None:
                q = ops.rope(q, *rotary, positions=torch.arange(K * R, device=q.device) % R)
                k = ops.rope(k, *rotary)
            mask = hidden_seen.flatten(0, 1)[:, None, None, :]
            return ops.masked_attention(q, k, v, mask, dropout=dropout, scale=scale).flatten(-2)
        begins, ends = (None, None) if hidden_seen is None else (x.flatten() for x in hidden_seen)
        return ops.attention(
            q, k, v, False, None, begins, ends, rotary, query_period=R, dropout=dropout, scale=scale
        ).flatten(-2)


class Encoder(nn.Module):
    layers: Sequence[EncoderLayer]  # an nn.ModuleList

    def __init__(self, config: ModelConfig):
        super().__init__()
        crossing = set(config.enc_cross_attention)
        layers = [EncoderLayer(config, i in crossing) for i in range(config.enc_num_layers)]
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(layers)  # type: ignore[assignment]
        self.final_norm = norm(config, config.encoder_width) if config.encoder_final_norm else nn.Identity()
        self.recompute: str | None = None

    def forward(
        self, embedded: Tensor, layout: NeighborLayout, hidden_BLMD: Tensor | None, hidden_seen: Seen, rotary: Rotary
    ) -> Tensor:
        """Embedded neighbor tokens as they lie in `layout` [..., c] -> encoded, the same.

        The output at padding is finite and means nothing. `hidden_BLMD` is the normed state of the chunk at the first
        cross-attending decoder layer (None where no layer reads it); `hidden_seen` its tokens that may be read, at least
        one a chunk.
        """
        y = self.dropout(embedded)
        for layer in self.layers:
            y = run(self.recompute, layer, y, layout, hidden_BLMD, hidden_seen, rotary)
        return self.final_norm(y)
