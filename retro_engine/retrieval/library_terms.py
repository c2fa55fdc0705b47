"""The terms of texts as 64-bit hashes, counted: what `lexical.terms_of` gives, at a tenth of its time.

A word is a run of two or more characters that are letters, digits or _, in lower case, and not one of bm25s' English
stop words; its hash is FNV-1a over its code points, mixed once more. Two of 10^6 terms share one with a chance of
3e-8. The hashes are in files: they do not change. Letters: T terms, U chunks.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from retro_engine.jit import numba

UNICODE = 0x110000


@dataclass(frozen=True)
class Terms:
    """The different terms of each of U chunks, ascending, and how often the chunk has them."""

    hashes: np.ndarray  # u8
    counts: np.ndarray  # u2
    ends: np.ndarray  # [U] i8: where a chunk's terms end
    lengths: np.ndarray  # [U] i4: words of the chunk, repeats counted


def terms_of(texts: Sequence[str]) -> Terms:
    """The terms of each text."""
    lowered = [text.lower() for text in texts]
    points = np.frombuffer("".join(lowered).encode("utf-32-le", "surrogatepass"), np.uint32)
    ends = np.cumsum([len(text) for text in lowered], dtype=np.int64)
    return Terms(*_terms(points, ends, _word_characters(), _stop_words()))


def query_terms(text: str) -> np.ndarray:
    """The different terms of a query [T], ascending."""
    return terms_of([text]).hashes


@functools.cache
def _word_characters() -> np.ndarray:
    """[code points] whether a regular expression's \\w matches."""
    return np.array([character.isalnum() or character == "_" for character in map(chr, range(UNICODE))])


@functools.cache
def _stop_words() -> np.ndarray:
    from bm25s.stopwords import STOPWORDS_EN

    points = np.frombuffer(" ".join(STOPWORDS_EN).encode("utf-32-le"), np.uint32)
    ends = np.array([len(points)], np.int64)
    return _terms(points, ends, _word_characters(), np.empty(0, np.uint64))[0]


@numba.njit(nogil=True, cache=True)
def _terms(points, text_ends, is_word, stop_words):  # type: ignore[no-untyped-def]
    hashes = np.empty(len(points) // 2 + 1, np.uint64)
    counts = np.empty(len(points) // 2 + 1, np.uint16)
    ends = np.empty(len(text_ends), np.int64)
    lengths = np.empty(len(text_ends), np.int32)
    found = 0
    place = 0
    for text in range(len(text_ends)):
        first = found
        while place < text_ends[text]:
            if not is_word[points[place]]:
                place += 1
                continue
            begin = place
            value = np.uint64(0xCBF29CE484222325)
            while place < text_ends[text] and is_word[points[place]]:
                value = (value ^ np.uint64(points[place])) * np.uint64(0x100000001B3)
                place += 1
            if place - begin < 2:
                continue
            value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            value = value ^ (value >> np.uint64(31))
            at = np.searchsorted(stop_words, value)
            if at == len(stop_words) or stop_words[at] != value:
                hashes[found] = value
                found += 1
        lengths[text] = found - first
        hashes[first:found] = np.sort(hashes[first:found])
        kept = first
        for word in range(first, found):
            if kept > first and hashes[kept - 1] == hashes[word]:
                counts[kept - 1] += np.uint16(counts[kept - 1] < 65535)
            else:
                hashes[kept] = hashes[word]
                counts[kept] = 1
                kept += 1
        found = kept
        ends[text] = found
    return hashes[:found], counts[:found], ends, lengths
