"""Loss, perplexity and bits per byte over every token of some documents, with retrieval on, off or random.

Each document is cut into sequences from its start; every token with a predecessor in its document is predicted
once, the end-of-document token included (it has 0 bytes). Intervals are bootstrapped over documents.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from retro_engine.data.batches import SequenceBatch, Sequences
from retro_engine.data.inputs import open_file, shown
from retro_engine.data.questions import Questions
from retro_engine.data.streams import read_text
from retro_engine.errors import MissingInputError, UsageError, nearest
from retro_engine.evaluate.losses import DocumentLosses, evaluating, token_losses
from retro_engine.evaluate.strides import Stride, reading_every
from retro_engine.model.encodings import Encodings
from retro_engine.model.retro import RetroModel
from retro_engine.retrieval.overlap import drop_leaks

MODES = ("on", "off", "random", "given")
MAX_TEXT_BYTES = 1 << 32  # of a share whose words are counted


def check_modes(modes: Iterable[str], known: Sequence[str]) -> None:
    for mode in modes:
        if mode not in known:
            raise UsageError(f"mode {mode!r} does not exist", nearest(mode, list(known)), f"of {','.join(known)}")


def pick_modes(asked: str | None, reads_neighbors: bool, has_given: bool) -> list[str]:
    """The modes that `asked` names (a,b,c; None: all that the model has), and given where neighbors are.

    Raises UsageError for a mode that there is not, or that this model or call has nothing to read in.
    """
    modes = (asked or ("on,off,random" if reads_neighbors else "off")).split(",")
    if not reads_neighbors and (has_given or set(modes) - {"off"}):
        raise UsageError(
            "this model is a plain decoder (model.retrieval=false)", "it reads no neighbors", "--modes off"
        )
    modes += ["given"] * (has_given and "given" not in modes)
    check_modes(modes, MODES)
    if "given" in modes and not has_given:
        raise UsageError("mode given needs neighbors", "", "--neighbors TEXT")
    return modes


def count_words(path: Path) -> int:
    """Words of a text as WikiText-103's papers count them: what stands between spaces, and one end a line."""
    with open_file(path) as file:
        text = read_text(file, MAX_TEXT_BYTES, shown(path))
    words = len(text.split()) + text.count("\n")
    if not words:
        raise MissingInputError(f"{path} has no words", "", "--words FILE")
    return words


def word_perplexity(losses: DocumentLosses, words: int) -> float:
    return math.exp(min(float(losses.nats.sum()) / words, 700.0))


@dataclass(frozen=True)
class Given:
    """Neighbors that every chunk reads in mode "given": tokens [K, R] and lengths [K]."""

    tokens: np.ndarray
    lengths: np.ndarray

    def attach(self, batch: SequenceBatch, chunk_size: int) -> SequenceBatch:
        B, L = batch.tokens.shape[0], batch.tokens.shape[1] // chunk_size
        neighbors = np.broadcast_to(self.tokens, (B, L, *self.tokens.shape)).copy()
        return replace(
            batch, neighbors=neighbors, lengths=np.broadcast_to(self.lengths, (B, L, len(self.lengths))).copy()
        )


@contextmanager
def reading_kept(model: RetroModel, encodings: Encodings | None) -> Iterator[None]:
    """A model that reads in front without encoding what is kept."""
    assert encodings is None or model.config.reads_prefix
    model.kept = None if encodings is None else encodings.of
    try:
        yield
    finally:
        model.kept = None


def _nobody(leaks: int, neighbors: int) -> None:
    """Is told how many neighbors were dropped, of how many."""


def evaluate(
    model: RetroModel,
    sequences: Sequences | Questions,
    token_bytes: np.ndarray,
    modes: Iterable[str] = ("on", "off", "random"),
    batch_size: int = 8,
    limit: int | None = None,
    precision: str = "32",
    advance: Callable[[int], None] = lambda count: None,
    given: Given | None = None,
    leak_limit: float | None = None,
    dropped: Callable[[int, int], None] = _nobody,
    shard: tuple[int, int] = (0, 1),
    reduce: Callable[[Iterable[np.ndarray]], None] = lambda arrays: None,
    encodings: Encodings | None = None,
    stride: Stride | None = None,
) -> dict[str, DocumentLosses]:
    """Losses per document for each mode (on, off, random, one_right, given); `limit` batches at most a mode.

    `leak_limit`: neighbors that state more than this share of what follows word for word become missing; of mode on, `dropped` is told how many of how many. `shard` (i, n): every n-th batch
    from the i-th on, with `reduce` to sum arrays over the n processes in place. `encodings`: of neighbors in front, which are not encoded again. `stride`: neighbors are found anew more often (mode on). The model is left in the mode it was in.
    """
    results = {}
    numbers = np.full(sequences.num_documents, -1, np.int64)
    numbers[sequences.documents] = np.arange(len(sequences.documents))
    length = None if stride is None else stride.length
    with evaluating(model), reading_kept(model, encodings), reading_every(model, length):
        for mode in modes:
            sums = DocumentLosses.zeros(len(sequences.documents))
            for rows, is_extra in _turns(sequences.batch_rows(batch_size, limit), shard):
                batch = read_batch(sequences, rows, mode, given, leak_limit, _nobody if is_extra else dropped)
                if stride is not None and mode == "on":
                    batch = stride.attach(batch)
                losses, _ = token_losses(model, batch, model.device, precision)
                counted = (batch.labels >= 0) & (not is_extra)
                documents, nats = numbers[batch.document_ids[counted]], losses.double().cpu().numpy()[counted]
                sums.add(documents, nats, batch.labels[counted], token_bytes)
                advance(len(batch.tokens))
            reduce((sums.nats, sums.tokens, sums.bytes))
            results[mode] = sums.seen(sequences, sequences.documents, token_bytes)
    return results


def _turns(all_rows: Sequence[np.ndarray], shard: tuple[int, int]) -> Iterator[tuple[np.ndarray, bool]]:
    """The batches of a shard, and whether one is extra: every process makes as many passes."""
    for turn in range(0, len(all_rows), shard[1]):
        yield all_rows[min(turn + shard[0], len(all_rows) - 1)], turn + shard[0] >= len(all_rows)


def read_batch(
    sequences: Sequences | Questions,
    rows: np.ndarray,
    mode: str,
    given: Given | None = None,
    leak_limit: float | None = None,
    dropped: Callable[[int, int], None] = _nobody,
) -> SequenceBatch:
    """A batch as it is read in one of MODES."""
    batch = sequences.batch(rows, "off" if mode == "given" else mode)
    if mode == "given":
        assert given is not None, "mode given needs neighbors"
        batch = given.attach(batch, sequences.store.chunk_size)
    if leak_limit is not None and batch.lengths is not None:
        count = int((batch.lengths > 0).sum())
        leaks = drop_leaks(batch, sequences.store.chunk_size, leak_limit)
        if mode == "on":
            dropped(leaks, count)
    return batch
