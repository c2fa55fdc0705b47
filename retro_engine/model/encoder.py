"""The neighbor encoder: bidirectional inside a neighbor, conditioned on the chunk that retrieved it.

Shape letters: B batch, L chunks, K neighbors, R tokens per neighbor, M chunk length, C encoder width, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from retro_engine.config import ModelConfig
from retro_engine.model import ops
from retro_engine.model.attention import CrossAttention, FeedForward, Rotary, SelfAttention, norm


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
        key_mask: Tensor | None,
        hidden_BLMD: Tensor,
        hidden_mask_BLM: Tensor | None,
        rotary: Rotary,
    ) -> Tensor:
        B, L, K, R, C = y_BLKRC.shape
        y = y_BLKRC.reshape(B * L * K, R, C)
        y = y + self.dropout(self.attention(self.attention_norm(y), rotary, key_mask, is_causal=False))
        if self.is_crossing:
            z = self.cross_norm(y)
            y = (z if self.residual_is_norm else y) + self.dropout(
                self._cross(z.reshape(B * L, K * R, C), hidden_BLMD, hidden_mask_BLM, R, rotary).reshape(y.shape)
            )
        y = y + self.dropout(self.ffn(self.ffn_norm(y)))
        return y.reshape(B, L, K, R, C)

    def _cross(self, z: Tensor, hidden_BLMD: Tensor, mask_BLM: Tensor | None, R: int, rotary: Rotary) -> Tensor:
        """Query position i' in 0 ... r-1 of each neighbor, key position i in 0 ... m-1 of the chunk."""
        hidden = hidden_BLMD.flatten(0, 1)
        q = self.cross.queries(z)
        k, v = self.cross.keys_values(hidden)
        if rotary is not None:
            q = ops.rope(q, *rotary, positions=torch.arange(z.shape[1], device=z.device) % R)
            k = ops.rope(k, *rotary)
        mask = None if mask_BLM is None else mask_BLM.flatten(0, 1)[:, None, None, :]
        dropout = self.cross.dropout if self.training else 0.0
        return self.cross.out(ops.attention(q, k, v, mask, dropout=dropout).flatten(-2))


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
        hidden_mask_BLM: Tensor | None,
        rotary: Rotary,
    ) -> Tensor:
        """Embedded neighbors -> encoded [b, l, k, r, c].

        `lengths_BLK` None = full; the output at padding is finite and means nothing. `hidden_BLMD` is the normed
        state of the chunk at the first cross-attending decoder layer; `hidden_mask_BLM` True = may be read, at
        least one a chunk.
        """
        y, R = neighbors_BLKRC, neighbors_BLKRC.shape[3]
        key_mask = None
        if lengths_BLK is not None:
            shown = lengths_BLK.reshape(-1, 1, 1, 1).clamp(min=1)  # a missing neighbor reads itself: finite, unused
            key_mask = torch.arange(R, device=y.device) < shown
        for layer in self.layers:
            y = layer(y, key_mask, hidden_BLMD, hidden_mask_BLM, rotary)
        return self.final_norm(y)
