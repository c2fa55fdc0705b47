"""A stream of batches in an order that a seed fixes, and the one of whole chunks with their neighbors, from a store and
its neighbor table (that of questions is in questions.py).

A sequence is n/m rows: pieces of documents packed so that little is padding and no document is cut without
need. Row = chunk, so the table's ids are the sequence's neighbors. Which documents, in which order and with
which neighbors is a pure function of the arguments: nothing but a step number is needed to go on.
Letters: B sequences, N tokens, M tokens per row, L rows per sequence, K neighbors, R tokens per neighbor.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from retro_engine.config import ModelConfig, splits
from retro_engine.data.loader import NeighborLoader
from retro_engine.data.neighbor_table import NeighborTable
from retro_engine.data.store import Store
from retro_engine.errors import StoreError, UsageError
from retro_engine.jit import numba

SPLIT_SEED = 20260101  # of the order in which documents are dealt to train, validation and test
MODES = ("on", "off", "random", "one_right")


@dataclass
class SequenceBatch:
    """Arrays of one forward; labels -100 = no label; document_ids -1 = padding."""

    tokens: np.ndarray  # [B, N] i64
    labels: np.ndarray  # [B, N]
    document_ids: np.ndarray  # [B, N] document of the store
    neighbors: np.ndarray | None  # [B, L, K, R]
    lengths: np.ndarray | None  # [B, L, K]
    neighbor_ids: np.ndarray | None = None  # [B, L, K] instead of the two above: the device gathers them
    reads: np.ndarray | None = None  # [B, K] which of shared neighbors [W, R] of lengths [W] a row reads; -1 = none


def split_documents(store: Store, shares: str) -> dict[str, np.ndarray]:
    """Document numbers of train, valid and test, in order; dealt by a fixed permutation, so that order in the
    corpus does not matter. A share above 0 gets a document as soon as there is one to spare for it.
    """
    return deal(store.num_documents, shares)


def deal(count: int, shares: str) -> dict[str, np.ndarray]:
    """The same for `count` of anything."""
    train, valid, _ = splits(shares)
    order = np.random.default_rng(SPLIT_SEED).permutation(count)
    num_valid = min(count - 1, max(1, round(count * valid))) if valid > 0 else 0
    rest = count - num_valid
    has_test = 1 - train - valid > 1e-9
    num_test = min(rest - 1, max(1, round(count * (1 - train - valid)))) if has_test else 0
    ends = (count - num_valid - num_test, count - num_test)
    return {
        "train": np.sort(order[: ends[0]]),
        "valid": np.sort(order[ends[0] : ends[1]]),
        "test": np.sort(order[ends[1] :]),
    }


def copies_of(store: Store, documents: np.ndarray, others: np.ndarray, other_store: Store | None = None) -> np.ndarray:
    """Those of `documents` that say what one of `others` (of `other_store`, where it is another) says."""
    return documents[np.isin(store.contents[documents], (other_store or store).contents[others])]


def describe_copies(valid: "Sequences", train: "Sequences") -> str | None:
    """A warning that names held-out documents whose copies are trained on; None where there are none."""
    copies = copies_of(valid.store, valid.documents, train.documents, train.store)
    if not len(copies):
        return None
    named = ", ".join(" ".join(valid.store.name(int(document))).strip() for document in copies[:3])
    return (
        f"WARNING: {len(copies):,} of {len(valid.documents):,} held-out documents are also among those trained on: {named}\n"
        "  what is measured on them is how well they were learned by heart\n"
        "  leave copies out of the files (or hold out a store of others, model.data.valid_store) and retro prepare again"
    )


def pack(first_rows: np.ndarray, num_rows: np.ndarray, rows_per_sequence: int) -> np.ndarray:
    """Cut documents into pieces of at most L rows and pack the pieces: [S, L] row numbers, -1 = padding.

    Whole pieces come first, then the rest by best fit, longest first; both in the order given.
    """
    L = rows_per_sequence
    whole = num_rows // L
    starts = np.repeat(first_rows, whole) + L * _counter(whole)
    full = starts[:, None] + np.arange(L)
    rest = num_rows % L
    has_rest = np.flatnonzero(rest)
    order = has_rest[np.argsort(-rest[has_rest], kind="stable")]
    packed = _best_fit(first_rows[order] + whole[order] * L, rest[order], L)
    return np.concatenate((full, packed))


@numba.njit(nogil=True, cache=True)
def _best_fit(firsts, sizes, L):  # type: ignore[no-untyped-def]
    """Each piece into the bin that has least room for it, of those the last one; else into a new one: [bins, L] rows."""
    bins, places = np.empty(len(sizes), np.int64), np.empty(len(sizes), np.int64)
    newest = np.full(L + 1, -1, np.int64)  # by the room that is left: the bin that came there last
    before = np.empty(len(sizes), np.int64)  # and the one before it
    used = 0
    for piece in range(len(sizes)):
        size, room = sizes[piece], sizes[piece]
        while room <= L and newest[room] < 0:
            room += 1
        if room > L:
            number, room, used = used, L, used + 1
        else:
            number = newest[room]
            newest[room] = before[number]
        bins[piece], places[piece] = number, L - room
        before[number], newest[room - size] = newest[room - size], number
    packed = np.full((used, L), -1, np.int64)
    for piece in range(len(sizes)):
        for row in range(sizes[piece]):
            packed[bins[piece], places[piece] + row] = firsts[piece] + row
    return packed


def pack_in_order(first_rows: np.ndarray, num_rows: np.ndarray, rows_per_sequence: int) -> np.ndarray:
    """`pack` without changing the order: rows follow each other as the documents do. A document that does not fit in
    what is left of a sequence begins the next one.
    """
    L = rows_per_sequence
    sequences: list[list[int]] = [[]]
    for first, count in zip(first_rows.tolist(), num_rows.tolist()):
        if len(sequences[-1]) + min(count, L) > L:
            sequences.append([])
        for start in range(first, first + count, L):
            piece = range(start, min(start + L, first + count))
            if len(sequences[-1]) + len(piece) > L:
                sequences.append([])
            sequences[-1] += piece
    return np.array([rows + [-1] * (L - len(rows)) for rows in sequences], np.int64)


def _counter(counts: np.ndarray) -> np.ndarray:
    """0 ... counts[0]-1, 0 ... counts[1]-1, ..."""
    ends = np.cumsum(counts)
    return np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - counts, counts)


@dataclass(frozen=True)
class Order:
    """How a run goes through its data: documents shuffled before they are packed; sequences shuffled, and anew in every
    pass, without end. With neither it reads them once as the corpus has them.
    """

    seed: int
    is_shuffled: bool = True
    is_cyclic: bool = True


class Stream(ABC):
    """Sequences as rows, pass after pass, and the batches made of them: a function of order and number alone, so that
    a run goes on from the number of its step.
    """

    store: Store
    documents: np.ndarray  # what is read
    num_documents: int  # what the document ids of batches are below
    table: NeighborTable | None = None
    holds_itself = False  # the store is one of the databases: its chunks can be neighbors (mode self)
    gathers_neighbors = True  # False: batches bring neighbor ids instead of tokens

    def __init__(self) -> None:
        self._lengths: dict[tuple[Order, int], int] = {}
        self._epoch: tuple[Order, int, np.ndarray] | None = None

    @abstractmethod
    def in_order(self) -> np.ndarray:
        """All sequences, [S, L] rows; every token is in exactly one."""

    @abstractmethod
    def arranged(self, order: Order, rng: np.random.Generator) -> np.ndarray:
        """The sequences of one pass, in the order that `rng` gives it."""

    @abstractmethod
    def batch(self, rows_BL: np.ndarray, mode: str = "on") -> SequenceBatch:
        """Tokens, labels and neighbors of sequences."""

    def epoch(self, order: Order, number: int) -> np.ndarray:
        """The sequences of pass `number`."""
        if self._epoch is None or self._epoch[:2] != (order, number):
            rng = np.random.default_rng((order.seed, number))
            self._epoch = order, number, self.arranged(order, rng)
        return self._epoch[2]

    def epoch_length(self, order: Order, number: int) -> int:
        """Shuffled documents pack a little differently each time."""
        key = order, number if order.is_shuffled else 0
        if key not in self._lengths:
            self._lengths[key] = len(self.epoch(*key))
        return self._lengths[key]

    def num_sequences(self, order: Order) -> int | None:
        """How many there are to train on: known to every process alike; None = without end."""
        return None if order.is_cyclic else self.epoch_length(order, 0)

    def training_batch(self, index: int, size: int, order: Order, mode: str = "on") -> SequenceBatch:
        """Batch number `index` of a run: sequences index*size ... of the endless stream of epochs, or of one.

        Raises StopIteration past the end, which `num_sequences` says beforehand.
        """
        numbers = range(index * size, (index + 1) * size)
        return self.batch(np.stack([self.sequence(number, order) for number in numbers]), mode)

    def sequence(self, position: int, order: Order) -> np.ndarray:
        """Sequence `position` of the endless stream of epochs, or of one: its rows. Raises StopIteration past the end."""
        number = 0
        while position >= (length := self.epoch_length(order, number)):
            if not order.is_cyclic:
                raise StopIteration
            position -= length
            number += 1
        return self.epoch(order, number)[position]

    def batch_rows(self, size: int, limit: int | None = None) -> list[np.ndarray]:
        """The sequences in order, `size` at a time; with `limit`, that many batches spread evenly over them."""
        sequences = self.in_order()
        if limit is not None and limit * size < len(sequences):
            sequences = sequences[np.linspace(0, len(sequences) - 1, limit * size).astype(np.int64)]
        return [sequences[start : start + size] for start in range(0, len(sequences), size)]

    def batches(self, size: int, mode: str = "on", limit: int | None = None) -> Iterator[SequenceBatch]:
        """The batches of `batch_rows`."""
        for rows in self.batch_rows(size, limit):
            yield self.batch(rows, mode)


class Sequences(Stream):
    """The sequences of some documents of a store, and the batches made of them."""

    def __init__(
        self,
        store: Store,
        documents: np.ndarray,
        sequence_length: int,
        table: NeighborTable | None = None,
        num_neighbors: int = 2,
        retrieved_length: int | None = None,
        database_documents: np.ndarray | None = None,
    ):
        """`database_documents`: documents of `store` that may serve as neighbors (the training share).

        Raises UsageError when the length is not whole chunks or k > K, StoreError when nothing is left.
        """
        super().__init__()
        m = store.chunk_size
        if sequence_length % m or sequence_length < m:
            raise UsageError(
                f"model.encoder_seq_length={sequence_length} does not fit the store",
                f"{store.folder} has chunks of {m} tokens",
                f"use a multiple of {m}, with model.chunk_size={m}",
            )
        if not len(documents):
            raise StoreError(
                f"{store.folder}: no document in this share",
                f"it has {store.num_documents} documents",
                "set model.data.splits_string or prepare more text",
            )
        self.store, self.table, self.num_neighbors = store, table, num_neighbors
        self.database_documents = database_documents
        self.rows_per_sequence = sequence_length // m
        self.retrieved_length = retrieved_length or 2 * m
        self.documents, self.num_documents = np.asarray(documents), store.num_documents
        first = store.documents[:, 0]
        counts = np.diff(first, append=store.num_rows)
        self._first_rows, self._num_rows = first[self.documents], counts[self.documents]
        self._row_documents = store.row_documents()
        self._loader = NeighborLoader([store])
        if table is not None:
            table.ids(np.zeros(0, np.int64), num_neighbors)  # refuses k > K
            self._neighbor_loader = NeighborLoader(table.databases)
            self._own_start = self._find_own(table)
            self.holds_itself = self._own_start is not None
            self._is_allowed = np.ones(store.num_documents, bool)
            if database_documents is not None:
                self._is_allowed = np.isin(np.arange(store.num_documents), database_documents)
            self._held_out = np.unique(store.contents[~self._is_allowed])
        self._evaluation_rows = np.concatenate([np.arange(f, f + c) for f, c in zip(self._first_rows, self._num_rows)])

    @classmethod
    def of_model(
        cls,
        m: ModelConfig,
        store: Store,
        documents: np.ndarray,
        table: NeighborTable | None,
        database: np.ndarray | None,
    ) -> "Sequences":
        """As a model with these settings reads them."""
        return cls(store, documents, m.encoder_seq_length, table, m.num_neighbors, m.r, database)

    def _find_own(self, table: NeighborTable) -> int | None:
        """The id of the store's first row among the databases; None = the store is not among them."""
        start = 0
        for database in table.databases:
            if database.fingerprint == self.store.fingerprint:
                return start
            start += database.num_rows
        return None

    @property
    def held_out(self) -> np.ndarray:
        """Marks of what the store's documents say that are no neighbors; with a table."""
        return self._held_out

    def hold_out(self, contents: np.ndarray) -> None:
        """Pass over, as neighbors, also what says one of these `contents`, wherever it is: other stores hold it out."""
        self._held_out = np.union1d(self._held_out, contents)
        self._is_allowed &= ~np.isin(self.store.contents, contents)

    def in_order(self) -> np.ndarray:
        """All sequences, [S, L] rows; every token of the documents is in exactly one."""
        return pack(self._first_rows, self._num_rows, self.rows_per_sequence)

    def arranged(self, order: Order, rng: np.random.Generator) -> np.ndarray:
        documents = np.arange(len(self.documents))
        if order.is_shuffled:
            documents = rng.permutation(len(documents))
        put = pack if order.is_cyclic else pack_in_order
        sequences = put(self._first_rows[documents], self._num_rows[documents], self.rows_per_sequence)
        return sequences[rng.permutation(len(sequences))] if order.is_cyclic else sequences

    def batch(self, rows_BL: np.ndarray, mode: str = "on") -> SequenceBatch:
        """Tokens, labels and neighbors of sequences of rows. `mode`: on | off | random | one_right | self."""
        assert mode in (*MODES, "self"), mode
        B, L = rows_BL.shape
        m = self.store.chunk_size
        tokens, lengths = self._loader.gather(rows_BL, m + 1)  # one more: the label of the last token
        place = np.arange(m)
        labels = np.where(place + 1 < lengths[..., None], tokens[..., 1:], -100)
        documents = np.where(rows_BL < 0, -1, self._row_documents[rows_BL])
        document_ids = np.where(place < lengths[..., None], documents[..., None], -1)
        neighbors = neighbor_lengths = ids = None
        if mode != "off" and self.table is not None:
            ids = self.neighbor_ids(rows_BL, mode)
            if self.gathers_neighbors:
                neighbors, neighbor_lengths = self._neighbor_loader.gather(ids, self.retrieved_length)
                ids = None
        return SequenceBatch(
            tokens[..., :m].reshape(B, L * m),
            labels.reshape(B, L * m),
            document_ids=document_ids.reshape(B, L * m),
            neighbors=neighbors,
            lengths=neighbor_lengths,
            neighbor_ids=ids,
        )

    def neighbor_ids(self, rows_BL: np.ndarray, mode: str = "on") -> np.ndarray:
        """[B, L, k] neighbor ids of each row, -1 = missing.

        Neighbors that say what the row's own document says (itself, its copies) and what is held out are passed over for
        the next best. random: those of another row; one_right: all but the first are other rows' first ones; self: the row itself.
        """
        rows = np.where(rows_BL < 0, 0, rows_BL)
        if mode == "self":
            assert self._own_start is not None, "checked by holds_itself"
            chosen = np.full((*rows.shape, self.num_neighbors), -1)
            chosen[..., 0] = self._own_start + rows
        elif mode == "random":
            chosen = self._allowed_ids(self._other_rows(rows), rows)
        else:
            chosen = self._allowed_ids(rows, rows)
            if mode == "one_right":
                for place in range(1, chosen.shape[-1]):
                    chosen[..., place] = self._allowed_ids(self._other_rows(rows, place), rows)[..., 0]
        return np.where(rows_BL[..., None] < 0, -1, chosen)

    def neighbor_tokens(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [K, R] and lengths [K] of one chunk's neighbors [K]."""
        tokens, lengths = self.gather(ids[None])
        return tokens[0], lengths[0]

    def gather(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [..., K, R] and lengths [..., K] of neighbors [..., K]."""
        return self._neighbor_loader.gather(ids, self.retrieved_length)

    def _allowed_ids(self, rows: np.ndarray, readers: np.ndarray) -> np.ndarray:
        """The first k neighbors of `rows` that `readers` may see."""
        assert self.table is not None
        return self.first_allowed(self.table.ids(rows, self.table.num_neighbors), readers)

    def first_allowed(self, ids: np.ndarray, readers: np.ndarray) -> np.ndarray:
        """[..., k] the first of some neighbor ids [..., K] that rows `readers` may see; -1 = missing."""
        is_good = self._may_read(ids, readers[..., None])
        order = np.argsort(~is_good, axis=-1, kind="stable")[..., : self.num_neighbors]
        return np.take_along_axis(np.where(is_good, ids, -1), order, -1)

    def _may_read(self, ids: np.ndarray, readers: np.ndarray) -> np.ndarray:
        """Whether neighbors say something else than the readers' documents [..., 1], and nothing that is held out.

        What is held out is known by its number in the store itself, by what it says elsewhere (`hold_out`).
        """
        assert self.table is not None
        own = np.broadcast_to(self.store.contents[self._row_documents[readers]], ids.shape)
        out = np.zeros(ids.shape, bool)
        start = 0
        for database in self.table.databases:
            here = (ids >= start) & (ids < start + database.num_rows)
            rows = ids[here] - start
            contents = database.contents_of(rows)
            if start == self._own_start:
                is_shown = self._is_allowed[self._row_documents[rows]]
            else:
                place = np.searchsorted(self._held_out, contents) % max(1, len(self._held_out))
                is_shown = self._held_out[place] != contents if len(self._held_out) else True
            out[here] = is_shown & (contents != own[here])
            start += database.num_rows
        return out

    def _other_rows(self, rows: np.ndarray, number: int = 1) -> np.ndarray:
        """Fixed other rows of these documents for each row: 1/2, 1/3, 2/3, 1/4 ... of them further on, in their order."""
        place, total = np.searchsorted(self._evaluation_rows, rows), len(self._evaluation_rows)
        parts = [(i, n) for n in range(2, number + 2) for i in range(1, n) if math.gcd(i, n) == 1]
        part, of = parts[number - 1]
        return self._evaluation_rows[(place + max(1, total * part // of)) % total]
