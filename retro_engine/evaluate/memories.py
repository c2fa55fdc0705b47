"""What a memory of tokens gives beside a model: the loss of every token with and without it, by document.

The weights are fitted on other documents than those they are used for: on the validation share, or else each half of the
documents on the other half. Documents that are held out are left out of the memory, by what they say.
Letters: T predicted tokens, D width of a state.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from retro_engine.data.batches import Sequences
from retro_engine.errors import UsageError
from retro_engine.evaluate.losses import DocumentLosses, autocast, evaluating, reads_of, to_tensors
from retro_engine.evaluate.perplexity import Given, read_batch, reading_kept
from retro_engine.memory.mixture import Guesses, Mixture
from retro_engine.memory.ngram_memory import NgramMemory, document_tokens
from retro_engine.model.encodings import Encodings
from retro_engine.model.loss import each_cross_entropy
from retro_engine.model.retro import RetroModel

MIN_DOCUMENTS = 2  # a half each


class Evidence(Protocol):
    """What a memory knows of T tokens."""

    def of(self, places: np.ndarray) -> "Evidence": ...


class Weights(Protocol):
    """How much of it is believed."""

    def probabilities(self, before_T: np.ndarray, evidence: Any) -> np.ndarray: ...


Fit = Callable[[np.ndarray, Any], Weights]
Recall = Callable[[Tensor, np.ndarray], Any]  # states [T, D] and labels [T] -> what a memory of states knows
Record = Callable[[Tensor, np.ndarray, np.ndarray], None]  # the same with the marks of what the documents say [T]


@dataclass(frozen=True, kw_only=True)
class ScoredTokens:
    """The predicted tokens of some sequences, by document and place, with what a model makes of them."""

    sequences: Sequences
    documents_T: np.ndarray  # of the store
    places_T: np.ndarray  # in their documents
    labels_T: np.ndarray
    nats_T: np.ndarray
    recalled: Any = None  # what a memory of states knows of them

    @property
    def probabilities(self) -> np.ndarray:
        """[T] the model's."""
        return np.exp(-self.nats_T)

    def by_document(self, token_bytes: np.ndarray, nats_T: np.ndarray | None = None) -> DocumentLosses:
        """The losses of the documents, with other nats of their tokens where they are given."""
        numbers = np.searchsorted(self.sequences.documents, self.documents_T)
        sums = DocumentLosses.zeros(len(self.sequences.documents))
        sums.add(numbers, self.nats_T if nats_T is None else nats_T, self.labels_T, token_bytes)
        return sums.seen(self.sequences, self.sequences.documents, token_bytes)


@torch.no_grad()
def score_tokens(
    model: RetroModel,
    sequences: Sequences,
    mode: str,
    *,
    limit: int | None = None,
    precision: str = "32",
    given: Given | None = None,
    leak_limit: float | None = None,
    dropped: Callable[[int, int], None] = lambda leaks, neighbors: None,
    encodings: Encodings | None = None,
    advance: Callable[[int], None] = lambda count: None,
    recall: Recall | None = None,
    record: Record | None = None,
    batch_size: int = 8,
) -> ScoredTokens:
    """The same tokens and losses as `perplexity.evaluate`, each for itself. `recall`: asked about every token; `record`: told
    of it.
    """
    m = sequences.store.chunk_size
    first_rows = sequences.store.documents[:, 0]
    columns: list[tuple[np.ndarray, ...]] = []
    recalled = []
    with evaluating(model), reading_kept(model, encodings):
        for rows_BL in sequences.batch_rows(batch_size, limit):
            batch = read_batch(sequences, rows_BL, mode, given, leak_limit, dropped)
            tokens, labels, documents, neighbors, lengths = to_tensors(batch, model.device)
            with autocast(model.device, precision):
                hidden = model.hidden(tokens, neighbors, lengths, documents, reads_of(batch, model.device))
                losses, _ = each_cross_entropy(hidden, model.logits, labels)
            counted = batch.labels >= 0
            of, wanted = batch.document_ids[counted], batch.labels[counted]
            tokens_before = (
                (rows_BL[..., None] - first_rows[batch.document_ids[:, ::m]][..., None]) * m + np.arange(m)
            ).reshape(counted.shape)
            columns.append((of, tokens_before[counted] + 1, wanted, losses.double().cpu().numpy()[counted]))
            states_TD = hidden[torch.from_numpy(counted).to(hidden.device)].float()
            if recall is not None:
                recalled.append(recall(states_TD, wanted))
            if record is not None:
                record(states_TD, wanted, sequences.store.contents[of])
            advance(len(batch.tokens))
    of, places, wanted, nats = (np.concatenate(parts) for parts in zip(*columns))
    order = np.lexsort((places, of))
    known = type(recalled[0]).joined(recalled).of(order) if recalled else None
    return ScoredTokens(
        sequences=sequences,
        documents_T=of[order],
        places_T=places[order],
        labels_T=wanted[order],
        nats_T=nats[order],
        recalled=known,
    )


