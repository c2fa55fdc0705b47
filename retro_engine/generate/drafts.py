"""Drafts: the tokens that followed the newest ones before, in the neighbors that are read or in the text so far.

Text that quotes what it reads goes on as its source does (prompt lookup decoding). What is drafted is checked by the model
in one step of several rows, so the tokens that come are those that would have come without.
"""

from collections.abc import Sequence

LONGEST = 7  # tokens of a draft: with the newest token they are the rows of a step
KEY = 3  # tokens that must agree with what went before


class Drafts:
    """The drafts of one sequence; longer while they hold, shorter where they do not, and none for a while after several
    that failed.
    """

    def __init__(self) -> None:
        self._neighbors: dict[tuple[int, ...], tuple[Sequence[int], int]] = {}  # what followed, by the tokens before it
        self._text: dict[tuple[int, ...], int] = {}
        self._indexed = 0  # tokens of the text that are in `_text`
        self._length = LONGEST
        self._failed = self._waits = 0
        self.drafted = self.accepted = 0  # tokens

    def read(self, neighbors: Sequence[Sequence[int]]) -> None:
        """What the sequence reads from now on, best first."""
        self._neighbors = {}
        for tokens in reversed(neighbors):  # what the best one says counts
            for end in range(KEY, len(tokens)):
                self._neighbors[tuple(tokens[end - KEY : end])] = tokens, end

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens that may come after `tokens`, which go on where they ended at the last call."""
        for end in range(max(KEY, self._indexed), len(tokens)):
            self._text[tuple(tokens[end - KEY : end])] = end
        self._indexed = len(tokens)
        if self._waits:
            self._waits -= 1
            return []
        key = tuple(tokens[-KEY:])
        most = min(most, self._length)
        if key in self._neighbors:
            source, place = self._neighbors[key]
            return list(source[place : place + most])
        if key not in self._text:
            return []
        period = len(tokens) - self._text[key]  # what is repeated may be repeated on
        return [tokens[len(tokens) - period + i % period] for i in range(most)]

    def note(self, drafted: int, accepted: int) -> None:
        """How many tokens of the last draft came."""
        self.drafted += drafted
        self.accepted += accepted
        if accepted:
            self._failed = 0
            self._length = min(LONGEST, self._length * 2) if accepted == drafted else max(1, accepted)
            return
        self._failed += 1
        self._length = 1
        if self._failed >= 2:
            self._waits = min(32, 2**self._failed)
