"""Questions of one passage as one sequence, for models that read in front: a passage is computed once, whoever reads it.

A group is questions whose rows name the same passages, one after the other in their file; its batch is `shared`: each
question reads, from its first token on, its own passages, beside them those of other questions of the batch (distractors),
or only such, and then the right answer is that the passages do not hold it.
Letters: B questions, N tokens, W passages of a batch, K passages that a question reads, R tokens of a passage.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

from retro_engine.config import DataConfig
from retro_engine.data.batches import Order, SequenceBatch, deal
from retro_engine.data.question_files import Question
from retro_engine.data.questions import Questions
from retro_engine.errors import UsageError

MOST = 8  # questions of a group: a passage with more has several
TOGETHER = 4  # groups that stay beside each other when they are shuffled: of one text, so that distractors are alike
NEAR = 0.5  # share of the distractors that are of these

Piece = tuple[int, ...]  # tokens of a passage


class QuestionGroups(Questions):
    """Groups of questions for training and validation; a sequence is the number of a group."""

    def __init__(self, questions: Sequence[Question], *arguments: Any, settings: DataConfig, **more: Any):
        """Other arguments as of `Questions`. Raises UsageError where its settings cannot hold."""
        super().__init__(questions, *arguments, **more)
        self.settings = settings
        if settings.question_distractors and self.K < 2:
            why = "a question that reads one passage reads no other beside it"
            raise UsageError("model.data.question_distractors cannot be used", why, "model.num_neighbors=4")
        self.absent = [*self.store.tokenizer.encode(f" {settings.question_absent_answer}"), self.store.tokenizer.eod_id]
        self._group()

    def _group(self) -> None:
        keys = [(question.documents, question.neighbors) for question in self.questions]
        runs = [list(run) for _, run in groupby(range(len(keys)), keys.__getitem__)]
        self.groups = [run[first : first + MOST] for run in runs for first in range(0, len(run), MOST)]

    def only(self, numbers: np.ndarray) -> "QuestionGroups":
        other = super().only(numbers)
        assert isinstance(other, QuestionGroups)
        other._group()
        return other

    def deal(self, shares: str) -> tuple["QuestionGroups", "QuestionGroups | None"]:
        """Groups to train and to validate on: no passage is in both, where its questions stand together."""
        parts = {name: self._questions_of(groups) for name, groups in deal(len(self.groups), shares).items()}
        return self.only(parts["train"]), self.only(parts["valid"]) if len(parts["valid"]) else None

    def _questions_of(self, groups: np.ndarray) -> np.ndarray:
        return np.array([number for group in groups for number in self.groups[group]], np.int64)

    def in_order(self) -> np.ndarray:
        """[g, 1] group numbers."""
        return np.arange(len(self.groups))[:, None]

    def arranged(self, order: Order, rng: np.random.Generator) -> np.ndarray:
        """The file's order, or runs of neighboring groups shuffled."""
        if not (order.is_shuffled or order.is_cyclic):
            return self.in_order()
        runs = np.array_split(np.arange(len(self.groups)), max(1, len(self.groups) // TOGETHER))
        return np.concatenate([runs[place] for place in rng.permutation(len(runs))])[:, None]

    def epoch_length(self, order: Order, number: int) -> int:
        return len(self.groups)

    def batch(self, rows_BL: np.ndarray, mode: str = "on") -> SequenceBatch:
        """The questions of some groups. `mode`: on = as the settings say; gold, retrieved, random, off as of `Questions`."""
        groups = rows_BL[:, 0].tolist()
        numbers = [number for group in groups for number in self.groups[group]]
        rng = np.random.default_rng(groups)
        pieces = [] if mode == "off" else self._pieces(numbers, mode)
        chosen, is_absent = self._mixed(groups, pieces, rng) if mode == "on" else (pieces, [False] * len(numbers))
        answers = [self.absent if absent else self.answers[n] for n, absent in zip(numbers, is_absent)]
        batch = self._texts(numbers, answers)
        if mode == "off":
            return batch
        passages = list(dict.fromkeys(piece for of in chosen for piece in of))
        place = {piece: number for number, piece in enumerate(passages)}
        batch.lengths = np.array([len(piece) for piece in passages], np.int64)
        batch.neighbors = np.full((len(passages), batch.lengths.max()), self.store.tokenizer.pad_id, np.int64)
        for row, piece in zip(batch.neighbors, passages):
            row[: len(piece)] = piece
        batch.reads = np.full((len(numbers), max(map(len, chosen))), -1, np.int64)
        for row, of in zip(batch.reads, chosen):
            row[: len(of)] = [place[piece] for piece in of]
        return batch

    def _texts(self, numbers: list[int], answers: list[list[int]]) -> SequenceBatch:
        """Prompts with answers, padded on the right; labels are the answers' tokens alone."""
        prompts = [self.prompts[number] for number in numbers]
        N = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers)) - 1
        tokens = np.full((len(numbers), N), self.store.tokenizer.pad_id, np.int64)
        labels, documents = np.full_like(tokens, -100), np.full_like(tokens, -1)
        for row, (number, prompt, answer) in enumerate(zip(numbers, prompts, answers)):
            end = len(prompt) + len(answer) - 1
            tokens[row, :end] = [*prompt, *answer[:-1]]
            labels[row, len(prompt) - 1 : end] = answer
            documents[row, :end] = number
        return SequenceBatch(tokens, labels, documents, None, None)

    def _pieces(self, numbers: list[int], mode: str) -> list[list[Piece]]:
        """What each question reads, the best first. Raises UsageError for one with nothing to read."""
        tokens, lengths = self.neighbors(numbers, mode)
        found = [[tuple(t[:n].tolist()) for t, n in zip(*of) if n] for of in zip(tokens, lengths)]
        for number, of in zip(numbers, found):
            if not of:
                where = f"line {self.questions[number].line} of the questions"
                why = "a model that reads in front is tuned on what it reads"
                raise UsageError(f"{where} has no passage", why, "model.data.question_neighbors=both")
        return found

    def _mixed(
        self, groups: list[int], own: list[list[Piece]], rng: np.random.Generator
    ) -> tuple[list[list[Piece]], list[bool]]:
        """What each question reads as the settings say, in any order, and whether its own passages are not among that."""
        s = self.settings
        of_group = [group for group in groups for _ in self.groups[group]]
        everything = list(dict.fromkeys((piece, group) for of, group in zip(own, of_group) for piece in of))
        chosen, absent = [], []
        for of, group in zip(own, of_group):
            others = [(piece, other) for piece, other in everything if piece not in of]
            draw = rng.random()
            is_absent = draw < s.question_absent and bool(others)
            kept = [] if is_absent else of
            room = min(self.K - len(kept), len(others))
            if room > 0 and (is_absent or draw < s.question_absent + s.question_distractors):
                kept = kept + self._distractors(others, group, int(rng.integers(1, room + 1)), rng)
                kept = [kept[place] for place in rng.permutation(len(kept))]
            chosen.append(kept)
            absent.append(is_absent)
        return chosen, absent

    def _distractors(
        self, others: list[tuple[Piece, int]], group: int, count: int, rng: np.random.Generator
    ) -> list[Piece]:
        is_near = np.array([abs(other - group) < TOGETHER for _, other in others])
        weight = np.where(is_near, NEAR / max(1, is_near.sum()), (1 - NEAR) / max(1, (~is_near).sum()))
        picked = rng.choice(len(others), count, replace=False, p=weight / weight.sum())
        return [others[place][0] for place in picked]
