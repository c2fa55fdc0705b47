"""Sequences of different lengths that decode together: their cache, and one step of all of them.

A row of the cache is a sequence. Prompts are taken in row by row with `RetroModel.step`; then `step_rows` gives each
row its next token, at its own place. Memory is reserved for `capacity` tokens a row; the system backs what is written.
Letters: B rows, S capacity, T tokens of a row, X neighbor tokens read by a row (k*r), G key/value heads, E head width,
M chunk length, D width, V vocabulary.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from retro_engine.model import ops
from retro_engine.model.attention import Rotary
from retro_engine.model.cache import Cache, empty_keys
from retro_engine.model.retro import RetroModel


@dataclass
class Rows:
    """The decoding state of B sequences; made by `new_rows`. Row tensors are written in place, so parts share them."""

    keys_BSGE: list[Tensor]  # one a decoder layer, rotated
    values_BSGE: list[Tensor]
    hidden_BMD: Tensor  # normed state of each row's open chunk at the first cross-attending layer
    cross_keys_BXGE: list[Tensor]  # one a cross-attending layer, rotated: the last whole chunk's neighbors
    cross_values_BXGE: list[Tensor]
    cross_valid_BX: Tensor
    lengths_B: Tensor  # tokens taken so far, padding included
    pads_B: Tensor  # padding on the left
    offsets_B: Tensor  # of a row's next token in the chunk that attends
    rotary: tuple[Rotary, Rotary]  # of every position, of those in a chunk
    steps: ops.Steps | None = None  # the model's, on this memory
    parts: dict[tuple[int, int], "Rows"] = field(default_factory=dict)

    @property
    def capacity(self) -> int:
        return self.keys_BSGE[0].shape[1]

    def part(self, first: int, last: int) -> "Rows":
        """Rows first ... last - 1, sharing memory."""
        if (first, last) in self.parts:
            return self.parts[first, last]
        cut = slice(first, last)
        self.parts[first, last] = Rows(
            [k[cut] for k in self.keys_BSGE],
            [v[cut] for v in self.values_BSGE],
            self.hidden_BMD[cut],
            [k[cut] for k in self.cross_keys_BXGE],
            [v[cut] for v in self.cross_values_BXGE],
            self.cross_valid_BX[cut],
            self.lengths_B[cut],
            self.pads_B[cut],
            self.offsets_B[cut],
            self.rotary,
        )
        return self.parts[first, last]

    def clear(self, row: int, pad: int) -> None:
        """Make a row ready for a sequence with `pad` tokens of padding on the left."""
        self.lengths_B[row], self.pads_B[row] = 0, pad
        self.cross_valid_BX[row] = False

    def move(self, source: int, target: int) -> None:
        length = int(self.lengths_B[source])
        for tensor in (*self.keys_BSGE, *self.values_BSGE):
            tensor[target, :length] = tensor[source, :length]
        width = self.cross_width(source)
        for tensor in (*self.cross_keys_BXGE, *self.cross_values_BXGE):
            tensor[target, :width] = tensor[source, :width]
        for tensor in (self.hidden_BMD, self.cross_valid_BX, self.lengths_B, self.pads_B):
            tensor[target] = tensor[source]

    def cross_width(self, row: int) -> int:
        """Neighbor tokens of a row, up to the last valid one."""
        valid = self.cross_valid_BX[row].nonzero()
        return int(valid[-1]) + 1 if len(valid) else 0

    def put_cross(self, row: int, keys: list[Tensor], values: list[Tensor], valid_X: Tensor) -> None:
        """The rotated keys and values [x, g, e] that a row reads from now on."""
        width = valid_X.shape[0]
        if width > self.cross_valid_BX.shape[1]:
            raise ValueError(f"{width} neighbor tokens; the cache holds {self.cross_valid_BX.shape[1]}")
        self.cross_valid_BX[row] = False
        self.cross_valid_BX[row, :width] = valid_X
        for place in range(len(keys)):
            self.cross_keys_BXGE[place][row, :width] = keys[place]
            self.cross_values_BXGE[place][row, :width] = values[place]

    def bytes_per_token(self) -> int:
        return sum(tensor[0, 0].nbytes for tensor in (*self.keys_BSGE, *self.values_BSGE))


def new_rows(model: RetroModel, batch_size: int, capacity: int, neighbor_tokens: int) -> Rows:
    """An empty cache: at most `capacity` tokens a row, which reads at most `neighbor_tokens` (k*r) at a time."""
    c, device = model.config, model.embedding.weight.device
    num_crossing = len(c.cross_layers)
    X = neighbor_tokens if num_crossing else 0

    def empty(tokens: int, count: int) -> list[Tensor]:
        return [empty_keys(batch_size, tokens, c, model.cache_dtype, device) for _ in range(count)]

    return Rows(
        empty(capacity, c.dec_num_layers),
        empty(capacity, c.dec_num_layers),
        torch.zeros(batch_size, c.chunk_size, c.hidden_size, dtype=model.embedding.weight.dtype, device=device),
        empty(X, num_crossing),
        empty(X, num_crossing),
        torch.zeros(batch_size, X, dtype=torch.bool, device=device),
        torch.zeros(batch_size, dtype=torch.long, device=device),
        torch.zeros(batch_size, dtype=torch.long, device=device),
        torch.zeros(batch_size, dtype=torch.long, device=device),
        model.step_rotary(capacity, device),
    )


def prefill(
    model: RetroModel,
    rows: Rows,
    row: int,
    tokens_T: Tensor,
    neighbors_LKR: Tensor | None = None,
    lengths_LK: Tensor | None = None,
    last_only: bool = True,
) -> Tensor:
    """The next T tokens of one row, with the neighbors of the chunks that they complete -> logits [t, V] ([1, V])."""
    start, pad, stop = int(rows.lengths_B[row]), int(rows.pads_B[row]), int(rows.lengths_B[row]) + len(tokens_T)
    crossing, width = model.config.cross_layers, rows.cross_width(row)
    one = rows.part(row, row + 1)
    is_token = torch.arange(rows.capacity, device=tokens_T.device)[None] >= pad
    places = (torch.empty_like(one.lengths_B), one.offsets_B)
    cache = Cache(one.keys_BSGE, one.values_BSGE, is_token, one.hidden_BMD, *places, start, start > 0 and pad > 0)
    if width:
        cache.cross_keys = {layer: one.cross_keys_BXGE[i][:, :width] for i, layer in enumerate(crossing)}
        cache.cross_values = {layer: one.cross_values_BXGE[i][:, :width] for i, layer in enumerate(crossing)}
        cache.cross_mask = one.cross_valid_BX[:, :width]
    logits = model.step(
        tokens_T[None],
        cache,
        None if neighbors_LKR is None else neighbors_LKR[None],
        None if lengths_LK is None else lengths_LK[None],
        is_token[:, start:stop],
        last_only=last_only,
    )[0]
    rows.lengths_B[row] = stop
    if stop // model.config.chunk_size > start // model.config.chunk_size and crossing:
        mask = cache.cross_mask
        if mask is None or not mask.shape[1]:
            rows.cross_valid_BX[row] = False
        else:
            keys = [cache.cross_keys[layer][0] for layer in crossing]
            rows.put_cross(row, keys, [cache.cross_values[layer][0] for layer in crossing], mask[0])
    return logits


def step_rows(
    model: RetroModel,
    rows: Rows,
    tokens_B: Tensor,
    ending: list[int],
    neighbors_NKR: Tensor | None = None,
    lengths_NK: Tensor | None = None,
    advances: Tensor | None = None,
) -> Tensor:
    """The next token of every row -> logits [b, V].

    `ending`: the rows whose chunk this token completes, in the order of `neighbors_NKR` (None = they have none).
    `advances` [b] False: the row waits; it is computed, and nothing of it counts.
    """
    c, M, starts = model.config, model.config.chunk_size, rows.lengths_B
    longest = int(starts.max()) + 1
    if longest > rows.capacity:
        raise ValueError(f"the cache holds {rows.capacity} tokens; {longest} were given")
    if rows.steps is None:
        cross = list(zip(rows.cross_keys_BXGE, rows.cross_values_BXGE))
        places = (rows.pads_B, starts, rows.offsets_B, rows.rotary)
        rows.steps = model.steps_of_one((rows.keys_BSGE, rows.values_BSGE), cross, rows.cross_valid_BX, *places)
    x = model.embedding(tokens_B) * c.input_scale
    if c.position_embedding == "learned":
        assert model.position_embedding is not None
        x = x + model.position_embedding(starts)
    rows.offsets_B.copy_((starts - (M - 1)) % M + (M - 1 if c.cca_query_offset else 0))
    begun = model.parts_before_reading
    if begun:
        x = rows.steps(x, 0, begun)
        rows.hidden_BMD[torch.arange(len(starts), device=starts.device), starts % M] = model.state_of_one(x)
        if ending:
            _read_anew(model, rows, ending, neighbors_NKR, lengths_NK)
    x = rows.steps(x, begun)
    rows.lengths_B += 1 if advances is None else advances.long()
    return model.logits_of_one(x)


def _read_anew(
    model: RetroModel, rows: Rows, ending: list[int], neighbors_NKR: Tensor | None, lengths_NK: Tensor | None
) -> None:
    """Encode the neighbors of the chunks that end here and put them where their rows read."""
    if neighbors_NKR is None:
        rows.cross_valid_BX[ending] = False
        return
    hidden = rows.hidden_BMD[ending][:, None]
    lengths = None if lengths_NK is None else lengths_NK[:, None]
    pairs, valid = model.encode_neighbors(hidden, None, neighbors_NKR[:, None], lengths)
    rotated, rotary = [], rows.rotary[1]
    for k, _ in pairs:
        k = k[:, 0]  # [n, k, r, g, e]
        if rotary is not None:
            k = ops.rope(k.flatten(0, 1), *rotary).reshape(k.shape)
        rotated.append(k.flatten(1, 2))
    values = [v[:, 0].flatten(1, 2) for _, v in pairs]
    for number, row in enumerate(ending):
        rows.put_cross(row, [k[number] for k in rotated], [v[number] for v in values], valid[number, 0])
