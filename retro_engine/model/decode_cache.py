"""The state of sequences that are decoded, and a model's layers prepared on its memory for one new token a row.

A row is a sequence at its own place. Chunks are aligned to a sequence's beginning, so every entry is final once written:
nothing is recomputed. Memory is reserved for `capacity` tokens a row; the system backs what is written.
Letters: B rows, S capacity, T tokens of a block, N rows that get neighbors, R tokens per neighbor, X neighbor tokens that a
row reads (k*r), G key/value heads, E head width, M chunk length, D width.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retro_engine.model import ops
from retro_engine.model.attention import Rotary
from retro_engine.model.decoder import Places
from retro_engine.model.encodings import encode_each, encode_sink
from retro_engine.model.memory import untouched_zeros
from retro_engine.model.prefix import Encode
from retro_engine.model.retro import RetroModel

Pairs = list[tuple[Tensor, Tensor]]  # keys and values, one pair a cross-attending layer
PLACES = ("cross_valid_BX", "lengths_B", "pads_B", "begins_B", "positions_B", "offsets_B")
OF_ROWS = ("hidden_BMD", *PLACES)
OF_ROWS_AND_LAYERS = ("keys_BSGE", "values_BSGE", "cross_keys_BXGE", "cross_values_BXGE")


class PreparedSteps:
    """`Steps` of a model's layers, and which weights they were made of: the layers may have got others since."""

    def __init__(self, layers: Sequence[nn.Module], steps: ops.Steps):
        assert isinstance(layers, nn.ModuleList)
        self.steps: ops.Steps = steps
        self._layers: nn.ModuleList = layers
        tables = [table for m in layers.modules() for table in (m._parameters, m._buffers, m._modules)]
        slots = [(table, name, value) for table in tables for name, value in table.items()]
        self._tables: list[dict[str, Any]] = [table for table, _, _ in slots]
        self._names: list[str] = [name for _, name, _ in slots]
        self._values: list[Any] = [value for _, _, value in slots]

    def is_of(self, layers: Sequence[nn.Module]) -> bool:
        """Whether these layers have the same weights still (with other values and other memory maybe: `Steps` sees that)."""
        found = map(dict.get, self._tables, self._names)  # every step asks
        return layers is self._layers and all(map(operator.is_, found, self._values))


