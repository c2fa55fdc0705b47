"""Decoding with a cache: `prefill` takes blocks of tokens in, `decode_one` one new token of every row.

A block belongs to rows of one length; `decode` answers a batch of prompts with both.
Letters: B rows, T tokens of a block, N rows whose chunk ends, L chunks that a block completes, K neighbors, R tokens per
neighbor, G key/value heads, E head width, M chunk length, D width, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from retro_engine.config import ModelConfig
from retro_engine.errors import UsageError
from retro_engine.model import ops
from retro_engine.model.attention import ChunkedCrossAttention, SelfAttention
from retro_engine.model.decode_cache import DecodeCache, Pairs, new_cache, prepared_steps
from retro_engine.model.decode_prefix import FrontReading, read_in_front
from retro_engine.model.decoder import Places, offset_read
from retro_engine.model.prefix import Encode, padded
from retro_engine.model.retro import RetroModel

ALL = slice(None)
FEW_TOKENS, FEW_SCORES = 128, 1 << 17  # a block of fewer, with fewer scores of queries and keys, is rows of one step
PLAIN = "this model is a plain decoder (model.retrieval=false): it takes no neighbors"


def prefill(
    model: RetroModel,
    cache: DecodeCache,
    tokens_BT: Tensor,
    neighbors_BLKR: Tensor | None = None,
    lengths_BLK: Tensor | None = None,
    *,
    last_only: bool = False,
    keeps_front: bool = False,
) -> Tensor:
    """The next t tokens of rows of equal length, of one document each -> logits [b, t, V] ([b, 1, V] with `last_only`).

    Neighbors belong to the l chunks that these tokens complete; None = those chunks have none. Equal to the full pass over
    all tokens so far, in which chunks without neighbors are chunks whose neighbors are missing (with cca_bias_everywhere
    that is not retrieval off). `keeps_front`: in front of the keys stays what stands there (neighbors that are given for the whole
    text). Raises ValueError for what does not fit.
    """
    start, T = _check_block(model, cache, tokens_BT, neighbors_BLKR, lengths_BLK), tokens_BT.shape[1]
    reads = any(map(cache.reads, range(len(tokens_BT))))
    is_front_new = (
        reads and not keeps_front and start // model.config.chunk_size < (start + T) // model.config.chunk_size
    )
    is_padded = bool((cache.pads_B > start).any())
    if neighbors_BLKR is None and not (model.config.cross_layers or is_front_new or is_padded):
        logits = _prefill_rows(model, cache, tokens_BT, last_only)
        if logits is not None:
            return logits
    reading, front, given = None, None, {"neighbors_BLKR": neighbors_BLKR, "lengths_BLK": lengths_BLK}
    if model.config.cross_layers:
        reading = _CachedReading(model, cache, start, T, **given)
    if reads:
        front = FrontReading(cache, start, T, keeps_front=keeps_front, **given)
    attention = _CachedAttention(cache, start, T, front)
    x = model.run_layers(model.embed(tokens_BT, cache.positions(start)), attention, reading)
    for read in (reading, front):
        if read is not None:
            read.keep()
    cache.lengths_B += T
    return model.logits(model.normed(x[:, -1:] if last_only else x))


def _prefill_rows(model: RetroModel, cache: DecodeCache, tokens_BT: Tensor, last_only: bool) -> Tensor | None:
    """`prefill` of a few tokens that read what stands there, as rows of one step of decoding; None where it is no step in C++."""
    B, T = tokens_BT.shape
    is_short = B * T <= FEW_TOKENS and B * T * (cache.length + T) <= FEW_SCORES
    is_plain = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if not is_short or not is_plain or not ops.steps_in_cpp(cache.hidden_BMD):
        return None
    rows = cache.ahead([T] * B)
    del cache.parts[-B * T, 0]  # else there would be one of every number of tokens
    x = model.embed(tokens_BT.reshape(-1, 1), rows.positions(rows.lengths_B))[:, 0]
    steps = prepared_steps(model, rows)
    if not steps.takes(x):
        return None
    x = steps.run(x).view(B, T, -1)
    cache.lengths_B += T
    return model.logits(model.normed((x[:, -1:] if last_only else x).to(model.dtype)))


def decode_one(
    model: RetroModel,
    cache: DecodeCache,
    tokens_B: Tensor,
    neighbors_NKR: Tensor | None = None,
    lengths_NK: Tensor | None = None,
    *,
    ending: Sequence[int] = (),
    advances_B: Tensor | None = None,
    ahead: Sequence[Sequence[int]] = (),
) -> Tensor:
    """The next token of every row -> logits [b, V]; no gradients.

    `ending`: the rows whose chunk this token completes, in the order of `neighbors_NKR` (None = they have none). Raises
    ValueError for what does not fit.
    `advances_B` False: the row waits; it is computed, and nothing of it counts.
    `ahead`: guesses at what comes after the token of each row -> logits [b + guesses, V], each row's token and then its guesses,
    which must not end a chunk that is read. A guess that holds is counted (`DecodeCache.lengths_B`) by whoever finds it to hold; the
    others' places are written again. In C++ no bit of a token's logits depends on guesses.
    """
    c, places = model.config, cache.lengths_B.tolist()
    counts = [1 + len(guesses) for guesses in ahead] or [1] * len(places)
    last = max(map(sum, zip(places, counts)))
    if last > cache.capacity:
        raise ValueError(f"the cache holds {cache.capacity} tokens; {last} were given")
    if ending or neighbors_NKR is not None:
        _check_ending(model, places, neighbors_NKR, ending)
    if ending and cache.sink_CSGE is not None:
        read_in_front(cache, ending, neighbors_NKR, lengths_NK)
    rows = cache
    is_first: slice | Tensor = ALL
    if any(ahead):
        rows = cache.ahead(counts)
        is_first = torch.tensor([place == 0 for count in counts for place in range(count)], device=tokens_B.device)
        flat = [token for first, guesses in zip(tokens_B.tolist(), ahead) for token in (first, *guesses)]
        tokens_B = torch.tensor(flat, device=tokens_B.device)
    x = model.embed(tokens_B[:, None], rows.positions(rows.lengths_B))[:, 0]
    steps, begun = prepared_steps(model, rows), 0
    if c.cross_layers:
        begun = 2 * c.cross_layers[0] + 1  # the parts before the first cross-attention
        x = steps.run(x, 0, begun)
        z = model.layers[c.cross_layers[0]].cross_norm(x.to(model.dtype)).to(cache.hidden_BMD.dtype)
        _note_places(c, cache, places, z[is_first])
        if ending:
            _read_anew(model, cache, list(ending), neighbors_NKR, lengths_NK)
        if rows is not cache:
            rows = cache.ahead(counts) if ending else rows
            _note_ahead(c, rows, z)
        steps = prepared_steps(model, rows) if ending else steps  # what is read may lie elsewhere now
    x = steps.run(x, begun)
    cache.lengths_B += 1 if advances_B is None else advances_B.long()
    return model.logits(model.normed(x.to(model.dtype)))


def step(
    model: RetroModel,
    cache: DecodeCache,
    tokens_BT: Tensor,
    neighbors_BLKR: Tensor | None = None,
    lengths_BLK: Tensor | None = None,
    *,
    is_token_BT: Tensor | None = None,
    last_only: bool = False,
    keeps_front: bool = False,
) -> Tensor:
    """The next t tokens of rows of equal length: `decode_one` where t = 1, else `prefill`, whose arguments and results it has.

    `is_token_BT` False = padding, before a row's first token; None = as the cache has it (`DecodeCache.clear`).
    """
    start = _check_block(model, cache, tokens_BT, neighbors_BLKR, lengths_BLK)
    if is_token_BT is not None:
        cache.note_padding(is_token_BT)
    is_padded = is_token_BT is not None and not bool(is_token_BT.all())
    if tokens_BT.shape[1] != 1 or is_padded or torch.is_grad_enabled() or torch.compiler.is_compiling():
        given = (neighbors_BLKR, lengths_BLK)
        return prefill(model, cache, tokens_BT, *given, last_only=last_only, keeps_front=keeps_front)
    if (start + 1) % model.config.chunk_size or keeps_front:
        return decode_one(model, cache, tokens_BT[:, 0])[:, None]
    newest = [None if part is None else part[:, 0] for part in (neighbors_BLKR, lengths_BLK)]
    return decode_one(model, cache, tokens_BT[:, 0], *newest, ending=range(len(tokens_BT)))[:, None]


def _note_places(config: ModelConfig, cache: DecodeCache, places: list[int], z_BD: Tensor) -> None:
    """Where the new tokens are in their chunks, and their state at the first cross-attending layer."""
    M, place = config.chunk_size, places[0]
    if places.count(place) == len(places):  # two small ops instead of many
        cache.hidden_BMD[:, place % M] = z_BD
        cache.offsets_B.fill_(_cross_position(config, place))
        return
    rows = torch.arange(len(places), device=z_BD.device)
    cache.hidden_BMD[rows, cache.lengths_B % M] = z_BD
    cache.offsets_B.copy_(_cross_position(config, cache.lengths_B))


def _note_ahead(config: ModelConfig, ahead: DecodeCache, z_BD: Tensor) -> None:
    """The same of several tokens a row, when no chunk that ended is needed any more."""
    ahead.hidden_BMD[ahead.rows_B, ahead.lengths_B % config.chunk_size] = z_BD
    ahead.offsets_B.copy_(_cross_position(config, ahead.lengths_B))


class _CachedAttention:
    """Self-attention of a block over the cache, which it writes the block's keys and values to."""

    def __init__(self, cache: DecodeCache, start: int, T: int, front: FrontReading | None):
        self.cache, self.start, self.stop, self.front = cache, start, start + T, front
        self.positions = torch.arange(start, start + T, device=cache.lengths_B.device)
        self.begins_B = cache.begins_B.clamp(max=self.stop) if bool(cache.begins_B.any()) else None

    def __call__(self, layer: int, attention: SelfAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rotary = self.cache.rotary[0]
        if rotary is not None:
            q, k = ops.rope_qk(q, k, *rotary, positions=self.positions, interleaved=attention.interleaved)
        if self.front is not None:
            return self.front.attend(layer, attention, q, k, v).flatten(-2)
        keys, values = self.cache.keys_BSGE[layer], self.cache.values_BSGE[layer]
        keys[:, self.start : self.stop], values[:, self.start : self.stop] = k, v
        seen = keys[:, : self.stop], values[:, : self.stop]
        read = ops.attention(q.to(keys.dtype), *seen, True, key_begins=self.begins_B, scale=attention.scale)
        return read.flatten(-2).to(q.dtype)


class _CachedReading:
    """The neighbors of a block: its first tokens read what the rows have read so far, the others those of the chunks that
    the block completes.
    """

    def __init__(
        self,
        model: RetroModel,
        cache: DecodeCache,
        start: int,
        T: int,
        neighbors_BLKR: Tensor | None,
        lengths_BLK: Tensor | None,
    ):
        M = model.config.chunk_size
        self.model, self.cache, self.start, self.T = model, cache, start, T
        self.neighbors_BLKR, self.lengths_BLK = neighbors_BLKR, lengths_BLK
        self.border = min(M - 1 - start % M, T)  # the first token of the block that ends a chunk
        self.completed = (start + T) // M - start // M
        self.pairs: Pairs = []  # of the completed chunks [b, l, k, r, g, e], not rotated; empty = no neighbors
        self.open = cache.hidden_BMD[:, :0]  # the state of the chunk that is open after the block

    def encode(self, z_BND: Tensor) -> None:
        M = self.model.config.chunk_size
        state = torch.cat((self.cache.hidden_BMD[:, : self.start % M].to(z_BND.dtype), z_BND), 1)
        whole, self.open = state[:, : self.completed * M], state[:, self.completed * M :]
        if self.completed and self.neighbors_BLKR is not None and self.neighbors_BLKR.shape[2]:
            first_B = torch.full_like(self.cache.lengths_B, self.start // M * M)
            chunks = whole.unflatten(1, (self.completed, M))
            arguments = (chunks, first_B, self.cache.pads_B, self.neighbors_BLKR, self.lengths_BLK)
            self.pairs, self.lengths_BLK = _encode(self.model, self.cache.encode, *arguments)

    def encoded(self, layer: int) -> tuple[Tensor, ...]:
        return self.pairs[self.model.config.cross_layers.index(layer)] if self.pairs else ()

    def attend(self, layer: int, cross: ChunkedCrossAttention, q: Tensor, *encoded: Tensor) -> tuple[Tensor, Tensor]:
        before, attends_before = self._read_before(layer, cross, q[:, : self.border])
        after, attends_after = self._read_after(cross, q[:, self.border :], *encoded)
        return torch.cat((before, after), 1), torch.cat((attends_before, attends_after), 1)

    def _read_before(self, layer: int, cross: ChunkedCrossAttention, q: Tensor) -> tuple[Tensor, Tensor]:
        c, cache = self.model.config, self.cache
        valid_BX = cache.cross_valid_BX
        has_any = valid_BX.any(-1, keepdim=True)
        attends = has_any.expand(q.shape[:2])
        if not q.shape[1] or not valid_BX.shape[1] or not bool(has_any.any()):
            return torch.zeros_like(q).flatten(-2), attends
        if cache.rotary[1] is not None:
            places = torch.arange(self.start, self.start + q.shape[1], device=q.device)
            q = ops.rope(q, *cache.rotary[1], positions=_cross_position(c, places))
        place = c.cross_layers.index(layer)
        keys, values = (part[place].to(q.dtype) for part in (cache.cross_keys_BXGE, cache.cross_values_BXGE))
        allowed = (valid_BX | ~has_any)[:, None, None, :]
        return ops.masked_attention(q, keys, values, allowed, scale=cross.scale).flatten(-2), attends

    def _read_after(self, cross: ChunkedCrossAttention, q: Tensor, *encoded: Tensor) -> tuple[Tensor, Tensor]:
        """As in the full pass, of a sequence that begins with the first completed chunk."""
        M = self.model.config.chunk_size
        if not encoded:
            return torch.zeros_like(q).flatten(-2), torch.zeros(q.shape[:2], dtype=torch.bool, device=q.device)
        assert self.lengths_BLK is not None
        q_padded = F.pad(q, (0, 0, 0, 0, M - 1, 0))
        out = cross.attend(q_padded, encoded[0], encoded[1], self.lengths_BLK, self.cache.rotary[1])
        has_any = (self.lengths_BLK > 0).any(-1).repeat_interleave(M, 1)[:, : q.shape[1]]
        return out[:, M - 1 :], has_any

    def keep(self) -> None:
        """What comes after the block needs: the last completed chunk's neighbors, and the state of the chunk that is open.

        Only now, when nothing can fail: a block that was refused may be given again, mended.
        """
        if self.completed and self.pairs:
            assert self.lengths_BLK is not None
            last = [(k[:, -1], v[:, -1]) for k, v in self.pairs]
            _keep(self.cache, ALL, last, self.lengths_BLK[:, -1])
        elif self.completed:
            self.cache.cross_valid_BX[:] = False
        self.cache.hidden_BMD[:, : self.open.shape[1]] = self.open


def _read_anew(
    model: RetroModel, cache: DecodeCache, ending: list[int], neighbors_NKR: Tensor | None, lengths_NK: Tensor | None
) -> None:
    """Encode the neighbors of the chunks that end here and put them where their rows read."""
    if neighbors_NKR is None or not neighbors_NKR.shape[1]:
        cache.cross_valid_BX[ending] = False
        return
    M = model.config.chunk_size
    first_N = cache.lengths_B[ending] // M * M
    lengths_NLK = None if lengths_NK is None else lengths_NK[:, None]
    chunks = cache.hidden_BMD[ending][:, None].to(model.dtype)
    arguments = (chunks, first_N, cache.pads_B[ending], neighbors_NKR[:, None], lengths_NLK)
    pairs, lengths = _encode(model, cache.encode, *arguments)
    _keep(cache, ending, [(k[:, 0], v[:, 0]) for k, v in pairs], lengths[:, 0])


def _encode(
    model: RetroModel,
    encode: Encode,
    chunks_NLMD: Tensor,
    first_N: Tensor,
    pads_N: Tensor,
    neighbors_NLKR: Tensor,
    lengths_NLK: Tensor | None,
) -> tuple[Pairs, Tensor]:
    """Keys and values [n, l, k, r, g, e], not rotated, and how many tokens of each neighbor count.

    `first_N`: where the first of the l chunks begins; padding is not read, and a chunk of nothing else has no neighbors.
    """
    L, M = chunks_NLMD.shape[1:3]
    R, seen = neighbors_NLKR.shape[-1], None
    if lengths_NLK is None or not model.config.mask_neighbors:
        lengths_NLK = torch.full(neighbors_NLKR.shape[:3], R, device=chunks_NLMD.device)
    if model.config.mask_neighbors and bool((pads_N > first_N).any()):
        chunk_NL = first_N[:, None] + M * torch.arange(L, device=first_N.device)
        pads_NL = (pads_N[:, None] - chunk_NL).clamp(0, M)  # in each chunk
        lengths_NLK = torch.where((pads_NL < M)[..., None], lengths_NLK, 0)
        seen = (pads_NL.clamp(max=M - 1), torch.full_like(pads_NL, M))
    if not model.config.encodes_alone:
        return model.encode_neighbors(chunks_NLMD, seen, neighbors_NLKR, lengths_NLK), lengths_NLK
    return _encode_alone(model, encode, neighbors_NLKR, lengths_NLK, chunks_NLMD.dtype), lengths_NLK


def _encode_alone(
    model: RetroModel, encode: Encode, neighbors_NLKR: Tensor, lengths_NLK: Tensor, dtype: torch.dtype
) -> Pairs:
    """As `RetroModel.encode_neighbors`; 0 where there is no token."""
    tokens, lengths = neighbors_NLKR.flatten(0, 2), lengths_NLK.flatten()
    out = padded(encode, tokens, lengths, shape=model.config.encoded_shape, dtype=dtype)
    out = out.unflatten(1, neighbors_NLKR.shape[:3])
    return list(zip(*out.chunk(2)))


def _keep(cache: DecodeCache, rows: list[int] | slice, pairs_NKRGE: Pairs, lengths_NK: Tensor) -> None:
    """Rotate keys, and put them with their values where the rows read."""
    rotated, rotary = [], cache.rotary[1]
    for k, v in pairs_NKRGE:
        if rotary is not None:
            k = ops.rope(k.flatten(0, 1), *rotary).reshape(v.shape)
        rotated.append((k.flatten(1, 2), v.flatten(1, 2)))
    R = pairs_NKRGE[0][0].shape[2]
    valid = torch.arange(R, device=lengths_NK.device) < lengths_NK[..., None]
    cache.put_cross(rows, rotated, valid.flatten(1))


def _cross_position(config: ModelConfig, places: Places) -> Places:
    """The positions of queries in the table of cross-attention."""
    return offset_read(places, config.chunk_size) + (config.chunk_size - 1 if config.cca_query_offset else 0)


def _check_ending(model: RetroModel, places: list[int], neighbors_NKR: Tensor | None, ending: Sequence[int]) -> None:
    if neighbors_NKR is not None and not model.config.retrieval:
        raise ValueError(PLAIN)
    if neighbors_NKR is not None and len(neighbors_NKR) != len(ending):
        raise ValueError(f"neighbors has shape {tuple(neighbors_NKR.shape)}; expected [{len(ending)}, k, r]")
    if any((places[row] + 1) % model.config.chunk_size for row in ending):
        raise ValueError(
            f"rows {list(ending)} at places {places}: not all of them end a chunk of {model.config.chunk_size}"
        )


def _check_block(
    model: RetroModel, cache: DecodeCache, tokens_BT: Tensor, neighbors_BLKR: Tensor | None, lengths_BLK: Tensor | None
) -> int:
    """Where the block begins."""
    c, (B, T), start = model.config, tokens_BT.shape, cache.length
    if c.partial_chunk != "last":
        raise ValueError("model.partial_chunk=first cannot be decoded with a cache: use forward")
    if c.eod_id is not None and c.reset_attention and bool((tokens_BT[:, :-1] == c.eod_id).any()):
        raise ValueError(f"tokens hold the end-of-document id {c.eod_id}: a cache decodes one document")
    if start + T > cache.capacity:
        raise ValueError(f"the cache holds {cache.capacity} tokens; {start + T} were given")
    if neighbors_BLKR is not None and not c.retrieval:
        raise ValueError(PLAIN)
    if c.position_embedding == "learned" and len(set(cache.positions_B.tolist())) > 1:
        raise ValueError("some rows of the block read in front and some do not: their learned positions differ")
    completed = (start + T) // c.chunk_size - start // c.chunk_size
    if neighbors_BLKR is not None and neighbors_BLKR.shape[:2] != (B, completed):
        raise ValueError(f"neighbors has shape {tuple(neighbors_BLKR.shape)}; expected [{B}, {completed}, k, r]")
    if lengths_BLK is not None and (neighbors_BLKR is None or lengths_BLK.shape != neighbors_BLKR.shape[:3]):
        given = "none" if neighbors_BLKR is None else str(tuple(neighbors_BLKR.shape))
        raise ValueError(f"neighbor lengths have shape {tuple(lengths_BLK.shape)}; neighbors {given}")
    return start


def greedy(logits_BV: Tensor) -> Tensor:
    return logits_BV.argmax(-1)


def decode(
    model: RetroModel,
    prompts: Sequence[Sequence[int]],
    neighbors_BKR: Tensor | None,
    lengths_BK: Tensor | None,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    choose: Callable[[Tensor], Tensor] = greedy,
    encode: Encode | None = None,
) -> list[list[int]]:
    """A batch of prompts answered together, to the end of the longest answer; the stop id that ended one is not in it.

    Prompts are padded on the left to the longest; with given neighbors to the same whole number of chunks, so that each one's
    last token ends a chunk and they act from that token on. In front they act from its first token on, wherever chunks end. `neighbors_BKR` None =
    retrieval off; `choose` makes tokens [b] of logits [b, V]; `encode` as of `new_cache`. Raises ValueError for an empty prompt,
    UsageError for more tokens than the model has positions.
    """
    if not all(prompts):
        raise ValueError("a prompt is empty: there is nothing to continue")
    device, M, B = model.device, model.config.chunk_size, len(prompts)
    if not model.config.retrieval:
        neighbors_BKR = None
    longest, keeps = max(map(len, prompts)), model.config.reads_prefix
    length = longest if neighbors_BKR is None or keeps else -(-longest // M) * M
    neighbor_tokens = 0 if neighbors_BKR is None else neighbors_BKR[0].numel()
    most, front = model.config.most_tokens, model.config.positions_in_front(neighbor_tokens)
    if most is not None and front + length + max_new_tokens > most:
        what = f"{length} prompt and {max_new_tokens} new tokens"
        raise UsageError(what, f"the model has {most} positions", "ask for fewer")
    rows = [[pad_id] * (length - len(prompt)) + [*prompt] for prompt in prompts]
    block = torch.tensor(rows, device=device)
    cache = new_cache(model, B, length + max_new_tokens, neighbor_tokens, encode)
    for row, prompt in enumerate(prompts):
        cache.clear(row, length - len(prompt))
    if neighbors_BKR is not None and keeps:
        read_in_front(cache, range(B), neighbors_BKR.to(device), None if lengths_BK is None else lengths_BK.to(device))
        neighbors_BKR = None  # there they stay
    answers: list[list[int]] = [[] for _ in range(B)]
    is_open = torch.ones(B, dtype=torch.bool)
    for _ in range(max_new_tokens):
        chunks = (cache.length + block.shape[1]) // M - cache.length // M
        neighbors = lengths = None
        if neighbors_BKR is not None and chunks:
            neighbors = neighbors_BKR.to(device)[:, None].expand(-1, chunks, -1, -1)
            full = torch.full(neighbors_BKR.shape[:2], neighbors_BKR.shape[2]) if lengths_BK is None else lengths_BK
            lengths = full.to(device)[:, None].expand(-1, chunks, -1).clone()
            lengths[:, :-1] = 0  # the chunks before the prompt's last one have none
        with torch.no_grad():
            logits = step(model, cache, block, neighbors, lengths, last_only=True, keeps_front=keeps)[:, 0]
        chosen = choose(logits).cpu()
        for row, token in enumerate(chosen.tolist()):
            if is_open[row] and token in stop_ids:
                is_open[row] = False
            elif is_open[row]:
                answers[row].append(token)
        if not is_open.any():
            break
        block = chosen.to(device)[:, None]
    return answers
