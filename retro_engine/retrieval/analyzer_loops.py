"""Text to hashed terms, compiled: what kind every character is, and the loops over code points.

A term is the 64-bit FNV-1a of its folded code points, mixed once more. Two of 10^6 terms share one with a chance of
3e-8. The hashes are in files: what gives them does not change, a new reading is a new version of `analyzer`.
"""

import functools
import unicodedata

import numpy as np

from retro_engine.jit import numba

UNICODE = 0x110000
# Kinds of characters. What is not named is a BREAK: spaces, punctuation, symbols. From WORD on they can be in a word,
# from MARK on they belong to the character before them; HANGUL to UNSPACED are in runs.
BREAK, JOINER, SIGN, HANGUL, IDEOGRAPH, UNSPACED, WORD, DIGIT, MARK, IGNORED = range(10)
WRITTEN_UNSPACED = (  # scripts without spaces between words, but for Han: first and last code points
    *((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF)),  # Thai, Lao, Myanmar, Khmer
    *((0x1950, 0x19DF), (0x1A20, 0x1AAF), (0xA980, 0xA9FF), (0xAA60, 0xAADF)),  # Tai, Javanese, more Myanmar
    *((0x3040, 0x30FF), (0x3100, 0x312F), (0x31A0, 0x31BF), (0x31F0, 0x31FF), (0xFF66, 0xFF9D)),  # kana, bopomofo
    *((0xA000, 0xA4CF), (0x1B000, 0x1B16F)),  # Yi, more kana
)
HAN = ((0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3021, 0x3029), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF))
HAN_BEYOND = (0x20000, 0x3FFFF)
SYLLABLES = ((0x1100, 0x11FF), (0x3130, 0x318F), (0xA960, 0xA97F), (0xAC00, 0xD7FF))
INVISIBLE = (  # hyphens and joiners that are not seen, marks of direction and of variants; accents, vowel points
    *((0xAD, 0xAD), (0x34F, 0x34F), (0x200C, 0x200F), (0x202A, 0x202E), (0x2060, 0x206F), (0xFE00, 0xFE0F)),
    *((0xFEFF, 0xFEFF), (0xE0000, 0xE0FFF), (0x180B, 0x180F)),
    *((0x300, 0x36F), (0x591, 0x5BD), (0x5BF, 0x5BF), (0x5C1, 0x5C7), (0x610, 0x61A), (0x640, 0x640)),
    *((0x64B, 0x65F), (0x670, 0x670), (0x6D6, 0x6ED)),
)
ACCENTED = ((0xC0, 0x24F), (0x370, 0x3FF), (0x1E00, 0x1FFF))  # Latin and Greek letters, whose accents are dropped
SAME = str.maketrans("łøđħŧıёأإآىیکة’ʼ", "lodhtiеااايیكه''")  # letters written in two ways
JOINERS, SIGNS = ".,@&_·", "+#"
BASIS, PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)


@functools.cache
def kinds() -> np.ndarray:
    """[code points] u1: the kind of each."""
    out = np.zeros(UNICODE, np.uint8)
    for point in (*range(0x32000), *range(0xE0000, 0xE1000)):
        category = unicodedata.category(chr(point))
        if category == "Nd":
            out[point] = DIGIT
        elif category[0] in "LN":
            out[point] = WORD
        elif category[0] == "M":
            out[point] = IGNORED if category == "Me" else MARK
    for ranges, kind in ((WRITTEN_UNSPACED, UNSPACED), ((*HAN, HAN_BEYOND), IDEOGRAPH), (SYLLABLES, HANGUL)):
        for first, last in ranges:
            within = out[first : last + 1]
            within[(within == WORD) | (first == HAN_BEYOND[0])] = kind
    for first, last in INVISIBLE:
        out[first : last + 1] = IGNORED
    for characters, kind in ((JOINERS, JOINER), (SIGNS, SIGN)):
        out[[ord(character) for character in characters]] = kind
    out[0x2BC] = BREAK  # an apostrophe that Unicode calls a letter
    return out


@functools.cache
def folded() -> np.ndarray:
    """[code points] u4: the letter without its accent, the digit as one of 0 ... 9, everything else itself."""
    out = np.arange(UNICODE, dtype=np.uint32)
    for first, last in ACCENTED:
        for point in range(first, last + 1):
            base = unicodedata.normalize("NFD", chr(point))
            if all(0x300 <= ord(mark) <= 0x36F for mark in base[1:]):
                out[point] = ord(base[0])
    for point in np.flatnonzero(kinds() == DIGIT).tolist():
        out[point] = ord("0") + unicodedata.decimal(chr(point))
    for point, same in SAME.items():
        out[point] = same
    return out


@numba.njit(nogil=True, cache=True)
def _hashed(value, point):  # type: ignore[no-untyped-def]
    return (value ^ np.uint64(point)) * PRIME


@numba.njit(nogil=True, cache=True)
def _mixed(value):  # type: ignore[no-untyped-def]
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return value ^ (value >> np.uint64(31))


