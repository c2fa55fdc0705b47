"""What a word is: the one reading of texts and questions into terms, of `retro build` and of the live library.

Text is brought to Unicode's NFKC in folded case. Words are runs of letters, marks and digits, one letter is one;
accents of Latin and Greek letters and the vowel points of Arabic and Hebrew are dropped. Where a script has no spaces
(Han, kana, Thai, Lao, Khmer, Myanmar ...) the terms are pairs of neighboring characters, of Han each character too;
of Hangul words and pairs. Words that a sign joins (node.js, snake_case, AT&T, U.S., addresses, 3.14, 1,000) and words
with + or # (C++, C#) or a full stop before them (.NET) are a term as a whole beside their parts. Version 1 read
runs of two or more word characters in lower case; what was made with it keeps it. Letters: T terms, U chunks.
"""

import functools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from retro_engine.errors import StoreError, UsageError, extra, nearest, read_error
from retro_engine.retrieval import analyzer_loops as loops

VERSION = 2
ENGLISH = (  # Lucene's
    *("a", "an", "and", "are", "as", "at", "be", "but", "by", "for", "if", "in", "into", "is", "it", "no", "not"),
    *("of", "on", "or", "such", "that", "the", "their", "then", "there", "these", "they", "this", "to", "was"),
    *("will", "with"),
)
LANGUAGES = {
    **{"en": "english", "da": "danish", "de": "german", "es": "spanish", "fr": "french", "it": "italian"},
    **{"ko": "korean", "nl": "dutch", "no": "norwegian", "pt": "portuguese", "ru": "russian", "sv": "swedish"},
    **{"tr": "turkish", "zh": "chinese"},
}
MAX_STOP_WORDS = 10_000
MAX_FILE_BYTES = 1 << 20
TITLE_CHARACTERS = 256  # of a title are read with each chunk
LIGATURES = (("æ", "ae"), ("œ", "oe"))


@dataclass(frozen=True)
class Terms:
    """The different terms of each of U chunks, ascending, and how often the chunk has them."""

    hashes: np.ndarray  # u8
    counts: np.ndarray  # u2
    ends: np.ndarray  # [U] i8: where a chunk's terms end
    lengths: np.ndarray  # [U] i4: terms of the chunk, repeats counted


