"""Neighbors in front: any decoder reads them as keys and values before its own, under one softmax, without new weights.

Each neighbor runs through the decoder alone, behind one shared first token (the sink: attention rests on it, arXiv
2309.17453). Its keys are kept as they are before rotation and rotated for the place where they are read, so they serve
wherever they stand (block attention, arXiv 2409.15355). They end where the text begins, the best neighbor last; at a
chunk's last token the block is exchanged, and the text's own keys stay.
Letters: B batch, N tokens, W neighbors, L chunks, K neighbors a chunk, R tokens per neighbor, X places in front,
T tokens in front, C keys of all layers, then their values, G key/value heads, E head width, M chunk length.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from retro_engine.model import ops
from retro_engine.model.attention import Rotary, SelfAttention

Pairs = list[tuple[Tensor, Tensor]]  # keys and values, one pair a layer
Encode = Callable[[Tensor, Tensor], list[Tensor]]  # as `encode_each` of a model: neighbors -> [c, t, g, e] of each


def stacked(pairs: Pairs) -> Tensor:
    """[c, ...]: the keys of all layers, then their values."""
    return torch.stack([*(k for k, _ in pairs), *(v for _, v in pairs)])


def padded(
    encode: Encode, tokens_WR: Tensor, lengths_W: Tensor, *, shape: tuple[int, int, int], dtype: torch.dtype
) -> Tensor:
    """[c, w, r, g, e] of neighbors, 0 where there is no token; `shape`: c, g and e."""
    C, G, E = shape
    out = torch.zeros(C, *tokens_WR.shape, G, E, dtype=dtype, device=tokens_WR.device)
    given = [row for row, length in enumerate(lengths_W.tolist()) if length]
    for row, one in zip(given, encode(tokens_WR[given], lengths_W[given]) if given else []):
        out[:, row, : one.shape[1]] = one
    return out


class Recording:
    """Self-attention of neighbors that run alone; keeps the keys and values of every layer, not rotated."""

    def __init__(self, rotary: Rotary):
        self.rotary = rotary
        self.pairs: Pairs = []

    def __call__(self, layer: int, attention: SelfAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.pairs.append((k, v))
        return attention.attend(q, k, v, self.rotary, is_causal=True)


def order_in_front(lengths_NK: Tensor, R: int, num_sinks: int) -> tuple[Tensor, Tensor]:
    """[n, x]: which of (sink, neighbors' tokens) stands at each of x = sinks + k*r places before the text, those that are
    unused first; and how many are used [n].
    """
    N, K = lengths_NK.shape
    device = lengths_NK.device
    is_used = (torch.arange(R, device=device) < lengths_NK.flip(1)[..., None]).flatten(1)
    is_used = torch.cat((is_used.new_ones(N, num_sinks), is_used), 1)
    tokens = num_sinks + torch.arange(K * R, device=device).view(K, R).flip(0).flatten()
    tokens = torch.cat((torch.arange(num_sinks, device=device), tokens))
    return tokens[is_used.int().argsort(dim=1, stable=True)], is_used.sum(1)


@dataclass
class Run:
    """Tokens first ... end - 1 of some rows: of one text, which begins at `text`, and readers of one chunk's neighbors (-1:
    of none).
    """

    rows: slice
    first: int
    end: int
    text: int
    chunk: int


class PrefixAttention:
    """Self-attention of a full pass: the tokens that read chunk u's neighbors meet those in front of their text."""

    def __init__(
        self,
        pairs_BLKRGE: Pairs,
        sinks: Pairs,
        lengths_BLK: Tensor,
        attends_BN: Tensor,
        rotary: Rotary,
        first_keys: Tensor | None,
        chunk_size: int,
    ):
        """`pairs` and `sinks` ([1, s, g, e]) of each layer, not rotated; `attends_BN` and `first_keys` (where the text of
        each token begins, None = at 0) as in a pass of the text alone.
        """
        (B, L, _), R, S = lengths_BLK.shape, pairs_BLKRGE[0][0].shape[3], sinks[0][0].shape[1]
        dtype = pairs_BLKRGE[0][0].dtype  # autocast's, where it is
        self.sinks = [(k.to(dtype), v.to(dtype)) for k, v in sinks]
        self.pairs, self.rotary = pairs_BLKRGE, rotary
        self.order_NX, used_N = order_in_front(lengths_BLK.flatten(0, 1), R, S)
        self.X, self.S = self.order_NX.shape[1], S
        self.begins_BL = (self.X - used_N).view(B, L)
        self.texts_BL = lengths_BLK.new_zeros(B, L)
        if first_keys is None or not bool(first_keys.any()):
            everything = slice(0, B)
            self.runs = [
                [
                    Run(everything, first, end, 0, chunk)
                    for chunk, first, end in segments(attends_BN.shape[1], chunk_size)
                ]
            ]
        else:
            self.texts_BL = first_keys[:, chunk_size - 1 :: chunk_size][:, :L]
            self.runs = [list(_runs_of(b, first_keys[b], attends_BN[b], chunk_size)) for b in range(B)]

    def __call__(self, layer: int, attention: SelfAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        places = self.X + torch.arange(q.shape[1], device=q.device)
        q, k = _rotated(q, places, attention, self.rotary), _rotated(k, places, attention, self.rotary)
        fronts = [self._front(layer, attention, which) for which in (0, 1)]
        rows = [
            torch.cat([self._attend(layer, attention, run=run, fronts=fronts, q=q, k=k, v=v) for run in runs], 1)
            for runs in self.runs
        ]
        return torch.cat(rows)

    def _attend(
        self, layer: int, attention: SelfAttention, run: Run, fronts: list[Tensor], q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        q = q[run.rows, run.first : run.end]
        if run.chunk < 0:
            front_k, front_v = (part.expand(len(q), -1, -1, -1) for part in self.sinks[layer])
            places = run.text + torch.arange(self.X - self.S, self.X, device=q.device)
            front_k, begins_B = _rotated(front_k, places, attention, self.rotary), None
        else:
            front_k, front_v = (front[run.rows, run.chunk] for front in fronts)
            begins_B = self.begins_BL[run.rows, run.chunk]
        own = run.rows, slice(run.text, run.end)
        keys, values = torch.cat((front_k, k[own]), 1), torch.cat((front_v, v[own]), 1)
        dropout = attention.dropout if attention.training else 0.0
        return ops.attention(
            q, keys, values, True, key_begins=begins_B, dropout=dropout, scale=attention.scale
        ).flatten(-2)

    def _front(self, layer: int, attention: SelfAttention, which: int) -> Tensor:
        """[b, l, x, g, e]: keys (0), rotated for where the text of a chunk's last token begins, or values (1)."""
        part = self.pairs[layer][which]
        B, L = part.shape[:2]
        tokens = torch.cat((self.sinks[layer][which].expand(B * L, -1, -1, -1), part.flatten(2, 3).flatten(0, 1)), 1)
        front = tokens.gather(1, self.order_NX[..., None, None].expand(-1, -1, *tokens.shape[2:]))
        if which == 0:
            places_NX = self.texts_BL.flatten()[:, None] + torch.arange(self.X, device=front.device)
            front = _rotated(front, places_NX, attention, self.rotary)
        return front.unflatten(0, (B, L))


def _runs_of(row: int, first_keys_N: Tensor, attends_N: Tensor, M: int) -> Iterator[Run]:
    """The runs of one row, which end at chunks' last tokens and where a text does."""
    texts, attends = first_keys_N.tolist(), attends_N.tolist()
    for chunk, first, end in segments(len(texts), M):
        while first < end:
            stop = next((i for i in range(first, end) if texts[i] != texts[first]), end)
            yield Run(slice(row, row + 1), first, stop, texts[first], chunk if attends[first] else -1)
            first = stop


def segments(num_tokens: int, M: int, start: int = 0) -> Iterator[tuple[int, int, int]]:
    """(chunk read, first, end) of runs of tokens start ... start + n - 1 that read the same chunk's neighbors; places are
    counted from `start`, chunks from the text's first (-1 = none).
    """
    first = 0
    while first < num_tokens:
        chunk = (start + first + 1) // M - 1
        end = min((chunk + 2) * M - 1 - start, num_tokens)
        yield chunk, first, end
        first = end


def _rotated(x: Tensor, places: Tensor, attention: SelfAttention, rotary: Rotary) -> Tensor:
    return x if rotary is None else ops.rope(x, *rotary, positions=places, interleaved=attention.interleaved)