@numba.njit(nogil=True, cache=True)
def _put(out, spans, found, value, begin, end, is_word):  # type: ignore[no-untyped-def]
    """Write a term; return how many there are."""
    out[found] = _mixed(value)
    if len(spans):
        spans[found, 0], spans[found, 1], spans[found, 2] = begin, end, is_word
    return found + 1


@numba.njit(nogil=True, cache=True)
def _read_word(points, place, first, end, kinds, folded, out, spans, found):  # type: ignore[no-untyped-def]
    """The word that begins at `place`, with what signs join to it."""
    part, last, length = BASIS, place, 0
    while last < end and kinds[points[last]] >= WORD:
        kind = kinds[points[last]]
        if kind != IGNORED:
            part = _hashed(part, folded[points[last]])
            length += kind != MARK
        last += 1
    before = points[place - 1] if place > first else np.uint32(32)
    kind_before = kinds[points[place - 2]] if place - 1 > first else np.uint8(BREAK)
    is_dotted = before == 46 and kind_before == BREAK and kinds[points[place]] == WORD  # 46 is the full stop: .NET
    kind = kinds[points[last]] if last < end else np.uint8(BREAK)
    is_clitic = length == 1 and folded[before] == 39 and kind_before != BREAK  # 39 is the apostrophe: it's
    if is_dotted or kind == SIGN or (kind == JOINER and last + 1 < end and kinds[points[last + 1]] >= WORD):
        return _read_joined(points, place, end, kinds, folded, out, spans, found, is_dotted, is_clitic)
    if part != BASIS and not is_clitic:
        found = _put(out, spans, found, part, place, last, 1)
    return last, found


@numba.njit(nogil=True, cache=True)
def _read_joined(points, place, end, kinds, folded, out, spans, found, is_dotted, is_clitic):  # type: ignore[no-untyped-def]
    """Words that signs join: each, and where it means more, the whole. `is_clitic`: the first one is no word."""
    begin, is_more = place - is_dotted, is_dotted
    whole = letters = BASIS
    if is_dotted:
        whole = _hashed(whole, 46)
    is_acronym = not is_dotted
    while True:
        part, start, length = BASIS, place, 0
        while place < end and kinds[points[place]] >= WORD:
            if kinds[points[place]] != IGNORED:
                point = folded[points[place]]
                part, whole, letters = _hashed(part, point), _hashed(whole, point), _hashed(letters, point)
                length += kinds[points[place]] != MARK
            place += 1
        is_acronym = is_acronym and length == 1 and kinds[points[start]] == WORD
        if part != BASIS and not is_clitic:
            found = _put(out, spans, found, part, start, place, 1)
        if place + 1 >= end or kinds[points[place]] != JOINER or kinds[points[place + 1]] < WORD:
            break
        sign = points[place]
        if sign == 44:  # the comma: within numbers only, where it says nothing
            if kinds[points[place - 1]] != DIGIT or kinds[points[place + 1]] != DIGIT:
                break
        else:
            whole = _hashed(whole, sign)
        is_acronym = is_acronym and sign == 46
        is_more, is_clitic = True, False
        place += 1
    last = place
    while last < end and kinds[points[last]] == SIGN and last < place + 3:
        last += 1
    is_signed = last > place and (
        last == end or kinds[points[last]] < WORD or (last == place + 2 and points[place] == 43)
    )
    if is_signed:
        for sign_place in range(place, last):
            whole = _hashed(whole, points[sign_place])
        found, place = _put(out, spans, found, whole, begin, last, 0), last
    elif is_more:
        found = _put(out, spans, found, letters if is_acronym else whole, begin, place, 0)
    return place, found


@numba.njit(nogil=True, cache=True)
def _read_run(points, place, end, kinds, folded, out, spans, found, is_query):  # type: ignore[no-untyped-def]
    """A run without spaces: pairs of neighboring characters, in texts also ideographs and syllables alone.

    A character is a letter and its marks. Of Hangul, which has spaces, the whole word too.
    """
    is_hangul = kinds[points[place]] == HANGUL
    whole, begin, length = BASIS, place, 0
    before = one = BASIS  # hashes of the character before with this one, and of this one
    start_before = start = place
    while True:
        is_over = place >= end
        kind = np.uint8(BREAK) if is_over else kinds[points[place]]
        is_next = kind == HANGUL if is_hangul else (kind >= IDEOGRAPH and kind <= UNSPACED)
        if is_next or kind < MARK:
            if length:  # the character that ends here
                is_alone = length == 1 and not is_next
                if length > 1 and not (is_hangul and length == 2 and not is_next):
                    found = _put(out, spans, found, before, start_before, place, 2)
                if (is_alone and not is_hangul) or (
                    not is_query and not is_alone and (is_hangul or kinds[points[start]] == IDEOGRAPH)
                ):
                    found = _put(out, spans, found, one, start, place, 2)
            if not is_next:
                break
            length += 1
            before, one, start_before, start = one, BASIS, start, place
        if kind != IGNORED:
            point = folded[points[place]]
            before, one, whole = _hashed(before, point), _hashed(one, point), _hashed(whole, point)
        place += 1
    if is_hangul:
        found = _put(out, spans, found, whole, begin, place, 2)
    return place, found


