"""The neighbor encoder: bidirectional inside a neighbor, conditioned on the chunk that retrieved it.

Shape letters: B batch, L chunks, K neighbors, R tokens per neighbor, M chunk length, C encoder width, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from retro_engine.config import ModelConfig
from retro_engine.model import ops
from retro_engine.model.attention import CrossAttention, FeedForward, Rotary, SelfAttention, norm

# What the encoder may read of each chunk: begin and end [b, l], or a mask [b, l, m] where that is no range; None = all.
Seen = tuple[Tensor, Tensor] | Tensor | None


class EncoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, is_crossing: bool):
        super().__init__()
        width, heads = config.encoder_width, config.encoder_heads
        self.attention_norm = norm(config, width)
        self.attention = SelfAttention(config, width, heads, config.encoder_key_value_heads)
        if is_crossing:
            self.cross_norm = norm(config, width)
            self.cross = CrossAttention(config, width, heads, config.encoder_key_value_heads, config.hidden_size)
        self.is_crossing = is_crossing
        self.residual_is_norm = config.encoder_ca_residual == "norm"
        self.ffn_norm = norm(config, width)
        self.ffn = FeedForward(config, width, config.encoder_ffn_width)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        y_BLKRC: Tensor,
        key_ends: Tensor | None,
        hidden_BLMD: Tensor,
        hidden_seen: Seen,
        rotary: Rotary,
    ) -> Tensor:
        B, L, K, R, C = y_BLKRC.shape
        y = y_BLKRC.reshape(B * L * K, R, C)
        y = y + self.dropout(self.attention(self.attention_norm(y), rotary, is_causal=False, key_ends=key_ends))
        if self.is_crossing:
            z = self.cross_norm(y)
            y = (z if self.residual_is_norm else y) + self.dropout(
                self._cross(z.reshape(B * L, K * R, C), hidden_BLMD, hidden_seen, R, rotary).reshape(y.shape)
            )
        y = y + self.dropout(self.ffn(self.ffn_norm(y)))
        return y.reshape(B, L, K, R, C)

    def _cross(self, z: Tensor, hidden_BLMD: Tensor, hidden_seen: Seen, R: int, rotary: Rotary) -> Tensor:
        """Query position i' in 0 ... r-1 of each neighbor, key position i in 0 ... m-1 of the chunk."""
        q = self.cross.queries(z)
        k, v = self.cross.keys_values(hidden_BLMD.flatten(0, 1))
        dropout = self.cross.dropout if self.training else 0.0
        if isinstance(hidden_seen, Tensor):
            if rotary is not None:
                q = ops.rope(q, *rotary, positions=torch.arange(z.shape[1], device=z.device) % R)
                k = ops.rope(k, *rotary)
            mask = hidden_seen.flatten(0, 1)[:, None, None, :]
            return self.cross.out(ops.masked_attention(q, k, v, mask, dropout=dropout).flatten(-2))
        begins, ends = (None, None) if hidden_seen is None else (x.flatten() for x in hidden_seen)
        attended = ops.attention(q, k, v, False, None, begins, ends, rotary, query_period=R, dropout=dropout)
        return self.cross.out(attended.flatten(-2))


class Encoder(nn.Module):
    layers: Sequence[EncoderLayer]  # an nn.ModuleList

    def __init__(self, config: ModelConfig):
        super().__init__()
        crossing = set(config.enc_cross_attention)
        layers = [EncoderLayer(config, i in crossing) for i in range(config.enc_num_layers)]
        self.layers = nn.ModuleList(layers)  # type: ignore[assignment]
        self.final_norm = norm(config, config.encoder_width) if config.encoder_final_norm else nn.Identity()

    def forward(
        self,
        neighbors_BLKRC: Tensor,
        lengths_BLK: Tensor | None,
        hidden_BLMD: Tensor,
        hidden_seen: Seen,
        rotary: Rotary,
    ) -> Tensor:
        """Embedded neighbors -> encoded [b, l, k, r, c].

        `lengths_BLK` None = full; the output at padding is finite and means nothing. `hidden_BLMD` is the normed
        state of the chunk at the first cross-attending decoder layer; `hidden_seen` its tokens that may be
        read, at least one a chunk.
        """
        y = neighbors_BLKRC
        key_ends = None
        if lengths_BLK is not None:
            key_ends = lengths_BLK.reshape(-1).clamp(min=1)  # a missing neighbor reads itself: finite, unused
        for layer in self.layers:
            y = layer(y, key_ends, hidden_BLMD, hidden_seen, rotary)
        return self.final_norm(y)
