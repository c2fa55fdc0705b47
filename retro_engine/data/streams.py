"""A file's bytes as UTF-8: unpacked (.gz .zst .bz2 .xz), and recoded where it begins with UTF-16's or UTF-32's mark.

What its encoding does not allow becomes the byte FF, which no UTF-8 has: rows that hold it are set aside later, or
repaired, as those of a UTF-8 file are, and the rows around them are not touched.
"""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import IO, Any

import zstandard

from retro_engine.data.inputs import check_file, open_file
from retro_engine.errors import MissingInputError

ZSTD_STEP = 1 << 10  # compressed bytes decompressed at once
READ_STEP = 1 << 16
HEAD = 1 << 12  # bytes by which an encoding is known
_UTF8_MARK = b"\xef\xbb\xbf"
_MARKS = {
    b"\xff\xfe\0\0": "utf-32-le",  # before UTF-16's, whose mark it begins with
    b"\0\0\xfe\xff": "utf-32-be",
    b"\xff\xfe": "utf-16-le",
    b"\xfe\xff": "utf-16-be",
}
REPLACE = "--errors replace of prepare and docs add"  # not every command that says what is wrong has the flags
TEXT_KEY = "--text-key of prepare and docs add names another"
STREAM_ERRORS = (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError)  # of damaged and truncated files


class Unusable(Exception):
    """The reason why one row is set aside."""


def open_unpacked(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked by its suffix. Raises MissingInputError for what is no regular file."""
    name = path.name.lower()
    if name.endswith(".zst"):
        return io.BufferedReader(_ZstdStream(open_file(path)), 1 << 20)
    if not name.endswith((".gz", ".bz2", ".xz")):
        return open_file(path)
    check_file(path)
    if name.endswith(".gz"):
        return io.BufferedReader(gzip.open(path, "rb"))  # type: ignore[arg-type,return-value]
    return bz2.open(path, "rb") if name.endswith(".bz2") else lzma.open(path, "rb")


def open_text(path: Path) -> tuple[IO[bytes], str]:
    """The bytes of a text as UTF-8, and the name of its own encoding. Raises Unusable, MissingInputError."""
    file = open_unpacked(path)
    try:
        return as_utf8(file, can_go_back=file.seekable())
    except BaseException:
        file.close()
        raise


def as_utf8(file: IO[bytes], can_go_back: bool = False) -> tuple[IO[bytes], str]:
    """The rest of `file` in UTF-8 without its mark, and the name of its own encoding.

    Raises Unusable for UTF-16 and UTF-32 without a mark.
    """
    head = file.read(HEAD)
    mark = next((mark for mark in _MARKS if head.startswith(mark)), b"")
    if mark:
        return io.BufferedReader(_Recoded(file, head[len(mark) :], _MARKS[mark]), 1 << 20), _MARKS[mark].upper()[:6]
    if guess := _unmarked(head):
        raise Unusable(f"{guess} without a byte order mark: iconv -f {guess} -t UTF-8 makes a file that can be read")
    skipped = len(_UTF8_MARK) if head.startswith(_UTF8_MARK) else 0
    if can_go_back:  # nothing to recode: no step between
        file.seek(skipped)
        return file, "UTF-8"
    return io.BufferedReader(Joined(file, head[skipped:]), 1 << 20), "UTF-8"


def read_text(file: IO[bytes], limit: int, name: str, errors: str = "strict") -> str:
    """All of a text of at most `limit` bytes. Raises MissingInputError."""
    try:
        text, encoding = as_utf8(file)
        raw = text.read(limit + 1)
        if len(raw) > limit:
            raise Unusable(f"it is larger than {limit:,} bytes")
        return decode(raw, errors, encoding)
    except (Unusable, *STREAM_ERRORS) as error:
        raise MissingInputError(f"{name} cannot be read", str(error)) from error


def decode(raw: bytes, errors: str = "strict", encoding: str = "UTF-8") -> str:
    """Text of UTF-8 bytes that were once in `encoding`. Raises Unusable."""
    raw = raw.removeprefix(_UTF8_MARK)
    try:
        return raw.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        where = f"not UTF-8 at byte {error.start}" if encoding == "UTF-8" else f"not {encoding}"
        raise Unusable(f"{where} ({REPLACE} puts U+FFFD there; iconv -f ENCODING -t UTF-8 keeps it)") from error


def _unmarked(head: bytes) -> str:
    """UTF-16 or UTF-32 without a mark: letters of Latin scripts have a zero in the same place of each unit."""
    sample = head[: len(head) // 4 * 4]
    zeros = [sample[place::4].count(0) / max(1, len(sample) // 4) for place in range(4)]
    for name, is_zero in {
        "UTF-32LE": (0, 1, 1, 1),
        "UTF-32BE": (1, 1, 1, 0),
        "UTF-16LE": (0, 1, 0, 1),
        "UTF-16BE": (1, 0, 1, 0),
    }.items():
        if all(share > 0.5 if wanted else share < 0.1 for share, wanted in zip(zeros, is_zero)):
            return name
    return ""


def _as_byte_ff(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError), error
    return "\udcff", error.end


codecs.register_error("retro-engine.unusable", _as_byte_ff)  # decoders take handlers by name alone


class Joined(io.RawIOBase):
    """Some first bytes and the rest of a file."""

    def __init__(self, file: IO[bytes], head: bytes):
        self._file, self._ready = file, memoryview(head)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            more = self._more()
            if more is None:
                return 0
            self._ready = memoryview(more)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _more(self) -> bytes | None:
        """The next bytes, which may be none; None at the end."""
        raw = self._file.read(READ_STEP)
        return self._take(raw) or (b"" if raw else None)

    def _take(self, raw: bytes) -> bytes:
        return raw

    def close(self) -> None:
        self._file.close()
        super().close()


class _Recoded(Joined):
    """The rest of a file in UTF-16 or UTF-32 as UTF-8."""

    def __init__(self, file: IO[bytes], head: bytes, encoding: str):
        self._decoder = codecs.getincrementaldecoder(encoding)("retro-engine.unusable")
        super().__init__(file, self._take(head) if head else b"")

    def _take(self, raw: bytes) -> bytes:
        return self._decoder.decode(raw, final=not raw).encode("utf-8", "surrogateescape")


class _ZstdStream(Joined):
    """Decompressed frames of a .zst file; EOFError where the last one is cut short."""

    def __init__(self, file: IO[bytes]):
        super().__init__(file, b"")
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame = self._new_frame()
        self._input = b""
        self._has_begun = False

    def _more(self) -> bytes | None:
        if self._frame.eof:
            self._input = self._frame.unused_data + self._input
            self._frame, self._has_begun = self._new_frame(), False
        self._input = self._input or self._file.read(1 << 17)
        if not self._input:
            if self._has_begun:
                raise EOFError("the compressed data is cut short")
            return None
        self._has_begun = True
        # a little at a time: a few bytes can stand for very many
        part, self._input = self._input[:ZSTD_STEP], self._input[ZSTD_STEP:]
        return self._frame.decompress(part)