@numba.njit(nogil=True, cache=True)
def _is_in(value, ascending):  # type: ignore[no-untyped-def]
    """Whether the values have it. By hand, as the copies below: NumPy's functions take numba seconds to compile."""
    low, high = 0, len(ascending)
    while low < high:
        middle = (low + high) // 2
        if ascending[middle] < value:
            low = middle + 1
        else:
            high = middle
    return low < len(ascending) and ascending[low] == value


@numba.njit(nogil=True, cache=True)
def _copy(out, spans, place, from_out, from_spans, from_place):  # type: ignore[no-untyped-def]
    out[place] = from_out[from_place]
    if len(spans):
        for column in range(3):
            spans[place, column] = from_spans[from_place, column]


@numba.njit(nogil=True, cache=True)
def read(points, text_ends, kinds, folded, stop_words, is_query, has_spans):  # type: ignore[no-untyped-def]
    """The terms of texts in their order: hashes, where each text's end, and with `has_spans` [terms, 3] where each
    begins and ends among the code points and whether it is a word (1), a part of a run (2) or joined words (0)."""
    out = np.empty(len(points) // 3 + 64, np.uint64)
    spans = np.empty((len(out) if has_spans else 0, 3), np.int64)
    ends = np.empty(len(text_ends), np.int64)
    found = place = 0
    for text in range(len(text_ends)):
        first, end = place, text_ends[text]
        begin = found
        most = found + 3 * (end - place) + 8
        if most > len(out):
            old, old_spans = out, spans
            out, spans = np.empty(2 * most, np.uint64), np.empty((2 * most if has_spans else 0, 3), np.int64)
            for term in range(found):
                _copy(out, spans, term, old, old_spans, term)
        while place < end:
            kind = kinds[points[place]]
            if kind >= WORD and kind < IGNORED:
                place, found = _read_word(points, place, first, end, kinds, folded, out, spans, found)
            elif kind >= HANGUL and kind < WORD:
                place, found = _read_run(points, place, end, kinds, folded, out, spans, found, is_query)
            else:
                place += 1
        kept = begin
        for term in range(begin, found):
            if not _is_in(out[term], stop_words):
                _copy(out, spans, kept, out, spans, term)
                kept += 1
        found = kept
        ends[text] = found
    return out[:found], ends, spans[: found if has_spans else 0]


@numba.njit(nogil=True, cache=True)
def hash_words(points, ends, kinds, folded):  # type: ignore[no-untyped-def]
    """The hash of each text as one term; without the tables, of the code points as they are."""
    out = np.empty(len(ends), np.uint64)
    place = 0
    for word in range(len(ends)):
        value = BASIS
        while place < ends[word]:
            if not len(kinds):
                value = _hashed(value, points[place])
            elif kinds[points[place]] != IGNORED:
                value = _hashed(value, folded[points[place]])
            place += 1
        out[word] = _mixed(value)
    return out


@numba.njit(nogil=True, cache=True)
def count(hashes, ends):  # type: ignore[no-untyped-def]
    """The different terms of each text, ascending, how often it has them, where they end, and its length in terms.

    Works in place on `hashes`."""
    counts = np.empty(len(hashes), np.uint16)
    new_ends = np.empty(len(ends), np.int64)
    lengths = np.empty(len(ends), np.int32)
    kept = before = 0
    for text in range(len(ends)):
        first, end = kept, ends[text]
        lengths[text] = end - before
        words = np.sort(hashes[before:end])
        for word in words:
            if kept > first and hashes[kept - 1] == word:
                counts[kept - 1] += np.uint16(counts[kept - 1] < 65535)
            else:
                hashes[kept] = word
                counts[kept] = 1
                kept += 1
        new_ends[text] = kept
        before = end
    return hashes[:kept], counts[:kept], new_ends, lengths


@functools.cache
def word_characters() -> np.ndarray:
    """[code points] whether a regular expression's \\w matches: of version 1."""
    return np.array([character.isalnum() or character == "_" for character in map(chr, range(UNICODE))])


@numba.njit(nogil=True, cache=True)
def read_1(points, text_ends, is_word, stop_words):  # type: ignore[no-untyped-def]
    """`read` as version 1 did: runs of two or more word characters."""
    out = np.empty(len(points) // 2 + 1, np.uint64)
    ends = np.empty(len(text_ends), np.int64)
    found = place = 0
    for text in range(len(text_ends)):
        while place < text_ends[text]:
            if not is_word[points[place]]:
                place += 1
                continue
            begin, value = place, BASIS
            while place < text_ends[text] and is_word[points[place]]:
                value = _hashed(value, points[place])
                place += 1
            value = _mixed(value)
            at = np.searchsorted(stop_words, value)
            if place - begin >= 2 and (at == len(stop_words) or stop_words[at] != value):
                out[found] = value
                found += 1
        ends[text] = found
    return out[:found], ends