def held_out_marks(*shares: Sequences) -> np.ndarray:
    """What the documents say that a memory must not hold: those of the shares, and all that were not trained on."""
    marks = []
    for share in shares:
        marks.append(share.store.contents[share.documents])
        if share.database_documents is not None:
            is_held = ~np.isin(np.arange(share.store.num_documents), share.database_documents)
            marks.append(share.store.contents[is_held])
    return np.unique(np.concatenate(marks))


def describe_left_out(marks: np.ndarray, *shares: Sequences) -> str | None:
    """A line that names some of the documents whose copies a memory held; None where it held none."""
    if not len(marks):
        return None
    names: dict[str, None] = {}  # in their order, each once
    for share in shares:
        for document in np.flatnonzero(np.isin(share.store.contents, marks))[:3].tolist():
            names[" ".join(share.store.name(document)).strip()] = None
    shown = ", ".join([*names][:3]) + (" ..." if len(marks) > 3 else "")
    return f"{len(marks):,} documents of the memory are held out: they are left out of it: {shown}"


def look_up(memory: NgramMemory, tokens: ScoredTokens) -> Guesses:
    """What an n-gram memory knows of tokens, each after all of its document that stands before it."""
    parts = []
    documents, firsts = np.unique(tokens.documents_T, return_index=True)
    for document, places in zip(documents.tolist(), np.split(tokens.places_T, firsts[1:])):
        text = next(document_tokens(tokens.sequences.store, document, document + 1))
        first, last = int(places[0]), int(places[-1])
        parts.append(memory.guesses(text[: last + 1], first).of(places - first))
    return Guesses.joined(parts)


def mixed_nats(
    tokens: ScoredTokens,
    evidence: Evidence,
    fit: Fit,
    fitted_on: tuple[ScoredTokens, Evidence] | None,
    before: Callable[[ScoredTokens], np.ndarray] = lambda tokens: tokens.probabilities,
) -> np.ndarray:
    """Nats [T] of the tokens with a memory; `fitted_on` None: halves of the documents fit each other.

    Raises UsageError for a single document, which nothing is left to fit on for.
    """
    if fitted_on is not None:
        weights = fit(before(fitted_on[0]), fitted_on[1])
        return -np.log(weights.probabilities(before(tokens), evidence))
    numbers = np.unique(tokens.documents_T, return_inverse=True)[1]
    if numbers.max(initial=0) + 1 < MIN_DOCUMENTS:
        raise UsageError(
            "the weights of a memory cannot be fitted", "one document is evaluated, and no other", "a larger --limit"
        )
    nats, p = np.empty(len(numbers)), before(tokens)
    for half in (0, 1):
        here, there = np.flatnonzero(numbers % 2 == half), np.flatnonzero(numbers % 2 != half)
        weights = fit(p[there], evidence.of(there))
        nats[here] = -np.log(weights.probabilities(p[here], evidence.of(here)))
    return nats


@dataclass(frozen=True, kw_only=True)
class Beside:
    """What an n-gram memory gives beside one model: the losses of its documents, and the weights."""

    losses: dict[str, DocumentLosses]  # of the model, of the memory alone, of both
    weights: Mixture  # of both; where halves of the documents fit each other, those of all
    guesses_per_token: float


def losses_beside(
    model: RetroModel,
    memory: NgramMemory,
    share: Sequences,
    fitting: Sequences | None,
    mode: str,
    token_bytes: np.ndarray,
    limit: int | None = None,
) -> Beside:
    """On `share`, with weights fitted on `fitting` (None: halves of the documents fit each other)."""
    tokens = score_tokens(model, share, mode, limit=limit)
    others = None if fitting is None else score_tokens(model, fitting, mode, limit=limit)
    known = look_up(memory, tokens)
    fitted_on = None if others is None else (others, look_up(memory, others))
    nats = {
        "model": tokens.nats_T,
        "memory": mixed_nats(tokens, known, Mixture.fitted, fitted_on, nothing_known),
        "both": mixed_nats(tokens, known, Mixture.fitted, fitted_on),
    }
    on, evidence = fitted_on or (tokens, known)
    return Beside(
        losses={name: tokens.by_document(token_bytes, values) for name, values in nats.items()},
        weights=Mixture.fitted(on.probabilities, evidence),
        guesses_per_token=len(known.classes_J) / max(1, len(tokens.nats_T)),
    )


def nothing_known(tokens: ScoredTokens) -> np.ndarray:
    """The probabilities of a model that knows the vocabulary alone."""
    return np.full(len(tokens.nats_T), 1 / tokens.sequences.store.vocab_size)
