"""What a tokenizer loses: which text does not come back from its tokens, by kind, measured on a sample of a corpus.

Words are tried one by one and white space between its neighbors, so that each kind has its share and an example; whole
texts show what only their place decides. A tokenizer of bytes loses nothing.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from retro_engine.data.tokenizer import Tokenizer

MAX_WORDS = 20_000  # the most frequent ones that are tried
MAX_GAPS = 200
WORD = 64  # characters of a word; scripts without spaces have long ones
TEXTS, TEXT = 64, 2000  # whole texts that are tried, and their characters
SHOWN = 24  # characters of an example
_GAP = re.compile(r"(\S{1,16})(\s+)(?=(\S{1,16}))")


def _without_accents(text: str) -> str:
    return "".join(sign for sign in unicodedata.normalize("NFD", text) if unicodedata.category(sign) != "Mn")


_SAME = {  # how two texts are made the same, by what differs
    "normalization": lambda text: unicodedata.normalize("NFKC", text),
    "case": str.casefold,
    "accents": _without_accents,
    "white space": lambda text: "".join(text.split()),
}
CHARACTERS = "characters"


@dataclass(frozen=True)
class Loss:
    """One kind of text that does not come back: `share` of the sample's `unit`, and an example."""

    kind: str
    share: float
    unit: str
    before: str
    after: str


class Sample:
    """Every 2^i-th of many texts, so that at most `limit` characters are held."""

    def __init__(self, limit: int):
        self.texts: list[str] = []
        self._limit, self._held, self._stride, self._number = limit, 0, 1, 0

    def add(self, text: str) -> None:
        if self._number % self._stride == 0:
            self.texts.append(text)
            self._held += len(text)
            while self._held > self._limit and len(self.texts) > 1:
                self.texts = self.texts[::2]
                self._stride *= 2
                self._held = sum(map(len, self.texts))
        self._number += 1


def find_losses(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Loss]:
    """What of `texts` is lost, the largest share first; nothing for a tokenizer that gives all of it back."""
    words: Counter[str] = Counter()
    gaps: Counter[str] = Counter()
    around: dict[str, tuple[str, str]] = {}
    for text in texts:
        words.update(word[i : i + WORD] for word in text.split() for i in range(0, len(word), WORD))
        for before, gap, after in _GAP.findall(text):
            gaps[gap] += 1
            around.setdefault(gap, (before, after))
    common = words.most_common(MAX_WORDS)
    back = [text.strip() for text in _there_and_back(tokenizer, [word for word, _ in common])]
    losses = _by_kind([(word, found, count) for (word, count), found in zip(common, back)], "words")
    tried = [(gap, count, *around[gap]) for gap, count in gaps.most_common(MAX_GAPS)]
    back = _there_and_back(tokenizer, [before + gap + after for gap, _, before, after in tried])
    pairs = [(gap, _middle(found), count) for (gap, count, _, _), found in zip(tried, back)]
    losses += [loss for loss in _by_kind(pairs, "spaces between words") if loss.kind == "white space"]
    if not losses:
        whole = [text[:TEXT] for text in texts[:TEXTS]]
        losses = _by_kind([(a, b, 1) for a, b in zip(whole, _there_and_back(tokenizer, whole))], "texts")
    return sorted(losses, key=lambda loss: -loss.share)


def _there_and_back(tokenizer: Tokenizer, texts: list[str]) -> list[str]:
    return tokenizer.decode_batch(tokenizer.encode_batch(texts)) if texts else []


def _middle(text: str) -> str:
    """The white space between two words."""
    found = re.search(r"\S(\s+)\S", text)
    return found[1] if found else ""


def _by_kind(pairs: Iterable[tuple[str, str, int]], unit: str) -> list[Loss]:
    """Of (text, what came back, how often): the kinds of difference."""
    counts: Counter[str] = Counter()
    examples: dict[str, tuple[str, str]] = {}
    total = 0
    for before, after, count in pairs:
        total += count
        for kind in kinds_of(before, after) if before != after else ():
            counts[kind] += count
            examples.setdefault(kind, _around_difference(before, after))
    return [Loss(kind, round(count / total, 6), unit, *examples[kind]) for kind, count in counts.items()]


def kinds_of(before: str, after: str) -> list[str]:
    """What must be overlooked for two texts to be the same; `characters` where nothing of it is enough."""

    def is_same(kinds: Iterable[str]) -> bool:
        one, other = before, after
        for kind in kinds:
            one, other = _SAME[kind](one), _SAME[kind](other)
        return one == other

    if not is_same(_SAME):
        return [CHARACTERS]
    needed = [kind for kind in _SAME if not is_same([other for other in _SAME if other != kind])]
    return needed or [next((kind for kind in _SAME if is_same([kind])), "normalization")]


def _around_difference(before: str, after: str) -> tuple[str, str]:
    place = next((i for i, (a, b) in enumerate(zip(before, after)) if a != b), min(len(before), len(after)))
    start = max(0, place - SHOWN // 2)
    before, after = (text[start : start + SHOWN].replace("\0", "\ufffd") for text in (before, after))
    return before, after


def as_json(losses: Sequence[Loss]) -> list[dict[str, Any]]:
    return [asdict(loss) for loss in losses]


def describe(losses: Sequence[dict[str, Any]]) -> list[str]:
    """A line a kind, of what `as_json` gave."""
    return [
        f"{loss['kind']} in {loss['share']:.1%} of {loss['unit']}: {loss['before']!r} comes back as {loss['after']!r}"
        for loss in losses
    ]
