"""Neighbors found anew every s tokens, s dividing the chunk length m: what a shorter stride of retrieval gives.

Tokens i ... i+s-1 are predicted with what the last m tokens before i find, as retrieval does for a chunk; where a document has
not yet so many tokens, with those it has. For a RETRO this is one pass in which cross-attention reads m/s times as many
neighbors, each at the positions it was trained with: the first token that reads a neighbor stands at position m-1 beside it.
Neighbors that run alone in front (model.reading=prefix) are exchanged every s tokens. With s = m it is `evaluate` to the bit.
Where encodings are not kept the encoder has m/s times the work. Letters: B sequences, N tokens, L blocks of s, K neighbors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from retro_engine.data.batches import SequenceBatch, Sequences
from retro_engine.data.contents import number_contents
from retro_engine.data.questions import Questions
from retro_engine.errors import UsageError
from retro_engine.model.retro import RetroModel
from retro_engine.retrieval.search import Retriever, copies_left_out

MODES = ("on", "off")


@contextmanager
def reading_every(model: RetroModel, stride: int | None) -> Iterator[None]:
    """A model whose full passes read other neighbors every `stride` tokens; None = every chunk."""
    before, model.stride = model.stride, stride
    try:
        yield
    finally:
        model.stride = before


class Stride:
    """What finds neighbors between the ends of chunks; at their ends the table's are read."""

    def __init__(self, sequences: Sequences | Questions, length: int, model: RetroModel):
        """Raises UsageError for a length that does not divide a chunk, a model that it cannot be, and a table whose search
        cannot be done again.
        """
        what = f"--stride {length} cannot be used"
        if not isinstance(sequences, Sequences) or sequences.table is None or not model.config.retrieval:
            raise UsageError(what, "nothing is retrieved for this model", "retro eval a RETRO's run on documents")
        m = sequences.store.chunk_size
        if length < 1 or m % length:
            lengths = ", ".join(str(n) for n in range(1, m + 1) if m % n == 0)
            raise UsageError(what, f"chunks have {m} tokens, which it does not divide", f"--stride of {lengths}")
        if length < m and not model.config.encodes_alone:
            why = "this encoder reads the chunk, which would be cut to the stride"
            raise UsageError(what, why, "a model with model.enc_cross_attention=[]")
        found = sequences.table.manifest["retriever"]
        if length < m and (found["name"] != "bm25" or "filters" in found):
            why = f"{sequences.table.folder} is not what a search by words finds: no chunk was searched between its own"
            raise UsageError(what, why, "retro neighbors --retriever bm25, without filters")
        self.sequences, self.length, self.table = sequences, length, sequences.table
        self.retriever: Retriever | None = None
        if length < m:
            databases = self.table.databases
            self.retriever = Retriever(databases, "bm25", found["merge_overlaps"], weights=found.get("weights"))
            query = sequences.store
            own, *others = number_contents([query.contents, *(store.contents for store in databases)])
            self._own_contents, self._left_out = own, copies_left_out(databases, others)

    def attach(self, batch: SequenceBatch) -> SequenceBatch:
        """The batch with neighbors [B, L, K, R] of every block."""
        m, s = self.sequences.store.chunk_size, self.length
        if s == m:
            return batch
        assert batch.neighbors is not None
        assert batch.lengths is not None
        ends = np.arange(s - 1, batch.tokens.shape[1], s)
        is_between = (ends + 1) % m != 0
        B, _, K, R = batch.neighbors.shape
        tokens, lengths = np.zeros((B, len(ends), K, R), np.int64), np.zeros((B, len(ends), K), np.int64)
        tokens[:, ~is_between], lengths[:, ~is_between] = batch.neighbors, batch.lengths
        tokens[:, is_between], lengths[:, is_between] = self.sequences.gather(self.find(batch, ends[is_between]))
        return replace(batch, neighbors=tokens, lengths=lengths)

    def find(self, batch: SequenceBatch, ends: np.ndarray) -> np.ndarray:
        """[B, ends, K] ids of what the last m tokens up to each end find, in the same document; -1 = missing."""
        assert self.retriever is not None
        store = self.sequences.store
        documents = batch.document_ids[:, ends]
        rows, queries = [], []
        for b, end in zip(*(part.tolist() for part in np.nonzero(documents >= 0))):
            last, document = int(ends[end]), documents[b, end]
            first = max(0, last + 1 - store.chunk_size)
            is_own = batch.document_ids[b, first : last + 1] == document
            rows.append(store.document_rows(int(document))[0])
            queries.append(batch.tokens[b, first : last + 1][is_own].tolist())
        found = np.full((*documents.shape, self.sequences.num_neighbors), -1, np.int64)
        if queries:
            own = self._own_contents[documents[documents >= 0]]
            exclude = [part.for_queries(own) for part in self._left_out]
            texts = store.tokenizer.decode_batch(queries)
            ids, _ = self.retriever.search(texts, self.table.num_neighbors, exclude=exclude)
            found[documents >= 0] = self.sequences.first_allowed(ids.astype(np.int64), np.array(rows))
        return found
