"""Texts that read some of a set of passages in front, in one packed pass: a passage is computed once, whoever reads it.

Equal to a pass of each text with its passages in front from its first token on, as generation has neighbors that are
given (model/prefix.py): a passage meets the sink and itself, a text the sink, its passages and itself. The products see
each token once and no padding; only attention takes rows.
Letters: W passages, R tokens of one, Q texts, N tokens of one, K passages that a text reads, S sinks (0 or 1), T all tokens,
X places in front, S also keys, G key/value heads, E head width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from retro_engine.config import ModelConfig
from retro_engine.model import ops
from retro_engine.model.attention import Rotary, SelfAttention
from retro_engine.model.prefix import order_in_front

PARTS = 4  # calls of attention over texts in a layer


class SharedReading:
    """The packed tokens and their positions, and the self-attention of a layer over them."""

    def __init__(
        self,
        config: ModelConfig,
        passages_WR: Tensor,
        lengths_W: Tensor,
        texts_QN: Tensor,
        lengths_Q: Tensor,
        reads_QK: Tensor,
    ):
        """`reads`: numbers of passages, the best first, -1 = none. Raises ValueError for a passage that there is not."""
        (W, R), N, device = passages_WR.shape, texts_QN.shape[1], texts_QN.device
        if W == 0 or int(reads_QK.max()) >= W or int(lengths_W.min()) < 1:
            raise ValueError(f"texts read passage {int(reads_QK.max())} of {W}, which have {lengths_W.tolist()} tokens")
        S = 0 if config.sink_id is None else 1
        has_WR = torch.arange(R, device=device) < lengths_W[:, None]
        self.has_QN = torch.arange(N, device=device) < lengths_Q[:, None]
        sinks = passages_WR.new_full((S,), config.sink_id or 0)
        self.tokens_T = torch.cat((sinks, passages_WR[has_WR], texts_QN[self.has_QN]))
        place_WR, place_QN = _counted(has_WR, S), _counted(self.has_QN, S + int(lengths_W.sum()))
        self.alone_WR = torch.cat((place_WR.new_zeros(W, S), place_WR), 1)  # the sink is token 0
        reads_W = torch.where(reads_QK < 0, 0, reads_QK)
        lengths_QK = torch.where(reads_QK < 0, 0, lengths_W[reads_W])
        order_QX, used_Q = order_in_front(lengths_QK, R, S)
        sources = torch.cat((place_WR.new_zeros(len(texts_QN), S), place_WR[reads_W].flatten(1)), 1)
        self.X = int(used_Q.max())
        self.parts = _parts(sources.gather(1, order_QX), used_Q, place_QN, lengths_Q)
        self.positions_T = self._positions(config.first_position, has_WR, S)
        self.num_positions = max(self.X + N, S + R)
        self.rotary: Rotary = None  # set by who makes tables of `num_positions`
        is_output = torch.cat((torch.ones_like(has_WR[:, :S]), has_WR), 1)
        is_output[1:, :S] = False  # the sink's own output is that of the first row
        places = [self.alone_WR[is_output], *(part.own_QN[part.has_QN] for part in self.parts)]
        has = torch.cat((is_output.flatten(), *(part.has_QN.flatten() for part in self.parts)))
        self.outputs_T = has.nonzero()[:, 0][torch.cat(places).argsort()]

    def _positions(self, first: int, has_WR: Tensor, S: int) -> Tensor:
        """[t]: of learned positions, which count a passage's from the sink on and a text's behind what it reads."""
        places = [torch.arange(S, device=has_WR.device)]
        for begin, has in ((S, has_WR), (first, self.has_QN)):
            places.append((begin + torch.arange(has.shape[1], device=has.device)).expand_as(has)[has])
        return torch.cat(places)

    def __call__(self, layer: int, attention: SelfAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [1, t, h, e], k and v [1, t, g, e], not rotated -> [1, t, h * e]"""
        queries, keys, values = (_rows(part[0], self.alone_WR) for part in (q, k, v))
        out_WR = attention.attend(queries, keys, values, self.rotary, is_causal=True)
        outputs = [out_WR.flatten(0, 1)]
        outputs += [self._read(part, attention, q[0], k[0], v[0]).flatten(0, 1) for part in self.parts]
        return torch.cat(outputs).index_select(0, self.outputs_T)[None]

    def _read(self, part: "_Part", attention: SelfAttention, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor) -> Tensor:
        """[q, n, h * e] of some texts."""
        queries, keys, values = _rows(q_THE, part.own_QN), _rows(k_TGE, part.keys_QS), _rows(v_TGE, part.keys_QS)
        rotary, offset = self.rotary, keys.shape[1] - queries.shape[1]
        if rotary is not None and attention.interleaved:  # the fused rotation is half-split
            places = torch.arange(keys.shape[1], device=q_THE.device)
            queries = ops.rope(queries, *rotary, positions=places[offset:], interleaved=True)
            keys, rotary, offset = ops.rope(keys, *rotary, positions=places, interleaved=True), None, 0
        dropout = attention.dropout if attention.training else 0.0
        return ops.attention(
            queries,
            keys,
            values,
            True,
            key_begins=part.begins_Q,
            rotary=rotary,
            query_offset=offset,
            dropout=dropout,
            scale=attention.scale,
        ).flatten(-2)

    def spread(self, x_TD: Tensor) -> Tensor:
        """[q, n, d]: the texts' rows of [t, d], 0 where there is no token."""
        out = x_TD.new_zeros(*self.has_QN.shape, x_TD.shape[-1])
        out[self.has_QN] = x_TD[len(x_TD) - int(self.has_QN.sum()) :]
        return out


@dataclass
class _Part:
    """Texts that read about as much, so that little is padding."""

    keys_QS: Tensor  # which tokens each meets, its own last
    own_QN: Tensor
    has_QN: Tensor
    begins_Q: Tensor  # the first key that counts


def _parts(front_QX: Tensor, used_Q: Tensor, own_QN: Tensor, lengths_Q: Tensor) -> list[_Part]:
    """All texts, those that read least first."""
    parts = []
    for rows in (used_Q + lengths_Q).argsort().chunk(PARTS):
        N, X = int(lengths_Q[rows].max()), int(used_Q[rows].max())
        own = own_QN[rows, :N]
        keys = torch.cat((front_QX[rows, front_QX.shape[1] - X :], own), 1)
        has = torch.arange(N, device=rows.device) < lengths_Q[rows, None]
        parts.append(_Part(keys, own, has, X - used_Q[rows]))
    return parts


def _counted(has: Tensor, first: int) -> Tensor:
    """Numbers from `first` on for what there is, in order; 0 elsewhere."""
    numbers = first + has.flatten().cumsum(0).view(has.shape) - 1
    return torch.where(has, numbers, 0)


def _rows(x_TGE: Tensor, places: Tensor) -> Tensor:
    """[*places, g, e]; by index_select, whose gradient is a sum of whole rows."""
    return x_TGE.index_select(0, places.flatten()).view(*places.shape, *x_TGE.shape[1:])
