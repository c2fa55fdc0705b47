"""RETRO (arXiv 2112.04426 section 2): a decoder with chunked cross-attention over encoded neighbors.

Every difference between public implementations is one field of `ModelConfig`; this file never asks which
project it imitates. Shape letters: B batch, N tokens, M chunk length, L chunks, K neighbors, R tokens per
neighbor, D width, C encoder width, V vocabulary, S cached tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retro_engine.config import ModelConfig, base_config, check_model
from retro_engine.model import ops
from retro_engine.model.attention import Linear, NeighborProjection, Rotary, is_sharded, norm
from retro_engine.model.cache import Cache, new_cache
from retro_engine.model.decoder import DecoderLayer, Reading
from retro_engine.model.encoder import Encoder, NeighborLayout, Seen, layout_of
from retro_engine.model.initialization import initialize
from retro_engine.model.loss import linear_cross_entropy
from retro_engine.model.quantize import Int8Linear


@dataclass
class _Neighbors:
    """The neighbors of a full pass and who may see what of them."""

    tokens_BLKR: Tensor
    lengths_BLK: Tensor | None  # None = all full
    hidden_seen: Seen  # the chunk's tokens that the encoder may read
    attends_BN: Tensor  # the tokens that get anything from CCA
    front: int  # padding before the first chunk that makes it whole


@dataclass
class _FreshNeighbors:
    """What a cached step encoded for the chunks that it completes."""

    keys_values: list[tuple[Tensor, Tensor]]  # of each cross-attending layer [b, c, k, r, g, e]; empty = no neighbors
    mask_BCS: Tensor  # [b, c, k*r] True = valid


class RetroModel(nn.Module):
    """`forward` is the full pass, `step` the cached one; with `config.retrieval` False a plain decoder."""

    layers: Sequence[DecoderLayer]  # an nn.ModuleList

    def __init__(self, config: ModelConfig, generator: torch.Generator | None = None):
        super().__init__()
        check_model(config)
        if config.vocab_size < 1:
            raise ValueError(f"vocab_size={config.vocab_size}: set it to the tokenizer's")
        self.config = config
        width = config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, width)
        is_learned = "learned" in (config.position_embedding, config.encoder_position_embedding)
        rows = config.max_position_embeddings or config.encoder_seq_length
        self.position_embedding = nn.Embedding(rows, width) if is_learned else None
        self.dropout = nn.Dropout(config.hidden_dropout)
        crossing = config.cross_layers
        layers = [DecoderLayer(config, i) for i in range(config.dec_num_layers)]
        self.layers = nn.ModuleList(layers)  # type: ignore[assignment]
        self.encoder = Encoder(config) if crossing else None
        self.neighbor_projection = NeighborProjection(config) if crossing else None
        is_wider = config.encoder_width != width
        self.encoder_input = Linear(width, config.encoder_width, bias=False) if crossing and is_wider else None
        self.final_norm = norm(config, width) if config.decoder_final_norm else nn.Identity()
        self.head: Linear | Int8Linear | None = None
        if not config.share_embeddings:
            self.head = Linear(width, config.vocab_size, bias=False)
        self.output_bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.output_bias else None
        self.recompute: str | None = None  # None | selective | full: model/recompute.py
        self.packs_neighbors = True  # the encoder computes valid neighbor tokens only (False: every shape is fixed)
        initialize(self, generator)

    def forward(
        self,
        tokens: Tensor,
        neighbors: Tensor | None = None,
        neighbor_lengths: Tensor | None = None,
        document_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """tokens [b, n], neighbors [b, l, k, r], neighbor_lengths [b, l, k], document_ids [b, n] -> logits [b, n, V].

        neighbors None = retrieval off; neighbor_lengths None = all full, 0 = missing; document_ids None = one
        document (or derived from the tokens when the config has eod_id and pad_id), -1 = padding. A document is a run
        of equal ids. With labels [b, n] (-100 = none): the sum of their cross-entropies, without making the logits.
        Raises ValueError naming the argument, its shape and the rule.
        """
        hidden = self.hidden(tokens, neighbors, neighbor_lengths, document_ids)
        if labels is None:
            return self.logits(hidden)
        return linear_cross_entropy(hidden, self.head_weight, self.output_bias, labels)

    @property
    def head_weight(self) -> Tensor:
        """The output matrix [V, d]."""
        assert not isinstance(self.head, Int8Linear), "weights in int8 are for generation"
        return self.embedding.weight if self.head is None else self.head.weight

    def hidden(
        self,
        tokens: Tensor,
        neighbors: Tensor | None = None,
        neighbor_lengths: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> Tensor:
        """The state before the output head, [b, n, d]; arguments as in `forward`."""
        self._check_shapes(tokens, neighbors, neighbor_lengths, document_ids)
        B, N = tokens.shape
        documents = self._documents(tokens, document_ids)
        first_keys = mask = None
        if documents is not None and self.config.reset_attention:
            first_keys = _first_of_run(documents)
        elif documents is not None:
            mask = self._mask_of_padding(documents)
        retrieved = self._neighbor_view(tokens, neighbors, neighbor_lengths, documents)
        x = self._embed(tokens, 0)
        rotary = self.decoder_rotary(N, tokens.device)
        reading = None if retrieved is None else self._reading(retrieved)
        for layer in self.layers:
            x = layer(x, rotary, first_keys, mask, reading)
        return self.final_norm(x) * self.output_scale if self.config.mup else self.final_norm(x)

    @property
    def output_scale(self) -> float:
        """With muP the logits are divided by the width multiplier (arXiv 2203.03466 table 8)."""
        return base_config(self.config).hidden_size / self.config.hidden_size

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d] -> [..., V]"""
        if isinstance(self.head, Int8Linear):
            return self.head(hidden)
        weight, bias = self.head_weight, self.output_bias
        if not is_sharded(weight):
            return ops.linear(hidden, weight, bias)
        from torch.distributed.tensor import DTensor, Replicate

        assert isinstance(weight, DTensor)
        whole = DTensor.from_local(hidden, weight.device_mesh, [Replicate()])
        logits = F.linear(whole, weight, bias)
        assert isinstance(logits, DTensor)
        return logits.full_tensor()

    def set_recompute(self, recompute: str | None) -> None:
        """None, "selective" or "full": what the backward pass computes again."""
        self.recompute = recompute
        for layer in self.layers:
            layer.recompute = recompute
        if self.encoder is not None:
            self.encoder.recompute = recompute

    def new_cache(self, batch_size: int, capacity: int) -> Cache:
        """An empty cache for `step`: at most `capacity` tokens a sequence."""
        weight = self.embedding.weight
        return new_cache(self.config, batch_size, capacity, weight.dtype, weight.device, self.cache_dtype)

    @property
    def cache_dtype(self) -> torch.dtype:
        """The weights' type; bfloat16 beside weights of a byte."""
        is_int8 = any(w.dtype == torch.int8 for layer in self.layers for w in layer.buffers())
        return torch.bfloat16 if is_int8 else self.embedding.weight.dtype

    def step(
        self,
        tokens: Tensor,
        cache: Cache,
        neighbors: Tensor | None = None,
        neighbor_lengths: Tensor | None = None,
        is_token: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """The next t tokens [b, t] of one document each -> logits [b, t, V] ([b, 1, V] with `last_only`).

        neighbors [b, c, k, r] belong to the c chunks that these tokens complete; None = those chunks have none.
        is_token [b, t] False = padding. Equal to the full pass over all tokens so far, in which chunks without
        neighbors are chunks whose neighbors are missing (with cca_bias_everywhere that is not retrieval off).
        """
        c, M = self.config, self.config.chunk_size
        if c.partial_chunk != "last":
            raise ValueError("model.partial_chunk=first cannot be decoded with a cache: use forward")
        if c.eod_id is not None and c.reset_attention and bool((tokens[:, :-1] == c.eod_id).any()):
            raise ValueError(f"tokens hold the end-of-document id {c.eod_id}: a cache decodes one document")
        B, T = tokens.shape
        start, stop = cache.length, cache.length + T
        if stop > cache.capacity:
            raise ValueError(f"the cache holds {cache.capacity} tokens; {stop} were given")
        completed = stop // M - start // M
        if neighbors is not None and neighbors.shape[:2] != (B, completed):
            raise ValueError(f"neighbors has shape {tuple(neighbors.shape)}; expected [{B}, {completed}, k, r]")
        cache.is_token_BS[:, start:stop] = True if is_token is None else is_token
        if is_token is not None and not bool(is_token.all()):
            cache.has_padding, cache.pads_B, cache.steps = True, None, None
        device = tokens.device
        if T == 1 and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            begins = self._padding_on_the_left(cache, stop) if cache.has_padding else None
            if begins is not None or not cache.has_padding:
                return self._step_of_one(tokens, cache, neighbors, neighbor_lengths, begins)
        mask = self._cached_mask(cache, start, stop)
        x = self._embed(tokens, start)
        rotary = self.decoder_rotary(stop, device)
        positions = torch.arange(start, stop, device=device)
        cross_rotary = self.cross_rotary(device)
        fresh: _FreshNeighbors | None = None
        for index, layer in enumerate(self.layers):
            q, k, v = layer.attention.project(layer.attention_norm(x))
            if rotary is not None:
                q, k = ops.rope_qk(q, k, *rotary, positions=positions, interleaved=c.rotary_interleaved)
            cache.keys_BSGE[index][:, start:stop] = k
            cache.values_BSGE[index][:, start:stop] = v
            keys, values = (part[index][:, :stop].to(q.dtype) for part in (cache.keys_BSGE, cache.values_BSGE))
            is_causal = mask is None and T > 1
            attended = ops.masked_attention(q, keys, values, mask, is_causal, scale=layer.attention.scale)
            x = x + layer.attention.out(attended.flatten(-2))
            if layer.is_crossing:
                z = layer.cross_norm(x)
                if fresh is None:
                    fresh = self._encode_completed(z, cache, start, completed, neighbors, neighbor_lengths)
                x = x + self._cached_cross(index, z, cache, fresh, start, cross_rotary)
            x = layer.feed_forward(x)
        if fresh is not None and completed:
            cache.cross_mask = fresh.mask_BCS[:, -1].contiguous()
        cache.length, cache.steps = stop, None
        hidden = self.final_norm(x[:, -1:] if last_only else x)
        return self.logits(hidden * self.output_scale if c.mup else hidden)

    def _step_of_one(
        self,
        tokens_B1: Tensor,
        cache: Cache,
        neighbors: Tensor | None,
        lengths: Tensor | None,
        begins: Tensor | None,
    ) -> Tensor:
        """`step` for one token of each row: -> logits [b, 1, V]."""
        start, M = cache.length, self.config.chunk_size
        if cache.steps is None:
            cache.steps = self._steps_of(cache, begins)
        cache.starts_B.fill_(start)
        cache.offsets_B.fill_((start - (M - 1)) % M + (M - 1 if self.config.cca_query_offset else 0))
        x, begun = self._embed(tokens_B1, start)[:, 0], self.parts_before_reading
        if begun:
            x = cache.steps(x, 0, begun)
            z = self.state_of_one(x)[:, None]
            completed = (start + 1) // M - start // M
            fresh = self._encode_completed(z, cache, start, completed, neighbors, lengths)
            if completed:
                cache.cross_mask = fresh.mask_BCS[:, 0].contiguous()
                rotary = self.cross_rotary(x.device)
                for crossing, (k, v) in zip(self.config.cross_layers, fresh.keys_values):
                    k = k[:, 0] if rotary is None else ops.rope(k[:, 0].flatten(0, 1), *rotary)
                    cache.put_cross(crossing, k.reshape(v[:, 0].shape).flatten(1, 2), v[:, 0].flatten(1, 2))
                cache.steps = self._steps_of(cache, begins)
        x = cache.steps(x, begun)
        cache.length = start + 1
        return self.logits_of_one(x)[:, None]

    def _steps_of(self, cache: Cache, begins: Tensor | None) -> ops.Steps:
        keys, values, valid = cache.cross_keys, cache.cross_values, cache.cross_mask
        if valid is None or not valid.shape[1]:  # no neighbors: keys of no tokens
            keys = values = dict.fromkeys(self.config.cross_layers, cache.keys_BSGE[0][:, :0])
            valid = cache.is_token_BS[:, :0]
        cross = [(keys[layer], values[layer]) for layer in self.config.cross_layers]
        places = (begins, cache.starts_B, cache.offsets_B)
        rotary = self.step_rotary(cache.capacity, cache.starts_B.device)
        return self.steps_of_one((cache.keys_BSGE, cache.values_BSGE), cross, valid, *places, rotary)

    @property
    def parts_before_reading(self) -> int:
        """How many of the parts of `steps_of_one` come before the neighbors are read; 0 = none reads."""
        return 2 * self.config.cross_layers[0] + 1 if self.config.cross_layers else 0

    def steps_of_one(
        self,
        cache: tuple[Sequence[Tensor], Sequence[Tensor]],
        cross: Sequence[tuple[Tensor, Tensor]],
        valid: Tensor | None,
        begins: Tensor | None,
        starts: Tensor,
        offsets: Tensor,
        rotary: tuple[Rotary, Rotary],
    ) -> ops.Steps:
        """All layers for one new token a row, at `starts` [b] and `offsets` [b] of the chunk that attends.

        cache: keys and values [b, s, g, e] of every layer; cross: rotated ones [b, x, g, e] of every cross-attending
        layer, `valid` [b, x]; begins [b]: the first key. Their values may change from step to step. rotary: `step_rotary`.
        """
        decoder, reader = (tables or (None, None) for tables in rotary)
        parts: list[ops.Part] = []
        for index, (layer, keys, values) in enumerate(zip(self.layers, *cache)):
            a, reading = layer.attention, None
            attending = ops.Attending(keys, values, a.scale, begins, starts, None, starts, *decoder, a.interleaved)
            if layer.is_crossing:
                pair = cross[self.config.cross_layers.index(index)]
                reading = ops.Attending(*pair, layer.cross.scale, None, None, valid, offsets, *reader)
            parts += layer.step_parts(attending, reading)
        return ops.Steps(parts)

    def step_rotary(self, capacity: int, device: torch.device) -> tuple[Rotary, Rotary]:
        """The tables of the decoder's `capacity` positions and of those in a chunk."""
        return self.decoder_rotary(capacity, device), self.cross_rotary(device)

    def state_of_one(self, x_BD: Tensor) -> Tensor:
        """The normed state [b, d] at the first cross-attending layer, of what the parts before it gave."""
        return self.layers[self.config.cross_layers[0]].cross_norm(x_BD.to(self.embedding.weight.dtype))

    def logits_of_one(self, x_BD: Tensor) -> Tensor:
        """[b, d] after all layers -> [b, V]"""
        hidden = self.final_norm(x_BD.to(self.embedding.weight.dtype))
        return self.logits(hidden * self.output_scale if self.config.mup else hidden)

    def _padding_on_the_left(self, cache: Cache, stop: int) -> Tensor | None:
        """Padding before each row's first token, int64 [b]; None where some is between or after tokens."""
        if cache.pads_B is None:
            is_token = cache.is_token_BS[:, :stop]
            pads = (~is_token).sum(-1)
            if not bool((is_token == (torch.arange(stop, device=pads.device) >= pads[:, None])).all()):
                return None
            cache.pads_B = pads
        return cache.pads_B

    def _embed(self, tokens: Tensor, start: int) -> Tensor:
        x = self.embedding(tokens) * self.config.input_scale
        if self.config.position_embedding == "learned":
            assert self.position_embedding is not None
            rows = self.position_embedding.num_embeddings
            if start + tokens.shape[1] > rows:
                raise ValueError(f"{start + tokens.shape[1]} tokens; the model has {rows} learned positions")
            x = x + self.position_embedding.weight[start : start + tokens.shape[1]]
        return self.dropout(x)

    def _embed_neighbors(self, tokens_WR: Tensor, layout: NeighborLayout) -> Tensor:
        """Embedded as they lie in `layout`; the encoder's dropout comes after."""
        R = tokens_WR.shape[1]
        tokens = tokens_WR if layout.valid is None else tokens_WR.reshape(-1)[layout.valid]
        y = self.embedding(tokens) * self.config.input_scale
        if self.config.encoder_position_embedding == "learned":
            assert self.position_embedding is not None
            rows = self.position_embedding.weight[:R]
            y = y + (rows if layout.valid is None else rows[layout.valid % R])
        return y if self.encoder_input is None else self.encoder_input(y)

    def _tables(self, num_positions: int, head_width: int, device: torch.device) -> Rotary:
        c = self.config
        dtype = torch.float32 if c.rotary_table_precision == "float32" else self.embedding.weight.dtype
        rotary_width = 2 * (int(head_width * c.rotary_percentage) // 2)
        return ops.rotary_tables(num_positions, rotary_width, c.rotary_base, dtype, device)

    def decoder_rotary(self, num_positions: int, device: torch.device) -> Rotary:
        is_rope = self.config.position_embedding == "rope"
        return self._tables(num_positions, self.config.head_width, device) if is_rope else None

    def cross_rotary(self, device: torch.device) -> Rotary:
        c = self.config
        if c.cca_position_embedding != "rope":
            return None
        return self._tables(max(2 * c.chunk_size - 1, c.r), c.head_width, device)

    def _encoder_rotary(self, device: torch.device) -> Rotary:
        c = self.config
        if c.encoder_position_embedding != "rope":
            return None
        return self._tables(max(c.chunk_size, c.r), c.encoder_width // c.encoder_heads, device)

    def _documents(self, tokens: Tensor, document_ids: Tensor | None) -> Tensor | None:
        """Document of every token, -1 = padding; None = one document and no padding."""
        c = self.config
        if document_ids is None:
            if c.eod_id is None and c.pad_id is None:
                return None
            is_eod = torch.zeros_like(tokens) if c.eod_id is None else (tokens == c.eod_id).long()
            document_ids = is_eod.cumsum(-1) - is_eod  # the end-of-document token closes its own document
            if c.pad_id is not None and c.pad_id != c.eod_id:
                document_ids = torch.where(tokens == c.pad_id, -1, document_ids)
        return document_ids if c.reset_attention else document_ids.clamp(max=0)

    def _mask_of_padding(self, documents_BN: Tensor) -> Tensor:
        """[b, 1, n, n] causal attention across documents, without padding between them (reset_attention=false)."""
        N = documents_BN.shape[1]
        causal = torch.ones(N, N, dtype=torch.bool, device=documents_BN.device).tril()
        itself = torch.eye(N, dtype=torch.bool, device=documents_BN.device)  # padding reads itself: finite, unused
        return (causal & ((documents_BN >= 0)[:, None, :] | itself))[:, None]

    def _neighbor_view(
        self, tokens: Tensor, neighbors: Tensor | None, lengths: Tensor | None, documents: Tensor | None
    ) -> _Neighbors | None:
        """The neighbors with what each token and each chunk may see of them; None = retrieval off."""
        if neighbors is None or neighbors.shape[1] == 0 or self.encoder is None:
            return None
        c, M = self.config, self.config.chunk_size
        B, L, K, R = neighbors.shape
        N = tokens.shape[1]
        front = -N % M if c.partial_chunk == "first" else 0
        position = torch.arange(N, device=tokens.device) + front
        chunk = (position + 1) // M - 1  # the chunk whose neighbors a token attends; -1 = none
        attends = (chunk >= 0).expand(B, N)
        if not c.mask_neighbors:
            return _Neighbors(neighbors, None, None, attends, front)
        if lengths is None and c.pad_id is not None:
            lengths = R - (neighbors == c.pad_id).flip(-1).long().cumprod(-1).sum(-1)
        if front and documents is None:
            documents = torch.zeros_like(tokens)
        if lengths is None and documents is None:
            return _Neighbors(neighbors, None, None, attends, front)
        if lengths is None:
            lengths = torch.full((B, L, K), R, device=tokens.device)
        chunk = chunk.clamp(min=0)
        hidden_seen: Seen = None
        if documents is not None:
            whole = F.pad(documents, (front, 0), value=-1)[:, : L * M].reshape(B, L, M)
            last = whole[:, :, -1]  # the document a chunk's neighbors were retrieved for
            lengths = torch.where((last >= 0)[..., None], lengths, 0)  # a chunk that ends in padding has none
            if c.cca_reset:
                hidden_seen = (_first_of_run(whole)[..., -1], torch.full_like(last, M))
                attends = attends & (documents == last[:, chunk])
            else:
                hidden_seen = _some(whole >= 0)
        attends = attends & (lengths > 0).any(-1)[:, chunk]
        return _Neighbors(neighbors, lengths, hidden_seen, attends, front)

    def _reading(self, retrieved: _Neighbors) -> Reading:
        """Encodes at the first cross-attending layer, and then has keys and values for each: of all at once, or with
        recompute "full" of one at a time, so that only the encoded neighbors are kept.
        """
        assert self.encoder is not None and self.neighbor_projection is not None
        encoder, project_neighbors = self.encoder, self.neighbor_projection
        place = {layer: number for number, layer in enumerate(self.config.cross_layers)}
        M, (B, L, K, R) = self.config.chunk_size, retrieved.tokens_BLKR.shape
        packs = self.packs_neighbors and not torch.compiler.is_compiling()
        layout = layout_of(retrieved.tokens_BLKR, retrieved.lengths_BLK, packs)
        made: list[tuple[Tensor, ...]] = []

        def spread(*parts: Tensor) -> tuple[Tensor, ...]:
            return tuple(layout.padded(part).reshape(B, L, K, R, *part.shape[-2:]) for part in parts)

        def encode(z_BND: Tensor) -> None:
            hidden = F.pad(z_BND, (0, 0, retrieved.front, 0))[:, : L * M].unflatten(1, (L, M))
            tokens = retrieved.tokens_BLKR.reshape(B * L * K, R)
            encoded = encoder(
                self._embed_neighbors(tokens, layout),
                layout,
                hidden,
                retrieved.hidden_seen,
                self._encoder_rotary(z_BND.device),
            )
            if self.recompute == "full" and torch.is_grad_enabled():
                made.extend([(encoded,)] * len(place))
            else:
                made.extend(spread(*pair) for pair in project_neighbors(encoded))

        def keys_values(layer: int, encoded: Tensor) -> tuple[Tensor, Tensor]:
            k, v = spread(*project_neighbors(encoded, place[layer])[0])
            return k, v

        return Reading(
            encode,
            lambda layer: made[place[layer]],
            keys_values,
            retrieved.lengths_BLK,
            retrieved.attends_BN,
            self.cross_rotary(retrieved.tokens_BLKR.device),
            retrieved.front,
        )

    def _cached_mask(self, cache: Cache, start: int, stop: int) -> Tensor | None:
        if not cache.has_padding:
            if start == 0 or stop - start == 1:
                return None
            queries = torch.arange(start, stop, device=cache.is_token_BS.device)
            return (torch.arange(stop, device=queries.device) <= queries[:, None])[None, None]
        queries = torch.arange(start, stop, device=cache.is_token_BS.device)[:, None]
        keys = torch.arange(stop, device=queries.device)
        return ((keys <= queries) & (cache.is_token_BS[:, None, :stop] | (keys == queries)))[:, None]

    def _encode_completed(
        self,
        z_BTD: Tensor,
        cache: Cache,
        start: int,
        completed: int,
        neighbors: Tensor | None,
        lengths: Tensor | None,
    ) -> _FreshNeighbors:
        """Encode the neighbors of the chunks that end in this block, and keep the state of the open chunk."""
        M = self.config.chunk_size
        B, T, D = z_BTD.shape
        open_tokens = start % M
        state = torch.cat((cache.hidden_BMD[:, :open_tokens], z_BTD), 1)
        rest = (start + T) % M
        cache.hidden_BMD[:, :rest] = state[:, completed * M :]
        if completed == 0:
            return _FreshNeighbors([], z_BTD.new_zeros(B, 0, 0, dtype=torch.bool))
        if neighbors is None or neighbors.shape[2] == 0:
            return _FreshNeighbors([], z_BTD.new_zeros(B, completed, 0, dtype=torch.bool))
        first = (start // M) * M
        is_token = cache.is_token_BS[:, first : first + completed * M].reshape(B, completed, M)
        hidden_seen: Seen = None
        if cache.has_padding and self.config.mask_neighbors:
            if lengths is None:
                lengths = torch.full(neighbors.shape[:3], neighbors.shape[3], device=z_BTD.device)
            lengths = torch.where(is_token[:, :, -1:], lengths, 0)
            hidden_seen = _some(is_token)
        hidden = state[:, : completed * M].reshape(B, completed, M, D)
        return _FreshNeighbors(*self.encode_neighbors(hidden, hidden_seen, neighbors, lengths))

    def encode_neighbors(
        self, hidden_BLMD: Tensor, hidden_seen: Seen, neighbors_BLKR: Tensor, lengths_BLK: Tensor | None
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Keys and values [b, l, k, r, g, e] of each cross-attending layer, not rotated, and which of them are valid
        [b, l, k*r]. `hidden_BLMD` is the chunks' normed state at the first cross-attending layer.
        """
        B, L, K, R = neighbors_BLKR.shape
        if lengths_BLK is None or not self.config.mask_neighbors:
            lengths_BLK = torch.full((B, L, K), R, device=hidden_BLMD.device)
        assert self.encoder is not None and self.neighbor_projection is not None
        layout = layout_of(neighbors_BLKR, lengths_BLK, packs=False)
        embedded = self._embed_neighbors(neighbors_BLKR.reshape(B * L * K, R), layout)
        encoded = self.encoder(embedded, layout, hidden_BLMD, hidden_seen, self._encoder_rotary(hidden_BLMD.device))
        pairs = self.neighbor_projection(encoded.reshape(B, L, K, R, -1))
        valid = torch.arange(R, device=hidden_BLMD.device) < lengths_BLK[..., None]
        return pairs, valid.reshape(B, L, K * R)

    def _cached_cross(
        self, index: int, z_BTD: Tensor, cache: Cache, fresh: _FreshNeighbors, start: int, rotary: Rotary
    ) -> Tensor:
        """CCA of a block whose tokens attend the last cached chunk first, then each chunk the block completes."""
        c, M = self.config, self.config.chunk_size
        cross, place = self.layers[index].cross, c.cross_layers.index(index)
        T = z_BTD.shape[1]
        out = torch.zeros_like(z_BTD)
        offset = M - 1 if c.cca_query_offset else 0
        first_chunk = start // M - 1  # the chunk cached before this block
        for number in range(fresh.mask_BCS.shape[1] + 1):
            chunk = first_chunk + number
            begin = max((chunk + 1) * M - 1, start) - start
            end = min((chunk + 2) * M - 1, start + T) - start
            mask = fresh.mask_BCS[:, number - 1] if number else cache.cross_mask
            if number and fresh.keys_values:
                k, v = (part[:, number - 1] for part in fresh.keys_values[place])  # [b, k, r, g, e]
                if rotary is not None:
                    k = ops.rope(k.flatten(0, 1), *rotary).reshape(k.shape)
                cache.put_cross(index, k.flatten(1, 2), v.flatten(1, 2))
            if begin >= end or mask is None or not mask.shape[1] or not bool(mask.any()):
                continue
            q = cross.queries(z_BTD[:, begin:end])
            if rotary is not None:
                first = start + begin - ((chunk + 1) * M - 1) + offset
                q = ops.rope(q, *rotary, positions=torch.arange(first, first + end - begin, device=q.device))
            has_any = mask.any(-1)[:, None, None]
            allowed = (mask | ~mask.any(-1, keepdim=True))[:, None, None, :]
            keys, values = cache.cross_keys[index].to(q.dtype), cache.cross_values[index].to(q.dtype)
            attended = ops.masked_attention(q, keys, values, allowed, scale=cross.scale)
            if not c.cca_bias_everywhere:
                out[:, begin:end] = torch.where(has_any, cross.out(attended.flatten(-2)), 0)
            else:
                out[:, begin:end] = torch.where(has_any, attended.flatten(-2), 0)
        return cross.out(out) if c.cca_bias_everywhere else out

    def _check_shapes(
        self, tokens: Tensor, neighbors: Tensor | None, lengths: Tensor | None, document_ids: Tensor | None
    ) -> None:
        c = self.config
        if tokens.dim() != 2:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}; expected [b, n]")
        B, N = tokens.shape
        if document_ids is not None and document_ids.shape != tokens.shape:
            raise ValueError(f"document_ids has shape {tuple(document_ids.shape)}; expected {tuple(tokens.shape)}")
        if neighbors is None:
            return
        if self.encoder is None:
            raise ValueError("this model is a plain decoder (model.retrieval=false): it takes no neighbors")
        L = -(-N // c.chunk_size) if c.partial_chunk == "first" else N // c.chunk_size
        if neighbors.dim() != 4 or neighbors.shape[:2] != (B, L):
            raise ValueError(
                f"neighbors has shape {tuple(neighbors.shape)}; expected [{B}, {L}, k, r]: "
                f"n={N} tokens make {L} chunks of {c.chunk_size}"
            )
        if neighbors.shape[3] > max(2 * c.chunk_size - 1, c.r):
            raise ValueError(f"neighbors are {neighbors.shape[3]} tokens long; the model takes at most {c.r}")
        if lengths is not None and lengths.shape != neighbors.shape[:3]:
            raise ValueError(
                f"neighbor_lengths has shape {tuple(lengths.shape)}; expected {tuple(neighbors.shape[:3])}"
            )


def _first_of_run(documents: Tensor) -> Tensor:
    """[..., n]: where the run of equal values that each place belongs to begins."""
    place = torch.arange(documents.shape[-1], device=documents.device)
    is_first = F.pad(documents[..., 1:] != documents[..., :-1], (1, 0), value=True)
    return torch.where(is_first, place, 0).cummax(-1).values


def _some(is_read: Tensor) -> Tensor:
    """[..., m] as it is; all of it where nothing is True (finite, and never used)."""
    return is_read | ~is_read.any(-1, keepdim=True)
