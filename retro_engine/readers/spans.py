"""Where an answer stands in the passages that were read: letter by letter, else as the same words, else most of them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

WORD = re.compile(r"\w+")
LEAST_SHARE = 0.5  # of an answer's letters that a run of its words has to have


@dataclass(frozen=True)
class Span:
    """Characters start ... end - 1 of a passage."""

    passage: int
    start: int
    end: int
    text: str


def find_span(answer: str, passages: Sequence[str]) -> Span | None:
    """The longest stretch of a passage that the answer was copied from; of several the first passage's first. None where
    less than half of it stands in one.
    """
    for place, passage in enumerate(passages):
        start = _whole(answer, passage)
        if start >= 0:
            return Span(place, start, start + len(answer), answer)
    said = _words(answer)
    best: Span | None = None
    most = LEAST_SHARE * sum(len(word) for word, *_ in said)
    for place, passage in enumerate(passages):
        count, start, end = _longest_run(said, _words(passage))
        if count and (count > most or (best is None and count >= most)):
            most, best = count, Span(place, start, end, passage[start:end])
    return best


def _whole(answer: str, passage: str) -> int:
    """Where the answer begins in the passage, cutting no word; -1 where it does not stand there."""
    start = passage.find(answer) if answer else -1
    while start >= 0:
        end = start + len(answer)
        cuts = (start and _joins(passage[start - 1], answer[0])) or (
            end < len(passage) and _joins(answer[-1], passage[end])
        )
        if not cuts:
            return start
        start = passage.find(answer, start + 1)
    return -1


def _joins(left: str, right: str) -> bool:
    """Whether two characters belong to one word. Scripts without spaces have no words that could be cut."""
    return all(letter.isalnum() and ord(letter) < 0x2E80 for letter in (left, right))


def _words(text: str) -> list[tuple[str, int, int]]:
    """Each word without its case, and where it stands."""
    return [(found[0].casefold(), found.start(), found.end()) for found in WORD.finditer(text)]


def _longest_run(said: list[tuple[str, int, int]], words: list[tuple[str, int, int]]) -> tuple[int, int, int]:
    """Of the longest run of words that both have: its letters, and where it begins and ends in `words`."""
    best, before = (0, 0, 0), dict[int, tuple[int, int]]()  # place in `said` -> letters, first place in `words`
    for number, (word, _, end) in enumerate(words):
        now = {}
        for place, (one, *_) in enumerate(said):
            if one == word:
                count, first = before.get(place - 1, (0, number))
                now[place] = count + len(word), first
                if now[place][0] > best[0]:
                    best = now[place][0], words[first][1], end
        before = now
    return best