@dataclass
class DecodeCache:
    """The decoding state of B sequences; made by `new_cache`. Tensors are written in place, so parts share them."""

    keys_BSGE: list[Tensor]  # one a decoder layer, rotated
    values_BSGE: list[Tensor]
    hidden_BMD: Tensor  # normed state of each row's open chunk at the first cross-attending layer
    cross_keys_BXGE: list[Tensor]  # one a cross-attending layer, rotated: the last whole chunk's neighbors
    cross_values_BXGE: list[Tensor]
    cross_valid_BX: Tensor
    lengths_B: Tensor  # the place of a row's next token: of those taken so far, padding and `origin` included
    pads_B: Tensor  # the place of its first one, after the padding on the left
    begins_B: Tensor  # the first key that counts: where nothing stands in front `pads_B`
    positions_B: Tensor  # the position of place `origin`
    offsets_B: Tensor  # of a row's next token, in the table of cross-attention
    rotary: tuple[Rotary, Rotary]  # tables of every position, and of those in a chunk
    grows: bool  # wider neighbors take more memory; else they are refused
    chunk_size: int
    encode: Encode  # neighbors whose encoding depends on nothing else
    origin: int = 0  # places before those of a text, for neighbors that stand in front; a multiple of m
    sink_CSGE: Tensor | None = None  # what stands before those neighbors, s = 0 or 1; None = nothing is read in front
    first_position: int = 0  # of a text that reads in front
    interleaved: bool = False  # how keys are rotated
    rows_B: Tensor | None = None  # of the memory that each row has; None = its own
    steps: PreparedSteps | None = field(default=None, init=False, repr=False, compare=False)  # on this memory
    parts: dict[tuple[int, int], "DecodeCache"] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "steps": None, "parts": {}}  # a copy has other memory

    @property
    def capacity(self) -> int:
        """Places, those in front included."""
        return self.keys_BSGE[0].shape[1]

    @property
    def length(self) -> int:
        """The place of the next token. Raises ValueError where that differs from row to row."""
        lengths: list[int] = self.lengths_B.tolist()
        if lengths.count(lengths[0]) != len(lengths):
            raise ValueError(f"the rows hold {lengths} tokens; a block needs rows of one length")
        return lengths[0]

    def part(self, first: int, last: int) -> "DecodeCache":
        """Rows first ... last - 1, sharing memory."""
        if (first, last) not in self.parts:
            cut = slice(first, last)
            rows: dict[str, Any] = {name: getattr(self, name)[cut] for name in OF_ROWS}
            lists: dict[str, Any] = {
                name: [tensor[cut] for tensor in getattr(self, name)] for name in OF_ROWS_AND_LAYERS
            }
            self.parts[first, last] = replace(self, **rows, **lists, grows=False)
        return self.parts[first, last]

    def ahead(self, counts: Sequence[int]) -> "DecodeCache":
        """The next tokens of each row, `counts` of them, as rows of their own, on its memory; they read what it reads now."""
        device = self.lengths_B.device
        rows_B = torch.tensor([row for row, count in enumerate(counts) for _ in range(count)], device=device)
        after_B = torch.tensor([place for count in counts for place in range(count)], device=device)
        key = -len(rows_B), 0
        if key not in self.parts:
            places: dict[str, Any] = {name: getattr(self, name)[rows_B] for name in PLACES}
            self.parts[key] = replace(self, **places, rows_B=rows_B, grows=False)
        part = self.parts[key]
        assert part.rows_B is not None
        part.rows_B.copy_(rows_B)
        for name in PLACES:
            torch.index_select(getattr(self, name), 0, rows_B, out=getattr(part, name))
        part.lengths_B += after_B
        return part

    def clear(self, row: int, pad: int, reads: bool = True) -> None:
        """Make a row ready for a sequence with `pad` tokens of padding on the left; `reads` False = retrieval is off."""
        self.pads_B[row] = self.begins_B[row] = self.origin + pad
        self.positions_B[row] = self.first_position if reads else 0
        self.rewind(row, 0)

    def rewind(self, row: int, length: int) -> None:
        """Back to a row's first tokens, as if it had read no neighbors since."""
        self.lengths_B[row], self.cross_valid_BX[row] = self.origin + length, False
        if self.reads(row):
            self.put_front(row, self.front([]))

    def reads(self, row: int) -> bool:
        """Whether a row reads in front."""
        return self.sink_CSGE is not None and bool(self.positions_B[row])

    def positions(self, places: Places) -> Places:
        """[b] or one, of places that are the same in all rows."""
        if isinstance(places, int):
            return places - self.origin + int(self.positions_B[0])
        return places - self.origin + self.positions_B if self.origin else places

    def front(self, neighbors: Sequence[Tensor]) -> list[Tensor]:
        """The sink and the neighbors [c, t, g, e], best first, as they stand in front of a text: the best next to it. Raises
        ValueError where there is no room.
        """
        assert self.sink_CSGE is not None
        parts = [self.sink_CSGE, *reversed(neighbors)]
        width = sum(part.shape[1] for part in parts)
        if width > self.origin:
            raise ValueError(f"{width} tokens shall stand in front; the cache has room for {self.origin}")
        return parts

    def put_front(self, row: int, parts: Sequence[Tensor]) -> None:
        """What a row reads from now on, keys rotated for their places."""
        end, layers, rotary = int(self.pads_B[row]), len(self.keys_BSGE), self.rotary[0]
        begin = stop = end - sum(part.shape[1] for part in parts)
        self.begins_B[row] = begin
        by_part = []  # of each, what every layer's keys and then every layer's values get
        for part in parts:
            keys, start, stop = part[:layers], stop, stop + part.shape[1]
            if rotary is not None:
                places = torch.arange(start, stop, device=part.device)
                keys = ops.rope(keys, *rotary, positions=places, interleaved=self.interleaved)
            by_part.append((*keys.unbind(), *part[layers:].unbind()))
        for whole, together in zip((*self.keys_BSGE, *self.values_BSGE), zip(*by_part)):
            torch.cat(together, out=whole[row, begin:end])

    def note_padding(self, is_token_BT: Tensor) -> None:
        """Count padding on the left of the next block. Raises ValueError for padding after a token."""
        has_tokens_B = self.pads_B < self.lengths_B
        after_a_token = is_token_BT.long().cummax(1).values.bool() | has_tokens_B[:, None]
        if bool((after_a_token & ~is_token_BT).any()):
            raise ValueError("padding comes after a token: a row of the cache has it on the left alone")
        pads_B = self.lengths_B + (~is_token_BT).sum(1)  # the same again where a block is given again
        for row, has_tokens in enumerate(has_tokens_B.tolist()):
            if not has_tokens:
                self.pads_B[row] = self.begins_B[row] = pads_B[row]
                if self.reads(row):
                    self.put_front(row, self.front([]))

    def move(self, source: int, target: int, ahead: int = 0) -> None:
        """`ahead`: tokens after those that count, which may count yet."""
        length = int(self.lengths_B[source]) + ahead
        for tensor in (*self.keys_BSGE, *self.values_BSGE):
            tensor[target, :length] = tensor[source, :length]
        width = self.cross_width(source)
        for tensor in (*self.cross_keys_BXGE, *self.cross_values_BXGE):
            tensor[target, :width] = tensor[source, :width]
        places = (self.lengths_B, self.pads_B, self.begins_B, self.positions_B)
        for tensor in (self.hidden_BMD, self.cross_valid_BX, *places):
            tensor[target] = tensor[source]

    def cross_width(self, row: int) -> int:
        """Neighbor tokens of a row, up to the last valid one."""
        valid = self.cross_valid_BX[row].nonzero()
        return int(valid[-1]) + 1 if len(valid) else 0

    def put_cross(self, rows: list[int] | slice, pairs_NXGE: Pairs, valid_NX: Tensor) -> None:
        """The rotated keys and values that these rows read from now on; no pairs = none."""
        width = valid_NX.shape[1]
        self._reserve(width)
        self.cross_valid_BX[rows] = False
        self.cross_valid_BX[rows, :width] = valid_NX
        for place, (keys, values) in enumerate(pairs_NXGE):
            self.cross_keys_BXGE[place][rows, :width] = keys.to(self.cross_keys_BXGE[place].dtype)
            self.cross_values_BXGE[place][rows, :width] = values.to(self.cross_values_BXGE[place].dtype)

    def _reserve(self, width: int) -> None:
        held = self.cross_valid_BX.shape[1]
        if width <= held:
            return
        if not self.grows:
            raise ValueError(f"{width} neighbor tokens; the cache holds {held}")

        def wider(narrow_BXGE: Tensor) -> Tensor:
            heads_first = F.pad(narrow_BXGE.transpose(1, 2), (0, 0, 0, width - held))
            return heads_first.contiguous().transpose(1, 2)

        self.cross_keys_BXGE = [wider(keys) for keys in self.cross_keys_BXGE]
        self.cross_values_BXGE = [wider(values) for values in self.cross_values_BXGE]
        self.cross_valid_BX = F.pad(self.cross_valid_BX, (0, width - held))
        self.steps, self.parts = None, {}

    def bytes_per_token(self) -> int:
        return sum(tensor[0, 0].nbytes for tensor in (*self.keys_BSGE, *self.values_BSGE))


