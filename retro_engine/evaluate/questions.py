"""Exact match and F1 of generated answers, with the normalization of SQuAD (arXiv 1606.05250 section 6.1).

The answer of a question is generated greedily, up to the end of document or the first line break. What it reads: gold (the
passages that the row names), retrieved, among (gold among retrieved ones, in any order), random (another question's gold), off,
or prompt: the retrieved texts before the question in the prompt of the same decoder, with retrieval off. Intervals over questions.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from retro_engine.data.questions import Questions
from retro_engine.evaluate.losses import bootstrap, proportion_interval
from retro_engine.model.decoding import decode
from retro_engine.model.passage_choice import absence
from retro_engine.model.prefix import Encode
from retro_engine.model.retro import RetroModel

MODES = ("retrieved", "gold", "among", "random", "off", "prompt")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = set(string.punctuation)


def normalize(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces."""
    kept = "".join(letter for letter in text.lower() if letter not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", kept).split())


def exact_match(answer: str, right: Sequence[str]) -> float:
    return float(any(normalize(answer) == normalize(text) for text in right))


def f1(answer: str, right: Sequence[str]) -> float:
    """Of words, against the right answer that it is closest to."""

    def one(text: str) -> float:
        said, wanted = normalize(answer).split(), normalize(text).split()
        if not said or not wanted:
            return float(said == wanted)
        common = sum((Counter(said) & Counter(wanted)).values())
        return 2 * common / (len(said) + len(wanted))

    return max(map(one, right), default=0.0)


@dataclass
class Answers:
    """What was generated, and per question whether it is right."""

    texts: list[str]
    exact: np.ndarray
    f1: np.ndarray
    absent: float | None = None  # share that was answered by what means: the passages do not hold it
    set_aside: int = 0  # rows of the file that cannot be used
    left_out: int = 0  # questions longer than the model's sequences

    def summary(self) -> dict[str, Any]:
        result: dict[str, Any] = {
            "questions": len(self.texts),
            "set_aside": self.set_aside,
            "left_out": self.left_out,
        }
        if self.absent is not None:
            result["said_absent"] = self.absent
        exact = proportion_interval(float(self.exact.sum()), len(self.exact))
        f1 = bootstrap(lambda draw: self.f1[draw].mean(), len(self.f1))
        for name, values, (low, high) in (("exact_match", self.exact, exact), ("f1", self.f1, f1)):
            result[name] = float(values.mean())
            result[f"{name}_interval"] = [low, high] if np.isfinite(low) else None
        return result


def answer_questions(
    model: RetroModel,
    questions: Questions,
    mode: str,
    max_new_tokens: int = 32,
    batch_size: int = 16,
    limit: int | None = None,
    advance: Callable[[int], None] = lambda count: None,
    absent: str | None = None,
    encode: Encode | None = None,
    is_alone: bool = False,
) -> Answers:
    """Answers to every question (or `limit` spread evenly), generated in batches of prompts with as many chunks. `absent`: what
    the model says where the passages do not hold the answer; `encode`: such as remembers passages (`Encodings.of`); `is_alone`: of
    several passages only that is read of which `absent` is least likely (model/passage_choice.py).
    """
    assert mode in MODES, mode
    tokenizer = questions.store.tokenizer
    numbers = questions.documents
    if limit is not None and limit < len(numbers):
        numbers = np.linspace(0, len(numbers) - 1, limit).astype(np.int64)
    prompts = {int(number): questions.prompts[number] for number in numbers}
    if mode == "prompt":
        prompts = {number: _with_passages(questions, number) for number in prompts}
    order = sorted(prompts, key=lambda number: (-(-len(prompts[number]) // questions.M), number))
    texts: dict[int, str] = {}
    place = 0
    while place < len(order):
        chunks = -(-len(prompts[order[place]]) // questions.M)
        group = [n for n in order[place : place + batch_size] if -(-len(prompts[n]) // questions.M) == chunks]
        neighbors = lengths = None
        if mode not in ("off", "prompt") and model.config.retrieval:
            tokens, valid = questions.neighbors(group, mode)
            if is_alone and questions.K > 1:
                assert absent is not None, "by what passages are told apart"
                tokens, valid = _most_likely(
                    model, questions, numbers=group, tokens_BKR=tokens, lengths_BK=valid, absent=absent, encode=encode
                )
            neighbors, lengths = torch.from_numpy(tokens), torch.from_numpy(valid)
        asked = [prompts[number] for number in group]
        front = 0 if neighbors is None else model.config.positions_in_front(questions.K * model.config.r)
        count = _left(model, front + chunks * questions.M, max_new_tokens)  # the same in any batch
        ends: dict[str, Any] = {"max_new_tokens": count, "stop_ids": tokenizer.end_ids, "pad_id": tokenizer.pad_id}
        ids = decode(model, asked, neighbors, lengths, **ends, encode=encode)
        for number, answer in zip(group, tokenizer.decode_batch(ids)):
            texts[number] = answer.strip().split("\n", 1)[0].strip()  # no other sign ends a line
        advance(len(group))
        place += len(group)
    said = [texts[int(number)] for number in numbers]
    right = [questions.questions[number].answers for number in numbers]
    exact = np.array([exact_match(answer, of) for answer, of in zip(said, right)])
    words = np.array([f1(answer, of) for answer, of in zip(said, right)])
    share = None if absent is None else float(np.mean([normalize(text) == normalize(absent) for text in said]))
    return Answers(
        said, exact, f1=words, absent=share, set_aside=questions.num_set_aside, left_out=questions.num_left_out
    )


def _most_likely(
    model: RetroModel,
    questions: Questions,
    numbers: Sequence[int],
    tokens_BKR: np.ndarray,
    lengths_BK: np.ndarray,
    absent: str,
    encode: Encode | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [b, 1, R] and lengths [b, 1] of the passage that each question reads."""
    tokenizer = questions.store.tokenizer
    absent_id, places = tokenizer.encode(f" {absent}")[0], []
    for number, tokens, lengths in zip(numbers, tokens_BKR, lengths_BK):
        given = np.flatnonzero(lengths)
        if len(given) < 2:
            places.append(int(given[0]) if len(given) else 0)
            continue
        read = torch.from_numpy(tokens[given]), torch.from_numpy(lengths[given])
        found = absence(model, questions.prompts[number], *read, absent_id, tokenizer.pad_id, encode)
        places.append(int(given[int(found.argmin())]))
    rows = np.arange(len(numbers))
    return tokens_BKR[rows, places][:, None], lengths_BK[rows, places][:, None]


def _left(model: RetroModel, length: int, wanted: int) -> int:
    """New tokens after a prompt of `length`: an answer ends where the model's positions do."""
    most = model.config.most_tokens
    return wanted if most is None else max(1, min(wanted, most - length))


def _with_passages(questions: Questions, number: int) -> list[int]:
    """The retrieved passages, the best one last, then the prompt."""
    tokens, lengths = questions.neighbors([number], "retrieved")
    newline = questions.store.tokenizer.encode("\n")
    passages = [tokens[0, k, : lengths[0, k]].tolist() for k in reversed(range(questions.K)) if lengths[0, k]]
    return [token for passage in passages for token in [*passage, *newline]] + questions.prompts[number]
