"""Neighbors in front (model/prefix.py) while decoding: what stands before each row's text, exchanged where a chunk ends.

A block's tokens meet what is in front of their chunk and the text before them apart; both attentions are merged by their
log-sum-exps, which is one softmax over all (arXiv 2205.14135 section 3.1).
Letters: B rows, N rows whose chunk ends, L chunks that a block completes, T tokens of it, K neighbors, R tokens per
neighbor, X places in front of one, H heads, G key/value heads, E head width, M chunk length.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from retro_engine.model import ops
from retro_engine.model.attention import SelfAttention
from retro_engine.model.decode_cache import DecodeCache


class FrontReading:
    """Attention of a block whose tokens read in front: first what stands there, then the neighbors of the chunks that it
    completes.
    """

    def __init__(
        self,
        cache: DecodeCache,
        start: int,
        T: int,
        neighbors_BLKR: Tensor | None,
        lengths_BLK: Tensor | None,
        keeps_front: bool = False,
    ):
        """`keeps_front`: what stands in front stays there, whatever chunks end."""
        M, rows = cache.chunk_size, range(len(cache.lengths_B))
        self.cache, self.start, self.stop = cache, start, start + T
        self.firsts: list[int] = (cache.pads_B - start).clamp(0, T).tolist()  # each row's first token: no padding
        self.border = T if keeps_front else min(M - 1 - start % M, T)  # the first token that reads other neighbors
        self.fronts: list[list[Sequence[Tensor]]] = []  # of each completed chunk, of each row
        for place in range(0 if keeps_front else (start + T) // M - start // M):
            none_B = cache.pads_B >= (start // M + place + 1) * M  # a chunk of nothing but padding
            neighbors, lengths = (None if part is None else part[:, place] for part in (neighbors_BLKR, lengths_BLK))
            found = _fronts(cache, rows, neighbors, lengths, none_B)
            self.fronts.append([found.get(row, ()) for row in rows])
        if self.fronts:
            self._make_room()

    def _make_room(self) -> None:
        """For one layer's fronts, [b, l, x, g, e], and where their tokens are."""
        keys, pads_B = self.cache.keys_BSGE[0], self.cache.pads_B
        lengths = [[sum(part.shape[1] for part in front) for front in fronts] for fronts in self.fronts]
        X = max(max(of_rows) for of_rows in lengths)
        self.lengths_BL = torch.tensor(lengths, device=keys.device).T.contiguous()
        begins_BL1 = (pads_B[:, None] - self.lengths_BL)[..., None]
        self.places_NX = (begins_BL1 + torch.arange(X, device=keys.device)).clamp(min=0).flatten(0, 1)
        self.room = keys.new_zeros(2, *self.lengths_BL.shape, X, *keys.shape[2:])

    def attend(self, layer: int, attention: SelfAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [b, t, h, e], k and v [b, t, g, e], rotated -> as q; the cache gets those of the text."""
        cache, scale = self.cache, attention.scale
        keys, values = cache.keys_BSGE[layer], cache.values_BSGE[layer]
        for row, first in enumerate(self.firsts):  # where padding is stands what is read in front
            place = slice(self.start + first, self.stop)
            keys[row, place], values[row, place] = k[row, first:], v[row, first:]
        middle = self.start + self.border
        seen = keys[:, :middle].to(q.dtype), values[:, :middle].to(q.dtype)
        begins_B = cache.begins_B.clamp(max=middle)
        before = ops.attention(q[:, : self.border], *seen, True, key_begins=begins_B, scale=scale)
        if not self.fronts:
            return before
        q, text = q[:, self.border :], slice(cache.origin, self.stop)
        seen = keys[:, text].to(q.dtype), values[:, text].to(q.dtype)
        begins_B = (cache.pads_B - cache.origin).clamp(max=self.stop - cache.origin)
        own, lse = ops.attention_lse(q, *seen, True, key_begins=begins_B, scale=scale)
        front, front_lse = self._read(layer, q, scale)
        share = torch.where(front_lse.isposinf(), torch.inf, lse - front_lse).sigmoid()  # +inf: nothing is in front
        merged = torch.lerp(front.to(share.dtype), own.to(share.dtype), share.transpose(1, 2)[..., None]).to(q.dtype)
        return torch.cat((before, merged), 1)

    def _read(self, layer: int, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """What the queries [b, t, h, e] from the first completed chunk's last token on read of the fronts, and the log-sum-exps
        [b, h, t]. The last chunk's front takes its place in the cache.
        """
        cache, M = self.cache, self.cache.chunk_size
        layers = len(cache.keys_BSGE)
        for place, fronts in enumerate(self.fronts):
            for row, front in enumerate(fronts):
                at = 0
                for part in front:
                    self.room[:, row, place, at : at + part.shape[1]] = part[layer::layers]
                    at += part.shape[1]
        keys, values = self.room
        if cache.rotary[0] is not None:
            turned = ops.rope(keys.flatten(0, 1), *cache.rotary[0], self.places_NX, cache.interleaved)
            keys = turned.view_as(keys)
        for row, (pad, length) in enumerate(zip(cache.pads_B.tolist(), self.lengths_BL[:, -1].tolist())):
            cache.keys_BSGE[layer][row, pad - length : pad] = keys[row, -1, :length]
            cache.values_BSGE[layer][row, pad - length : pad] = values[row, -1, :length]
        padded, lengths_BL1 = F.pad(q, (0, 0, 0, 0, M - 1, 0)), self.lengths_BL[..., None]
        seen = keys[:, :, None].to(q.dtype), values[:, :, None].to(q.dtype)
        out, lse = ops.chunked_cross_attention(padded, *seen, lengths_BL1, M, scale=scale, return_lse=True)
        return out[:, M - 1 :], lse[..., M - 1 :]

    def keep(self) -> None:
        """What the tokens after the block read."""
        if self.fronts:
            self.cache.begins_B.copy_(self.cache.pads_B - self.lengths_BL[:, -1])


def read_in_front(
    cache: DecodeCache, ending: Sequence[int], neighbors_NKR: Tensor | None, lengths_NK: Tensor | None
) -> None:
    """Exchange what stands in front of the rows whose chunk ends."""
    for row, parts in _fronts(cache, ending, neighbors_NKR, lengths_NK).items():
        cache.put_front(row, parts)


def _fronts(
    cache: DecodeCache,
    rows: Sequence[int],
    neighbors_NKR: Tensor | None,
    lengths_NK: Tensor | None,
    none_N: Tensor | None = None,
) -> dict[int, list[Tensor]]:
    """What stands in front of each of these rows from now on; `none_N` True: no neighbors, whatever is given."""
    reading = {row: n for n, row in enumerate(rows) if cache.reads(row)}
    found: dict[int, list[Tensor]] = {row: [] for row in reading}
    if neighbors_NKR is not None:
        N, K, R = neighbors_NKR.shape
        lengths_NK = torch.full((N, K), R, device=neighbors_NKR.device) if lengths_NK is None else lengths_NK
        if none_N is not None:
            lengths_NK = torch.where(none_N[:, None], 0, lengths_NK)
        lengths = lengths_NK.tolist()
        places = [(row, n, k) for row, n in reading.items() for k in range(K) if lengths[n][k]]
        if places:
            which = tuple(torch.tensor(places).T[1:])
            for (row, *_), one in zip(places, cache.encode(neighbors_NKR[which], lengths_NK[which])):
                found[row].append(one)
    return {row: cache.front(neighbors) for row, neighbors in found.items()}
