"""One decoder layer: self-attention, chunked cross-attention in the layers that have it, FFN; all pre-norm.

Shape letters: B batch, N tokens, D width, L chunks, K neighbors, R tokens per neighbor, C encoder width.
"""

import torch
from torch import Tensor, nn

from retro_engine.config import ModelConfig
from retro_engine.model import ops
from retro_engine.model.attention import CrossAttention, FeedForward, Rotary, SelfAttention, norm


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, is_crossing: bool):
        super().__init__()
        self.config = config
        width, heads, groups = config.hidden_size, config.num_attention_heads, config.key_value_heads
        self.attention_norm = norm(config, width)
        self.attention = SelfAttention(config, width, heads, groups)
        self.is_crossing = is_crossing
        if is_crossing:
            self.cross_norm = norm(config, width)
            self.cross = CrossAttention(config, width, heads, groups, config.encoder_width)
        self.ffn_norm = norm(config, width)
        self.ffn = FeedForward(config, width, config.ffn_hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def self_attend(
        self, x_BND: Tensor, rotary: Rotary, first_keys: Tensor | None, mask: Tensor | None = None
    ) -> Tensor:
        attended = self.attention(self.attention_norm(x_BND), rotary, True, first_keys, mask=mask)
        return x_BND + self.dropout(attended)

    def cross_attend(
        self,
        x_BND: Tensor,
        z_BND: Tensor,
        encoded_BLKRC: Tensor,
        lengths_BLK: Tensor | None,
        attends_BN: Tensor,
        rotary: Rotary,
        front: int,
    ) -> Tensor:
        """x + CCA(z, encoded); exactly x at tokens where `attends_BN` is False (cca_bias_everywhere apart).

        `front` tokens of padding go before z so that its short first chunk is whole.
        """
        c = self.config
        q = self.cross.queries(z_BND)
        k, v = self.cross.keys_values(encoded_BLKRC)
        if front:
            q = nn.functional.pad(q, (0, 0, 0, 0, front, 0))
        cos, sin = rotary if rotary is not None else (None, None)
        out = ops.chunked_cross_attention(
            q,
            k,
            v,
            lengths_BLK,
            c.chunk_size,
            cos,
            sin,
            query_offset=c.chunk_size - 1 if c.cca_query_offset else 0,
            dropout=self.cross.dropout if self.training else 0.0,
        )[:, front:].flatten(-2)
        if c.cca_bias_everywhere:
            out = self.cross.out(torch.where(attends_BN[..., None], out, 0))
        else:
            out = torch.where(attends_BN[..., None], self.cross.out(out), 0)
        return x_BND + self.dropout(out)

    def feed_forward(self, x_BND: Tensor) -> Tensor:
        return x_BND + self.dropout(self.ffn(self.ffn_norm(x_BND)))