@dataclass(frozen=True)
class Analyzer:
    """How words are read. All of it is written into what it makes; nothing that reads otherwise is mixed with it."""

    stemmer: str | None = None  # a language of Snowball; None = words as they are
    stop_words: tuple[str, ...] = ENGLISH  # are no terms
    version: int = VERSION

    @property
    def has_titles(self) -> bool:
        """Whether a document's title is read with each of its chunks."""
        return self.version > 1

    def terms(self, texts: Sequence[str], is_query: bool = False) -> Terms:
        """The terms of each text. A question's pairs of characters are read without the characters alone."""
        hashes, ends, _ = self._read(texts, self._stops, is_query, False)
        return Terms(*loops.count(hashes, ends))

    def query(self, text: str) -> np.ndarray:
        """The different terms of a question [T], ascending."""
        return self.terms([text], is_query=True).hashes

    def words(self, text: str, is_query: bool = False) -> list[str]:
        """The terms of a text as they stand in it, stop words left out, before the stemmer."""
        _, _, words = self._read([text], self._stops, is_query, True)
        return words

    def why_nothing(self, text: str) -> str:
        """Why a question has no term; "" where it has some."""
        if self.words(text, is_query=True):
            return ""
        stops = replace(self, stop_words=(), stemmer=None).words(text, is_query=True)
        if not stops:
            return "there is no word in it, only signs and spaces"
        shown = ", ".join(dict.fromkeys(stops[:8]))
        return f"its only words are stop words ({shown}), which are not searched for"

    def describe(self) -> str:
        stops = "English" if self.stop_words == ENGLISH else f"{len(self.stop_words)}"
        return f"reading {self.version}, stemmer {self.stemmer or 'none'}, {stops} stop words"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "stop_words": list(self.stop_words)}

    @functools.cached_property
    def _stops(self) -> np.ndarray:
        """The stop words' hashes, ascending; one that is several terms is none."""
        hashes, ends, _ = self._read(self.stop_words, np.empty(0, np.uint64), True, False, has_stems=False)
        is_one = np.diff(ends, prepend=0) == 1
        return np.unique(hashes[ends[is_one] - 1])

    def _read(
        self, texts: Sequence[str], stops: np.ndarray, is_query: bool, has_words: bool, has_stems: bool = True
    ) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Hashes of all terms in order, where each text's end, and with `has_words` what they stand for."""
        if self.version == 1:
            points, ends = code_points([text.lower() for text in texts])
            found = re.findall(r"\w\w+", " ".join(texts).lower()) if has_words else []
            words = [word for word in found if word not in self.stop_words]
            return *loops.read_1(points, ends, loops.word_characters(), stops), words
        points, ends = code_points([normalized(text) for text in texts])
        is_stemmed = self.stemmer is not None and has_stems
        tables = loops.kinds(), loops.folded()
        hashes, ends, spans = loops.read(points, ends, *tables, stops, is_query, has_words or is_stemmed)
        if is_stemmed:
            hashes = self._stemmed(hashes, points, spans)
        return hashes, ends, [_text(points, span) for span in spans] if has_words else []

    def _stemmed(self, hashes: np.ndarray, points: np.ndarray, spans: np.ndarray) -> np.ndarray:
        """The hashes with those of words replaced by their stems'. Snowball wants the accents that terms drop."""
        places = np.flatnonzero(spans[:, 2] == 1)
        _, firsts, inverse = np.unique(hashes[places], return_index=True, return_inverse=True)
        words = [_text(points, spans[place]) for place in places[firsts]]
        stems = open_stemmer(self.stemmer or "").stemWords(words)
        out = hashes.copy()
        out[places] = loops.hash_words(*code_points(stems), loops.kinds(), loops.folded())[inverse]
        return out


FIRST = Analyzer(version=1)


def titled(titles: Sequence[str], texts: Sequence[str]) -> list[str]:
    """What a chunk's terms are taken from: the title of its document, then its text."""
    return [f"{title[:TITLE_CHARACTERS]}\n{text}" if title else text for title, text in zip(titles, texts)]


def normalized(text: str) -> str:
    """Text as it is read: NFKC, case folded, ligatures as two letters."""
    if text.isascii():
        return text.lower()
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    for ligature, letters in LIGATURES:
        text = text.replace(ligature, letters)
    return text


def from_json(content: Any, where: str) -> Analyzer:
    """The analyzer that a file names; version 1 where it names none. Raises StoreError for one that is not known."""
    if content is None:
        return FIRST
    try:
        stemmer, stop_words, version = content["stemmer"], tuple(content["stop_words"]), content["version"]
    except (KeyError, TypeError) as error:
        raise StoreError(f"{where} names no reading of words", f"its analyzer lacks {error}", "make it again") from None
    is_text = all(isinstance(word, str) for word in stop_words) and isinstance(stemmer, str | None)
    if version not in (1, VERSION) or not is_text or len(stop_words) > MAX_STOP_WORDS:
        raise StoreError(
            f"{where} was read with reading {str(version)[:20]} of words",
            f"this program knows 1 to {VERSION}",
            "update retro-engine, or make it again",
        )
    if stemmer is not None:
        open_stemmer(stemmer)
    return Analyzer(stemmer, stop_words, version)


def make_analyzer(stemmer: str | None = None, stop_words: str = "en") -> Analyzer:
    """The analyzer of flags: a language of Snowball or none; stop words of a language, none, or of a file.

    Raises UsageError for a language that is not known, MissingExtraError without PyStemmer.
    """
    if stemmer is not None:
        open_stemmer(stemmer)
    return Analyzer(stemmer, _stop_words(stop_words))


def open_stemmer(language: str) -> Any:
    """Snowball's stemmer of a language: one of a thread's own, they are not to be shared."""
    with extra("stem", f"stemmer {language} needs PyStemmer"):
        import Stemmer
    known = Stemmer.algorithms()
    language = LANGUAGES.get(language, language)
    if language not in known:
        raise UsageError(f"stemmer {language!r} does not exist", nearest(language, known), f"one of {', '.join(known)}")
    return Stemmer.Stemmer(language)


