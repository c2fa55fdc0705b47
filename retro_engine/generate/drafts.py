"""Drafts: the tokens that followed the newest ones before, in the neighbors that were read or in the text so far.

Text that quotes what it reads goes on as its source does (prompt lookup decoding). What is drafted is checked by the model
in one step of several rows, so the tokens that come are those that would have come without. The place where the longest run
of the newest tokens stood before is followed, as the match model of a compressor does: the longer the run, the likelier what
came next there. How likely it is in this text is counted whether or not it is drafted: the token that comes says it.
"""

from collections.abc import Sequence

KEY = 2  # tokens that must agree with what went before
LONGEST = 32  # a longer run says nothing more
RECENT = 6  # places that are compared
DOUBT = 1.1  # after a run of n tokens comes what came before with the chance 1 - DOUBT / n
MEMORY = 0.95  # how much of what was counted stays with every step
TRUST = 4.0  # tokens that are taken to have come as foreseen before anything is counted
ROW = 0.15  # of a step's time that a row more takes, or less: fp32 .07, bf16 .13, int8 .16 on two cores (30M, AVX-512)
BEGIN = 0.06  # that a step with any guess takes beside its rows
MOST_ROWS = 16  # of a step
MOST_SEQUENCES = (
    1  # that draft in a step: of four, text that quotes nothing takes 5 (fp32) to 14 % (int8) longer (bench drafts)
)

Place = tuple[int, list[int], int]  # how many tokens agree, the list they stand in, and where it goes on
Guess = tuple[int, float]  # a token, and the chance that it comes and all guesses before it


class Drafts:
    """The drafts of one sequence."""

    def __init__(self) -> None:
        self._text: list[int] = []
        self._places: dict[tuple[int, int], list[tuple[list[int], int]]] = {}  # where each two tokens stood
        self._read: set[tuple[int, ...]] = set()
        self._place: Place | None = None
        self._came = self._foreseen = TRUST
        self.drafted = self.accepted = 0  # tokens

    def read(self, neighbors: Sequence[Sequence[int]]) -> None:
        """What the sequence reads from now on, best first."""
        for tokens in reversed(neighbors):  # what is noted last counts first
            if tuple(tokens) not in self._read:
                self._read.add(tuple(tokens))
                self._note(list(tokens), KEY)

    def propose(self, tokens: Sequence[int], most: int) -> list[Guess]:
        """At most `most` guesses at what comes after `tokens`, which go on where they ended at the last call."""
        known = len(self._text)
        self._text.extend(tokens[known:])
        self._follow(known)
        self._note(self._text, max(KEY, known))
        if self._place is None or self._place[0] < LONGEST:
            found = self._find(self._text)
            if found is not None and (self._place is None or found[0] >= self._place[0]):
                self._place = found
        return self._draft(most)

    def count(self, drafted: int, accepted: int) -> None:
        """How many tokens of a draft came."""
        self.drafted += drafted
        self.accepted += accepted

    def _note(self, tokens: list[int], first: int) -> None:
        for end in range(first, len(tokens)):
            self._places.setdefault((tokens[end - 2], tokens[end - 1]), []).append((tokens, end))

    def _follow(self, known: int) -> None:
        """Go on with the place over what came since, and count whether it was foreseen."""
        text = self._text
        if self._place is None or known == len(text):
            return
        length, source, end = self._place
        self._came = self._came * MEMORY + (source[end] == text[known])
        self._foreseen = self._foreseen * MEMORY + 1 - DOUBT / length
        while known < len(text) and end < len(source) and source[end] == text[known]:
            length, end, known = min(length + 1, LONGEST), end + 1, known + 1
        self._place = (length, source, end) if known == len(text) and end < len(source) else None

    def _find(self, text: list[int]) -> Place | None:
        """Where the longest run of the last tokens stood before; of equals the latest."""
        best, size = None, len(text)
        for source, end in reversed(self._places.get((text[-2], text[-1]), [])[-RECENT:]) if size >= KEY else ():
            length, most = KEY, min(LONGEST, end, size)
            while length < most and source[end - 1 - length] == text[size - 1 - length]:
                length += 1
            if best is None or length > best[0]:
                best = length, source, end
        return best

    def _draft(self, most: int) -> list[Guess]:
        text, place, chance, guesses = self._text, self._place, 1.0, list[Guess]()
        trust = min(1.0, self._came / self._foreseen)
        while place is not None and len(guesses) < most:
            length, source, end = place
            if source is not text and end == len(source):  # what a neighbor ends with may go on in another
                place = self._find(text[-LONGEST:] + [token for token, _ in guesses])
                continue
            chance *= (1 - DOUBT / length) * trust
            if chance <= ROW:  # never worth a row
                break
            token = source[end] if end < len(source) else guesses[end - len(text)][0]  # a text that repeats itself
            guesses.append((token, chance))
            place = min(length + 1, LONGEST), source, end + 1
        return guesses


def worthwhile(chances: Sequence[Sequence[float]]) -> list[int]:
    """How many guesses of each sequence to take into a step that all make together: the likeliest first, as long as a guess
    brings more tokens for its time than the step does without it.
    """
    counts, tokens, time = [0] * len(chances), float(len(chances)), 1 + ROW * (len(chances) - 1)
    room = MOST_ROWS - len(chances)
    for chance, number in sorted(((chance, n) for n, each in enumerate(chances) for chance in each), reverse=True):
        if room <= 0 or chance * time <= ROW * tokens:
            break
        counts[number], room = counts[number] + 1, room - 1
        tokens, time = tokens + chance, time + ROW
    alone = 1 + ROW * (len(chances) - 1)
    return counts if tokens * alone > len(chances) * (time + BEGIN) else [0] * len(chances)
