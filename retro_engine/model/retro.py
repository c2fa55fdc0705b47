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
from retro_engine.errors import UsageError
from retro_engine.model import ops
from retro_engine.model.attention import ChunkedCrossAttention, NeighborProjection, Rotary, SelfAttention, norm
from retro_engine.model.decoder import CausalAttention, DecoderLayer, Reading, chunk_read
from retro_engine.model.encoder import Encoder, NeighborLayout, Seen, layout_of
from retro_engine.model.initialization import initialize
from retro_engine.model.linear import ROUNDED, BlockEmbedding, BlockLinear, Int8Linear, Linear, is_sharded
from retro_engine.model.loss import each_cross_entropy, linear_cross_entropy
from retro_engine.model.prefix import Encode, Pairs, PrefixAttention, Recording, padded, stacked
from retro_engine.model.shared_reading import SharedReading


@dataclass
class _Neighbors:
    """The neighbors of a full pass and who may see what of them."""

    tokens_BLKR: Tensor
    lengths_BLK: Tensor | None  # None = all full
    hidden_seen: Seen  # the chunk's tokens that the encoder may read
    attends_BN: Tensor  # the tokens that get anything from CCA
    front: int  # padding before the first chunk that makes it whole


class RetroModel(nn.Module):
    """`forward` is the full pass (model/decoding.py has the one with a cache); with `config.retrieval` False a plain decoder."""

    layers: Sequence[DecoderLayer]  # an nn.ModuleList

    def __init__(self, config: ModelConfig, generator: torch.Generator | None = None):
        super().__init__()
        check_model(config)
        if config.vocab_size < 1:
            raise ValueError(f"vocab_size={config.vocab_size}: set it to the tokenizer's")
        self.config = config
        width = config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, width)  # or for generation a BlockEmbedding
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
        self.head: Linear | Int8Linear | BlockLinear | None = None
        if not config.share_embeddings:
            self.head = Linear(width, config.vocab_size, bias=False)
        self.output_bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.output_bias else None
        self.recompute: str | None = None  # None | selective | full: model/recompute.py
        self.kept: Encode | None = None  # of neighbors in front, where those are kept (Encodings.of); no gradients
        self.stride: int | None = (
            None  # tokens until a full pass reads other neighbors; None = a chunk's (evaluate/strides.py)
        )
        self.packs_neighbors = True  # the encoder computes valid neighbor tokens only (False: every shape is fixed)
        initialize(self, generator)

    def forward(
        self,
        tokens: Tensor,
        neighbors: Tensor | None = None,
        neighbor_lengths: Tensor | None = None,
        document_ids: Tensor | None = None,
        labels: Tensor | None = None,
        reads: Tensor | None = None,
        is_each: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """tokens [b, n], neighbors [b, l, k, r], neighbor_lengths [b, l, k], document_ids [b, n] -> logits [b, n, V].

        neighbors None = retrieval off; neighbor_lengths None = all full, 0 = missing; document_ids None = one
        document (or derived from the tokens when the config has eod_id and pad_id), -1 = padding. A document is a run
        of equal ids. With labels [b, n] (-100 = none): the sum of their cross-entropies, without making the logits of all
        tokens at once; with `is_each` the cross-entropy of each [b, n] and the most likely tokens [b, n].
        With `reads` [b, k] (reading=prefix) neighbors [w, r] of lengths [w] are shared, and row b reads those numbers in front
        from its first token on, the best first, -1 = none; its padding is on the right (model/shared_reading.py).
        Raises ValueError naming the argument, its shape and the rule.
        """
        hidden = self.hidden(tokens, neighbors, neighbor_lengths, document_ids, reads)
        if labels is None:
            return self.logits(hidden)
        if is_each:
            return each_cross_entropy(hidden, self.logits, labels)
        return linear_cross_entropy(hidden, self.head_weight, self.output_bias, labels)

    @property
    def head_weight(self) -> Tensor:
        """The output matrix [V, d]."""
        head = self.embedding if self.head is None else self.head
        assert not isinstance(head, ROUNDED), "rounded weights are for generation"
        return head.weight

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in: the weights' type; float32 around those in blocks."""
        weight = self.embedding.weight
        return weight.dtype if weight.is_floating_point() else torch.float32

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def hidden(
        self,
        tokens: Tensor,
        neighbors: Tensor | None = None,
        neighbor_lengths: Tensor | None = None,
        document_ids: Tensor | None = None,
        reads: Tensor | None = None,
    ) -> Tensor:
        """The state before the output head, [b, n, d]; arguments as in `forward`."""
        if reads is not None:
            return self._hidden_of_readers(tokens, neighbors, neighbor_lengths, document_ids, reads)
        self._check_shapes(tokens, neighbors, neighbor_lengths, document_ids)
        B, N = tokens.shape
        documents = self._documents(tokens, document_ids)
        first_keys = mask = None
        if documents is not None and self.config.reset_attention:
            first_keys = _first_of_run(documents)
        elif documents is not None:
            mask = self._mask_of_padding(documents)
        retrieved = self._neighbor_view(tokens, neighbors, neighbor_lengths, documents)
        attending: CausalAttention = _FullAttention(self.decoder_rotary(N, tokens.device), first_keys, mask)
        reading, start = None, 0
        if retrieved is not None and self.config.reads_prefix:
            attending = self._prefix_attention(retrieved, N, first_keys)
            start = self.config.first_position
        elif retrieved is not None:
            reading = _FullReading(self, retrieved)
        return self.normed(self.run_layers(self.embed(tokens, start), attending, reading))

    def _hidden_of_readers(
        self,
        tokens: Tensor,
        passages_WR: Tensor | None,
        lengths_W: Tensor | None,
        documents: Tensor | None,
        reads_QK: Tensor,
    ) -> Tensor:
        """[q, n, d] of texts that read shared passages."""
        if not self.config.reads_prefix or passages_WR is None or lengths_W is None or passages_WR.dim() != 2:
            raise ValueError("reads needs model.reading=prefix, neighbors [w, r] and neighbor_lengths [w]")
        lengths_Q = (torch.ones_like(tokens) if documents is None else documents >= 0).sum(1)
        shared = SharedReading(
            self.config, passages_WR, lengths_W=lengths_W, texts_QN=tokens, lengths_Q=lengths_Q, reads_QK=reads_QK
        )
        self._check_room(shared.X, tokens.shape[1])
        shared.rotary = self.decoder_rotary(shared.num_positions, tokens.device)
        x = self.run_layers(self.embed(shared.tokens_T[:, None], shared.positions_T).transpose(0, 1), shared, None)
        return shared.spread(self.normed(x)[0])

    def _check_room(self, X: int, N: int) -> None:
        most = self.config.most_tokens
        if most is not None and most < X + N:
            raise UsageError(f"{X} tokens in front of {N}", f"the model has {most} positions", "fewer or shorter ones")

    def _prefix_attention(self, retrieved: _Neighbors, N: int, first_keys: Tensor | None) -> PrefixAttention:
        B, L, K, R = retrieved.tokens_BLKR.shape
        lengths = retrieved.lengths_BLK
        if lengths is None:
            lengths = torch.full((B, L, K), R, device=retrieved.tokens_BLKR.device)
        tokens_WR, lengths_W = retrieved.tokens_BLKR.flatten(0, 2), lengths.flatten()
        alone = self.run_alone(tokens_WR) if self.kept is None else self._kept_alone(self.kept, tokens_WR, lengths_W)
        pairs = [tuple(part.unflatten(0, (B, L, K)) for part in pair) for pair in alone]
        sinks = self.sinks()
        X = sinks[0][0].shape[1] + K * R
        self._check_room(X, N)
        rotary = self.decoder_rotary(X + N, lengths.device)
        return PrefixAttention(
            pairs,
            sinks,
            lengths_BLK=lengths,
            attends_BN=retrieved.attends_BN,
            rotary=rotary,
            first_keys=first_keys,
            chunk_size=self.exchange_length,
        )

    def run_alone(self, tokens_WR: Tensor) -> Pairs:
        """Keys and values [w, r, g, e] of every decoder layer for neighbors that run alone, behind the sink; not rotated."""
        tokens, S = self._behind_sink(tokens_WR), 0 if self.config.sink_id is None else 1
        recording = Recording(self.decoder_rotary(tokens.shape[1], tokens.device))
        self.run_layers(self.embed(tokens, 0), recording, None)
        return [(k[:, S:], v[:, S:]) for k, v in recording.pairs]

    def _kept_alone(self, encode: Encode, tokens_WR: Tensor, lengths_W: Tensor) -> Pairs:
        """As `run_alone`, of what is kept, in the type that products have; 0 where there is no token."""
        kind, dtype = tokens_WR.device.type, self.dtype
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
        return list(zip(*padded(encode, tokens_WR, lengths_W, shape=self.config.encoded_shape, dtype=dtype).chunk(2)))

    def encode_alone(self, tokens_WR: Tensor, lengths_W: Tensor) -> Tensor:
        """What is read of neighbors that depend on nothing else (`ModelConfig.encodes_alone`): keys of all reading layers,
        then their values, [c, w, r, g, e], not rotated.
        """
        if self.config.reads_prefix:
            pairs = self.run_alone(tokens_WR)
        else:
            assert self.neighbor_projection is not None
            layout = layout_of(tokens_WR[None, None], lengths_W[None, None], packs=False)
            pairs = self.neighbor_projection(self.encode(tokens_WR[None, None], layout, None, None))
        return stacked(pairs)

    def sinks(self) -> Pairs:
        """Keys and values [1, s, g, e] of every decoder layer for the token that stands before the neighbors; s is 0 or 1."""
        device = self.device
        if self.config.sink_id is None:
            G, E = self.config.key_value_heads, self.config.head_width
            none = torch.zeros(1, 0, G, E, dtype=self.dtype, device=device)
            return [(none, none)] * self.config.dec_num_layers
        recording = Recording(self.decoder_rotary(1, device))
        token = torch.tensor([[self.config.sink_id]], device=device)
        self.run_layers(self.embed(token, 0), recording, None)
        return recording.pairs

    def _behind_sink(self, tokens_WR: Tensor) -> Tensor:
        sink_id = self.config.sink_id
        return tokens_WR if sink_id is None else F.pad(tokens_WR, (1, 0), value=sink_id)

    def run_layers(self, x: Tensor, attending: CausalAttention, reading: Reading | None) -> Tensor:
        """[b, n, d] -> [b, n, d]: all decoder layers; `reading` None = retrieval off."""
        for layer in self.layers:
            x = layer(x, attending, reading)
        return x

    def normed(self, x: Tensor) -> Tensor:
        """What the output head takes, [..., d] -> [..., d]."""
        return self.final_norm(x) * self.output_scale if self.config.mup else self.final_norm(x)

    @property
    def exchange_length(self) -> int:
        """Tokens after which a full pass reads other neighbors."""
        return self.stride or self.config.chunk_size

    @property
    def output_scale(self) -> float:
        """With muP the logits are divided by the width multiplier (arXiv 2203.03466 table 8)."""
        return base_config(self.config).hidden_size / self.config.hidden_size

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d] -> [..., V]"""
        if isinstance(self.head, ROUNDED):
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
        """None, "selective" or "full": what the backward pass computes again. Raises UsageError where it cannot."""
        if recompute is not None and self.config.reads_prefix:
            raise UsageError(
                f"model.activations_checkpoint_granularity={recompute}",
                "model.reading=prefix reads keys and values that a second pass would make anew",
                "leave it out",
            )
        self.recompute = recompute
        for layer in self.layers:
            layer.recompute = recompute
        if self.encoder is not None:
            self.encoder.recompute = recompute

    @property
    def num_parameters(self) -> int:
        """Weights, in whatever type they are kept; a matrix that embedding and head share counts once."""
        count = sum(parameter.numel() for parameter in self.parameters())
        rounded = [module for module in self.modules() if isinstance(module, ROUNDED) and module is not self.head]
        if isinstance(self.head, ROUNDED) and not self.config.share_embeddings:
            count += self.head.num_weights  # its bias is a parameter still
        biases = [m.bias for m in rounded if not isinstance(m, BlockEmbedding) and m.bias is not None]
        return count + sum(module.num_weights for module in rounded) + sum(map(len, biases))

    @property
    def cache_dtype(self) -> torch.dtype:
        """The weights' type; bfloat16 beside weights of a byte."""
        is_rounded = any(isinstance(part, ROUNDED) for layer in self.layers for part in layer.modules())
        return torch.bfloat16 if is_rounded else self.dtype

    def embed(self, tokens: Tensor, start: int | Tensor) -> Tensor:
        """[b, n] -> [b, n, d]; `start`: the first token's position, or with n = 1 those of every row [b]."""
        x = self.embedding(tokens) * self.config.input_scale
        most = self.config.most_tokens
        if most is not None:
            last = (int(start.max()) if isinstance(start, Tensor) else start) + tokens.shape[1]
            if last > most:
                raise ValueError(f"{last} tokens; the model has {most} positions")
        if self.config.position_embedding == "learned":
            assert self.position_embedding is not None
            if isinstance(start, Tensor):
                x = x + self.position_embedding(start)[:, None]
            else:
                x = x + self.position_embedding.weight[start:last]
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

    def _tables(
        self, num_positions: int, head_width: int, device: torch.device, factors: Sequence[float] | None = None
    ) -> Rotary:
        c = self.config
        dtype = torch.float32 if c.rotary_table_precision == "float32" else self.dtype
        rotary_width = 2 * (int(head_width * c.rotary_percentage) // 2)
        return ops.rotary_tables(num_positions, rotary_width, c.rotary_base, dtype, device, factors=factors)

    def decoder_rotary(self, num_positions: int, device: torch.device) -> Rotary:
        c = self.config
        is_rope = c.position_embedding == "rope"
        return self._tables(num_positions, c.head_width, device, c.rotary_factors) if is_rope else None

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
        if neighbors is None or neighbors.shape[1] == 0 or not self.config.retrieval:
            return None
        c, M = self.config, self.exchange_length
        B, L, K, R = neighbors.shape
        N = tokens.shape[1]
        front = -N % M if c.partial_chunk == "first" else 0
        position = torch.arange(N, device=tokens.device) + front
        chunk = chunk_read(position, M)
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

    def encode_neighbors(
        self, hidden_BLMD: Tensor, hidden_seen: Seen, neighbors_BLKR: Tensor, lengths_BLK: Tensor | None
    ) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [b, l, k, r, g, e] of each cross-attending layer, not rotated. `hidden_BLMD` is the chunks' normed
        state at the first cross-attending layer.
        """
        assert self.neighbor_projection is not None
        layout = layout_of(neighbors_BLKR, lengths_BLK, packs=False)
        encoded = self.encode(neighbors_BLKR, layout, hidden_BLMD, hidden_seen)
        return self.neighbor_projection(encoded.unflatten(0, neighbors_BLKR.shape[:3]))

    def encode(
        self, neighbors_BLKR: Tensor, layout: NeighborLayout, hidden_BLMD: Tensor | None, hidden_seen: Seen
    ) -> Tensor:
        """The encoded neighbors as they lie in `layout`, [..., c]; `hidden` None where no layer reads the chunk."""
        assert self.encoder is not None
        embedded = self._embed_neighbors(neighbors_BLKR.flatten(0, 2), layout)
        return self.encoder(embedded, layout, hidden_BLMD, hidden_seen, self._encoder_rotary(embedded.device))

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
        if not self.config.retrieval:
            raise ValueError("this model is a plain decoder (model.retrieval=false): it takes no neighbors")
        M = self.exchange_length
        L = -(-N // M) if c.partial_chunk == "first" else N // M
        if neighbors.dim() != 4 or neighbors.shape[:2] != (B, L):
            raise ValueError(
                f"neighbors has shape {tuple(neighbors.shape)}; expected [{B}, {L}, k, r]: "
                f"n={N} tokens make {L} chunks of {M}"
            )
        if neighbors.shape[3] > max(2 * c.chunk_size - 1, c.r):
            raise ValueError(f"neighbors are {neighbors.shape[3]} tokens long; the model takes at most {c.r}")
        if lengths is not None and lengths.shape != neighbors.shape[:3]:
            raise ValueError(
                f"neighbor_lengths has shape {tuple(lengths.shape)}; expected {tuple(neighbors.shape[:3])}"
            )


class _FullAttention:
    """Self-attention among the tokens of the pass."""

    def __init__(self, rotary: Rotary, first_keys: Tensor | None, mask: Tensor | None):
        self.rotary, self.first_keys, self.mask = rotary, first_keys, mask

    def __call__(self, layer: int, attention: SelfAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.attend(
            q, k, v_BNGE=v, rotary=self.rotary, is_causal=True, first_keys=self.first_keys, mask=self.mask
        )


class _FullReading:
    """The neighbors of all chunks of the pass. Has keys and values for each cross-attending layer: of all at once, or with
    recompute "full" of one at a time, so that only the encoded neighbors are kept.
    """

    def __init__(self, model: RetroModel, retrieved: _Neighbors):
        self.model, self.retrieved = model, retrieved
        packs = model.packs_neighbors and not torch.compiler.is_compiling()
        self.layout = layout_of(retrieved.tokens_BLKR, retrieved.lengths_BLK, packs)
        self.rotary = model.cross_rotary(retrieved.tokens_BLKR.device)
        self.made: list[tuple[Tensor, ...]] = []

    def encode(self, z_BND: Tensor) -> None:
        model, retrieved = self.model, self.retrieved
        assert model.neighbor_projection is not None
        L, M = retrieved.tokens_BLKR.shape[1], model.exchange_length
        hidden = F.pad(z_BND, (0, 0, retrieved.front, 0))[:, : L * M].unflatten(1, (L, M))
        encoded = model.encode(retrieved.tokens_BLKR, self.layout, hidden, retrieved.hidden_seen)
        if model.recompute == "full" and torch.is_grad_enabled():
            self.made = [(encoded,)] * len(model.config.cross_layers)
        else:
            self.made = [self._spread(*pair) for pair in model.neighbor_projection(encoded)]

    def _spread(self, *parts: Tensor) -> tuple[Tensor, ...]:
        B, L, K, R = self.layout.shape
        return tuple(self.layout.padded(part).reshape(B, L, K, R, *part.shape[-2:]) for part in parts)

    def encoded(self, layer: int) -> tuple[Tensor, ...]:
        return self.made[self.model.config.cross_layers.index(layer)]

    def attend(self, layer: int, cross: ChunkedCrossAttention, q: Tensor, *encoded: Tensor) -> tuple[Tensor, Tensor]:
        if len(encoded) == 1:
            assert self.model.neighbor_projection is not None
            place = self.model.config.cross_layers.index(layer)
            encoded = self._spread(*self.model.neighbor_projection(encoded[0], place)[0])
        if self.retrieved.front:
            q = F.pad(q, (0, 0, 0, 0, self.retrieved.front, 0))
        stride = self.model.stride
        out = cross.attend(q, encoded[0], encoded[1], self.retrieved.lengths_BLK, self.rotary, stride)
        return out[:, self.retrieved.front :], self.retrieved.attends_BN


def _first_of_run(documents: Tensor) -> Tensor:
    """[..., n]: where the run of equal values that each place belongs to begins."""
    place = torch.arange(documents.shape[-1], device=documents.device)
    is_first = F.pad(documents[..., 1:] != documents[..., :-1], (1, 0), value=True)
    return torch.where(is_first, place, 0).cummax(-1).values


def _some(is_read: Tensor) -> Tensor:
    """[..., m] as it is; all of it where nothing is True (finite, and never used)."""
    return is_read | ~is_read.any(-1, keepdim=True)