def _stop_words(name: str) -> tuple[str, ...]:
    if name == "none":
        return ()
    language = LANGUAGES.get(name, name)
    if language == "english":
        return ENGLISH
    if language in LANGUAGES.values():
        from bm25s import stopwords

        return tuple(sorted(set(getattr(stopwords, f"STOPWORDS_{language.upper()}"))))
    path = Path(name)
    if not path.is_file():
        raise UsageError(
            f"stop words {name!r} do not exist",
            nearest(name, [*LANGUAGES, *LANGUAGES.values(), "none"]) or "it is neither a language nor a file",
            f"one of {', '.join(LANGUAGES)}, none, or a file with a word a line",
        )
    return _stop_words_of(path)


def _stop_words_of(path: Path) -> tuple[str, ...]:
    try:
        raw = path.read_bytes() if path.stat().st_size <= MAX_FILE_BYTES else b""
        words = sorted({word.strip() for word in raw.decode("utf-8-sig").splitlines() if word.strip()})
    except OSError as error:
        raise read_error(error, path, "name another file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8", f"at byte {error.start}", "a word a line, in UTF-8") from error
    if not 1 <= len(words) <= MAX_STOP_WORDS:
        raise UsageError(
            f"{path} holds {len(words):,} stop words",
            f"1 to {MAX_STOP_WORDS:,} in at most {MAX_FILE_BYTES:,} bytes are read",
            "a word a line; --stop-words none for none",
        )
    return tuple(words)


@dataclass(frozen=True)
class WordEdges:
    """Patterns of what a cut through a text can go through."""

    mark: re.Pattern[str]  # what belongs to the character before it
    character: re.Pattern[str]  # of a script without spaces
    characters_before: tuple[re.Pattern[str], ...]  # backwards: the last one of a text; the last two
    characters_after: tuple[re.Pattern[str], ...]  # marks, and the next one; the next two
    before: re.Pattern[str]  # backwards: the beginning of a word, or of joined ones
    after: re.Pattern[str]  # and its end


@functools.cache
def word_edges() -> WordEdges:
    kinds = loops.kinds().copy()
    kinds[[0xFF9E, 0xFF9F]] = loops.MARK  # half-width kana's, which one character with the kana before it reads
    mark = _characters(kinds >= loops.MARK)
    base = _characters((kinds == loops.IDEOGRAPH) | (kinds == loops.UNSPACED))
    letter = _characters((kinds >= loops.WORD) | (kinds == loops.HANGUL))
    joiners = f"{re.escape(loops.JOINERS)}'\u2019"
    signs = re.escape(loops.SIGNS)
    within = f"{letter[:-1]}{joiners}]"
    return WordEdges(
        re.compile(mark),
        re.compile(base),
        characters_before=tuple(re.compile(f"(?:{mark}*{base}){{1,{count}}}") for count in (1, 2)),
        characters_after=tuple(re.compile(f"{mark}*(?:{base}{mark}*){{0,{count}}}") for count in (1, 2)),
        before=re.compile(f"{within[:-1]}{signs}]*"),
        after=re.compile(f"(?:[{signs}]+|[{joiners}]?{letter}){within}*[{signs}]*"),
    )


def _characters(is_in: np.ndarray) -> str:
    """A class of a regular expression: the code points that are in."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], is_in, [False])).astype(np.int8)))
    ranges = [f"\\U{first:08x}-\\U{end - 1:08x}" for first, end in zip(edges[::2].tolist(), edges[1::2].tolist())]
    return f"[{''.join(ranges)}]"


def code_points(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The code points of texts, one after another, and where each text's end."""
    points = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
    return points, np.cumsum([len(text) for text in texts], dtype=np.int64)


def _text(points: np.ndarray, span: np.ndarray) -> str:
    return points[span[0] : span[1]].tobytes().decode("utf-32-le", "surrogatepass")
