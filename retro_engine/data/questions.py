"""Questions with answers as batches: the loss is on the answer, neighbors act from the prompt's end on.

A sequence is one question: the prompt, padded on the left to whole chunks, then the answer and the end of document.
Letters: B questions, N tokens, M chunk length, L chunks, K neighbors, R tokens per neighbor.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from retro_engine.data import files
from retro_engine.data.batches import Order, SequenceBatch, Stream, deal
from retro_engine.data.question_files import Question as Question
from retro_engine.data.question_files import read_questions as read_questions
from retro_engine.data.store import Store
from retro_engine.errors import StoreError, UsageError

SOURCES = ("data", "retrieval", "both")
MODES = ("on", "off", "random", "gold", "retrieved", "among")
Search = Callable[[Sequence[str], int], tuple[np.ndarray, np.ndarray]]  # texts, k -> tokens [q, k, R], lengths [q, k]


class Questions(Stream):
    """Questions as sequences for training and evaluation, in place of `batches.Sequences`."""

    def __init__(
        self,
        questions: Sequence[Question],
        store: Store,
        path: str | Path,
        sequence_length: int,
        num_neighbors: int,
        retrieved_length: int,
        source: str = "data",
        search: Search | None = None,
        num_set_aside: int = 0,
    ):
        """`store` has the tokenizer and the documents that rows name, `search` retrieves; `num_set_aside` is what their
        file holds besides.

        Questions of more than `sequence_length` tokens are left out (`num_left_out`). Raises StoreError naming the line
        of a document that is not there, UsageError where neighbors are to be retrieved and nothing can be searched.
        """
        super().__init__()
        if source not in SOURCES:
            raise UsageError(f"question_neighbors={source} is not known", f"one of {', '.join(SOURCES)}")
        if source != "data" and search is None:
            raise UsageError(f"question_neighbors={source} cannot be used", "there is nothing to retrieve from")
        self.store, self.source, self.search, self.sequence_length = store, source, search, sequence_length
        self.K, self.R, self.M = num_neighbors, retrieved_length, store.chunk_size
        self.num_set_aside = num_set_aside
        tokenizer = store.tokenizer
        prompts = tokenizer.encode_batch([question.prompt for question in questions])
        answers = tokenizer.encode_batch([f" {question.answers[0]}" for question in questions])
        fits = [-(-len(p) // self.M) * self.M + len(a) <= sequence_length for p, a in zip(prompts, answers)]
        self.questions = [question for question, is_fit in zip(questions, fits) if is_fit]
        self.prompts = [prompt for prompt, is_fit in zip(prompts, fits) if is_fit]
        self.answers = [[*answer, tokenizer.eod_id] for answer, is_fit in zip(answers, fits) if is_fit]
        self.num_left_out = len(questions) - len(self.questions)
        if not self.questions:
            raise StoreError(
                f"every question of {path} is longer than {sequence_length} tokens",
                "",
                "raise model.encoder_seq_length",
            )
        self.documents, self.num_documents = np.arange(len(self.questions)), len(self.questions)
        self._document_of = self._find_documents(path)

    def _find_documents(self, path: str | Path) -> dict[str, int]:
        if not any(question.documents for question in self.questions):
            return {}
        found = {self.store.name(number)[0]: number for number in range(self.store.num_documents)}
        for question in self.questions:
            for name in question.documents:
                if name not in found:
                    where = f"{self.store.folder} has no such document"
                    raise StoreError(
                        f"{path}:{question.line} names document {name}", where, "prepare the store with it"
                    )
        return found

    def only(self, numbers: np.ndarray) -> "Questions":
        """The same with some of the questions."""
        other = object.__new__(type(self))
        other.__dict__ |= self.__dict__
        Stream.__init__(other)  # it has epochs of its own
        other.questions = [self.questions[i] for i in numbers]
        other.prompts, other.answers = [self.prompts[i] for i in numbers], [self.answers[i] for i in numbers]
        other.documents, other.num_documents = np.arange(len(numbers)), len(numbers)
        return other

    def deal(self, shares: str) -> tuple["Questions", "Questions | None"]:
        """Questions to train and to validate on."""
        parts = deal(len(self.questions), shares)
        return self.only(parts["train"]), self.only(parts["valid"]) if len(parts["valid"]) else None

    def in_order(self) -> np.ndarray:
        """[q, 1] question numbers."""
        return self.documents[:, None]

    def arranged(self, order: Order, rng: np.random.Generator) -> np.ndarray:
        """The file's order where neither documents nor sequences are shuffled: a sequence is one question."""
        is_shuffled = order.is_shuffled or order.is_cyclic
        return self.in_order()[rng.permutation(len(self.questions))] if is_shuffled else self.in_order()

    def epoch_length(self, order: Order, number: int) -> int:
        return len(self.questions)

    def batch(self, rows_BL: np.ndarray, mode: str = "on") -> SequenceBatch:
        """Sequences of questions, padded on the right to whole chunks; labels are the answer's tokens alone."""
        numbers = rows_BL[:, 0].tolist()
        starts = [-(-len(self.prompts[number]) // self.M) * self.M for number in numbers]
        longest = max(start + len(self.answers[number]) for start, number in zip(starts, numbers)) - 1
        N = -(-longest // self.M) * self.M
        B, L = len(numbers), N // self.M
        tokens = np.full((B, N + 1), self.store.tokenizer.pad_id, np.int64)
        labels, documents = np.full((B, N), -100), np.full((B, N), -1)
        for row, (number, start) in enumerate(zip(numbers, starts)):
            prompt, answer = self.prompts[number], self.answers[number]
            tokens[row, start - len(prompt) : start] = prompt
            tokens[row, start : start + len(answer)] = answer
            labels[row, start - 1 : start - 1 + len(answer)] = answer
            documents[row, start - len(prompt) : start - 1 + len(answer)] = number
        if mode == "off":
            return SequenceBatch(tokens[:, :N], labels, documents, None, None)
        one, valid = self.neighbors(numbers, mode)
        lengths = np.zeros((B, L, self.K), np.int64)
        for row, start in enumerate(starts):
            lengths[row, start // self.M - 1 :] = valid[row]
        neighbors = np.broadcast_to(one[:, None], (B, L, self.K, self.R)).copy()
        return SequenceBatch(tokens[:, :N], labels, documents, neighbors, lengths)

    def neighbors(self, numbers: Sequence[int], mode: str = "on") -> tuple[np.ndarray, np.ndarray]:
        """Tokens [b, K, R] and lengths [b, K] of some questions' neighbors.

        on: as `source` says; gold: the row's own; retrieved; among: the row's own among retrieved ones, in any order; random:
        those of the question half of all further on.
        """
        assert mode in MODES, mode
        if mode == "random":
            numbers = [(number + max(1, len(self.questions) // 2)) % len(self.questions) for number in numbers]
        has_own = mode in ("gold", "among") or (mode in ("on", "random") and self.source != "retrieval")
        has_found = mode in ("retrieved", "among") or (mode in ("on", "random") and self.source != "data")
        tokens = np.full((len(numbers), self.K, self.R), self.store.tokenizer.pad_id, np.int64)
        lengths = np.zeros((len(numbers), self.K), np.int64)
        if has_found:
            if self.search is None:
                raise UsageError("there is nothing to retrieve from", "a store is searched", "--stores STORE")
            found, valid = self.search([self.questions[number].query for number in numbers], self.K)
        for row, number in enumerate(numbers):
            pieces = self._own(number) if has_own else []
            if has_found:
                pieces = pieces + [found[row, k, : valid[row, k]].tolist() for k in range(found.shape[1])]
            unique = [piece for place, piece in enumerate(pieces) if piece and piece not in pieces[:place]]
            unique = unique[: self.K]
            if mode == "among":
                unique = [unique[place] for place in np.random.default_rng(number).permutation(len(unique))]
            for k, piece in enumerate(unique):
                tokens[row, k, : len(piece)], lengths[row, k] = piece, len(piece)
        return tokens, lengths

    def _own(self, number: int) -> list[list[int]]:
        """The row's texts and documents in pieces of at most R tokens."""
        question = self.questions[number]
        texts = self.store.tokenizer.encode_batch(question.neighbors)
        for name in question.documents:
            rows, lengths = self.store.rows(*self.store.document_rows(self._document_of[name]))
            texts.append([token for row, length in zip(rows.tolist(), lengths) for token in row[:length]])
        return [text[start : start + self.R] for text in texts for start in range(0, len(text), self.R)]


def fingerprint(path: str | Path) -> str:
    return files.sha256_file(Path(path))