def new_cache(
    model: RetroModel,
    batch_size: int,
    capacity: int,
    neighbor_tokens: int | None = None,
    encode: Encode | None = None,
) -> DecodeCache:
    """An empty cache: at most `capacity` tokens a row, which reads at most `neighbor_tokens` (k*r) at a time (None: as
    many as are given; in front as many as the model was made for). `encode`: such as remembers neighbors
    (`Encodings.of`).
    """
    c, device, num_crossing = model.config, model.device, len(model.config.cross_layers)
    dtype = model.cache_dtype  # which looks at every module
    X = (neighbor_tokens or 0) if num_crossing else 0
    sinks, origin = None, 0
    if c.reads_prefix and neighbor_tokens != 0:
        sinks = encode_sink(model)
        in_front = sinks.shape[1] + (c.num_neighbors * c.r if neighbor_tokens is None else neighbor_tokens)
        origin = -(-in_front // c.chunk_size) * c.chunk_size

    def empty(tokens: int, count: int) -> list[Tensor]:
        """In memory each head's tokens follow one another, as a step of decoding reads them."""
        shape = (batch_size, c.key_value_heads, tokens, c.head_width)
        return [untouched_zeros(shape, dtype, device).transpose(1, 2) for _ in range(count)]

    def places() -> Tensor:
        return torch.zeros(batch_size, dtype=torch.long, device=device)

    cache = DecodeCache(
        keys_BSGE=empty(origin + capacity, c.dec_num_layers),
        values_BSGE=empty(origin + capacity, c.dec_num_layers),
        hidden_BMD=torch.zeros(batch_size, c.chunk_size, c.hidden_size, dtype=model.dtype, device=device),
        cross_keys_BXGE=empty(X, num_crossing),
        cross_values_BXGE=empty(X, num_crossing),
        cross_valid_BX=torch.zeros(batch_size, X, dtype=torch.bool, device=device),
        lengths_B=places(),
        pads_B=places(),
        begins_B=places(),
        positions_B=places(),
        offsets_B=places(),
        rotary=(model.decoder_rotary(origin + capacity, device), model.cross_rotary(device)),
        grows=neighbor_tokens is None,
        chunk_size=c.chunk_size,
        encode=partial(encode_each, model) if encode is None else encode,
        origin=origin,
        sink_CSGE=sinks,
        first_position=c.first_position if origin else 0,
        interleaved=c.rotary_interleaved,
    )
    for row in range(batch_size):
        cache.clear(row, 0)
    return cache


def prepared_steps(model: RetroModel, cache: DecodeCache) -> ops.Steps:
    """All layers for one new token a row, prepared on the cache's memory and ready to `run`."""
    if cache.steps is None or not cache.steps.is_of(model.layers):
        decoder, reader = (tables or (None, None) for tables in cache.rotary)
        crossing = iter(zip(cache.cross_keys_BXGE, cache.cross_values_BXGE))
        parts: list[ops.Part] = []
        for layer, keys, values in zip(model.layers, cache.keys_BSGE, cache.values_BSGE):
            a, reading, starts = layer.attention, None, cache.lengths_B
            attending = ops.Attending(
                keys, values, a.scale, cache.begins_B, starts, None, starts, *decoder, a.interleaved, cache.rows_B
            )
            if layer.is_crossing:
                places = (None, None, cache.cross_valid_BX, cache.offsets_B)
                reading = ops.Attending(*next(crossing), layer.cross.scale, *places, *reader, rows=cache.rows_B)
            parts += layer.step_parts(attending, reading)
        cache.steps = PreparedSteps(model.layers, ops.Steps(parts))
    cache.steps.steps.look()
    return cache.steps.steps
