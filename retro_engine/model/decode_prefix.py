"""Neighbors in front (model/prefix.py) while decoding: what stands before each row's text, exchanged where a chunk ends.

Letters: B rows, N rows whose chunk ends, L chunks that a block completes, T tokens of it, K neighbors, R tokens per
neighbor, M chunk length.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retro_engine.model import ops
from retro_engine.model.attention import SelfAttention
from retro_engine.model.decode_cache import DecodeCache, Front
from retro_engine.model.prefix import segments


@dataclass
class _KeptRun:
    """Tokens first ... end - 1 of a block: what stands in front of each row from the first on, where it is another."""

    first: int
    end: int
    fronts: dict[int, Front]
    begins_B: Tensor


class FrontReading:
    """Attention of a block whose tokens read in front: part by part, each with the neighbors of its chunk."""

    def __init__(
        self, cache: DecodeCache, start: int, T: int, neighbors_BLKR: Tensor | None, lengths_BLK: Tensor | None
    ):
        self.cache, self.start = cache, start
        self.firsts: list[int] = (
            (cache.pads_B - start).clamp(0, T).tolist()
        )  # each row's first token that is no padding
        self.runs: list[_KeptRun] = []
        M, begins_B = cache.chunk_size, cache.begins_B
        for chunk, first, end in segments(T, M, start):
            place, fronts = chunk - start // M, {}
            if place >= 0:
                none_B = cache.pads_B >= (chunk + 1) * M  # a chunk of nothing but padding
                neighbors, lengths = (
                    None if part is None else part[:, place] for part in (neighbors_BLKR, lengths_BLK)
                )
                fronts = _fronts(cache, range(len(none_B)), neighbors, lengths, none_B)
                begins_B = begins_B.clone()
                for row, front in fronts.items():
                    begins_B[row] = cache.pads_B[row] - front[0].shape[1]
            self.runs.append(_KeptRun(first, end, fronts, begins_B))

    def attend(self, layer: int, attention: SelfAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [b, t, h, e], k and v [b, t, g, e], rotated -> as q; the cache gets those of the text."""
        keys, values, out = self.cache.keys_BSGE[layer], self.cache.values_BSGE[layer], []
        for row, first in enumerate(self.firsts):  # where padding is stands what is read in front
            place = slice(self.start + first, self.start + k.shape[1])
            keys[row, place], values[row, place] = k[row, first:], v[row, first:]
        for run in self.runs:
            for row, front in run.fronts.items():
                self.cache.put_front(row, front, layer)
            stop = self.start + run.end
            seen = keys[:, :stop].to(q.dtype), values[:, :stop].to(q.dtype)
            begins_B = run.begins_B.clamp(max=stop)
            part = q[:, run.first : run.end]
            out.append(ops.attention(part, *seen, True, key_begins=begins_B, scale=attention.scale))
        return torch.cat(out, 1)

    def keep(self) -> None:
        """What the tokens after the block read."""
        self.cache.begins_B.copy_(self.runs[-1].begins_B)


def read_in_front(
    cache: DecodeCache, ending: Sequence[int], neighbors_NKR: Tensor | None, lengths_NK: Tensor | None
) -> None:
    """Exchange what stands in front of the rows whose chunk ends."""
    for row, front in _fronts(cache, ending, neighbors_NKR, lengths_NK).items():
        cache.put_front(row, front)


def _fronts(
    cache: DecodeCache,
    rows: Sequence[int],
    neighbors_NKR: Tensor | None,
    lengths_NK: Tensor | None,
    none_N: Tensor | None = None,
) -> dict[int, Front]:
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
    return {row: cache.front(row, neighbors) for row, neighbors in found.items()}
