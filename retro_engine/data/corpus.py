"""Files to documents: text, Markdown, HTML, PDF, Word, and rows of JSON, TSV, CSV and Parquet, compressed or not.

A document that cannot be used (bad UTF-8, no text, not an object, over the size limit ...) is set aside with
its file, line and reason; nothing of it reaches the store, and the other documents are not touched.
"""

import io
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TypeVar

from retro_engine.data.document_files import MOST_FILE_BYTES, docx_text, pdf_text
from retro_engine.data.html_text import declared_encoding, page_text
from retro_engine.data.identity import ID_KEYS, is_missing, own_id
from retro_engine.data.inputs import (
    DOCUMENT_KINDS,
    FORMATS,
    PAGE_KINDS,
    TEXT_KINDS,
    SetAside,
    is_unread,
    kind_of,
    shown,
    standard_input,
    stem_of,
)
from retro_engine.data.rows import Row, RowReader
from retro_engine.data.splitting import SPLITS, Piece, heading_level, pieces
from retro_engine.data.streams import (
    HEAD,
    REPLACE,
    STREAM_ERRORS,
    TEXT_KEY,
    Unusable,
    as_utf8,
    decode,
    open_text,
    open_unpacked,
)
from retro_engine.errors import MissingInputError, UsageError, nearest

MAX_DOCUMENT_BYTES = 64 << 20
JSON_LINES = (".jsonl", ".ndjson")
COLUMNS = (*ID_KEYS, "title", "metadata")  # of a row, beside its text
FieldValue = str | int | float | bool  # of a field of metadata


@dataclass(frozen=True)
class Document:
    id: str
    title: str
    text: str
    source: str = ""  # file:line, or the file
    path: Path | None = None  # the file, where all of it is the document
    metadata: Mapping[str, FieldValue] = field(default_factory=dict, hash=False)  # what libraries filter by


ReadRow = TypeVar("ReadRow", bound=Document | SetAside)


@dataclass(frozen=True)
class Reader:
    """How files are read. `errors`: strict sets rows with bad UTF-8 aside, replace repairs them. `format`: what all files
    are, of inputs.FORMATS; None = their suffixes say. `split`: of texts (splitting.py); auto, which
    `splitting.settle` settles, is none here.
    """

    text_key: str = "text"
    errors: str = "strict"
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    format: str | None = None
    split: str = "none"

    def __post_init__(self) -> None:
        if self.format is not None and self.format not in FORMATS:
            names = list(FORMATS)
            raise UsageError(f"--format {self.format} does not exist", nearest(self.format, names), ", ".join(names))
        if self.split not in SPLITS:
            names = list(SPLITS)
            raise UsageError(f"--split {self.split} does not exist", nearest(self.split, names), ", ".join(names))

    @property
    def kind(self) -> str:
        """The suffix that all files are read as; "" = each as its own says."""
        return "" if self.format is None else FORMATS[self.format]

    def read(self, paths: Sequence[Path]) -> Iterator[Document | SetAside]:
        """Documents of `paths` in order, read by their kinds; of an unknown kind as JSON."""
        columns = (self.text_key, *COLUMNS)
        rows = RowReader(self.errors, self.max_document_bytes, columns, required=self.text_key)
        for path in paths:
            kind = self.kind or kind_of(path)
            if kind in TEXT_KINDS and self.split in ("blank-lines", "headings"):
                yield from self._parts(path)
                continue
            if kind in (*TEXT_KINDS, *PAGE_KINDS, *DOCUMENT_KINDS):
                yield self._whole_file(path, kind)
                continue
            for row in rows.read(path, kind):
                yield row if isinstance(row, SetAside) else self._document_or_reason(row)

    def _parts(self, path: Path) -> Iterator[Document | SetAside]:
        """A text that is split; whole where it has no headings to be split at."""
        level = heading_level(path) if self.split == "headings" else None
        if self.split == "headings" and level is None:
            yield self._whole_file(path, self.kind or kind_of(path))
            return
        name, last = shown(path), 1
        try:
            file, encoding = open_text(path)
            with file:
                for piece in pieces(file, level, self.max_document_bytes):
                    last = piece.line
                    yield self._part(piece, f"{name}:{piece.line}", encoding, shown(stem_of(path)))
        except MissingInputError as error:
            yield SetAside(name, f"{error.what}: {error.why}", is_unread=is_unread(error))
        except Unusable as error:
            yield SetAside(name, str(error))
        except STREAM_ERRORS as error:
            yield _cut_off(f"{name}:{last}", error)

    def _part(self, piece: Piece, source: str, encoding: str, stem: str) -> Document | SetAside:
        if len(piece.text) > self.max_document_bytes:
            return SetAside(source, f"larger than {self.max_document_bytes:,} bytes")
        try:
            text = self._usable(decode(piece.text, self.errors, encoding))
        except Unusable as error:
            return SetAside(source, str(error))
        return Document(source, self._label(piece.title.decode("utf-8", "replace")) or stem, text, source)

    def _whole_file(self, path: Path, kind: str) -> Document | SetAside:
        """A file that is one document."""
        name = shown(path)
        try:
            if kind in DOCUMENT_KINDS:
                title, text = self._document_file(path, kind)
                return self._named(path, title, text)
            file, encoding = open_text(path)
            with file:
                raw = file.read(self.max_document_bytes + 1)
            if len(raw) > self.max_document_bytes:
                return SetAside(name, f"larger than {self.max_document_bytes:,} bytes")
            if kind in PAGE_KINDS:
                title, text = page_text(self._page(raw, encoding))
                text = self._usable(text, "empty: the page has no text")
            else:
                text = self._usable(decode(raw, self.errors, encoding))
                title = _heading(text) if kind in (".md", ".markdown") else ""
        except MissingInputError as error:
            return SetAside(name, f"{error.what}: {error.why}", is_unread=is_unread(error))
        except Unusable as error:
            return SetAside(name, str(error))
        except STREAM_ERRORS as error:
            return _cut_off(name, error)
        return self._named(path, title, text)

    def _named(self, path: Path, title: str, text: str) -> Document:
        """A document that is all of a file, under its title or else the file's name."""
        return Document(shown(path), self._label(title) or shown(stem_of(path)), text, shown(path), path)

    def _document_file(self, path: Path, kind: str) -> tuple[str, str]:
        """Raises Unusable."""
        with open_unpacked(path) as file:
            raw = file.read(MOST_FILE_BYTES + 1)
        if len(raw) > MOST_FILE_BYTES:
            raise Unusable(f"larger than {MOST_FILE_BYTES:,} bytes")
        title, text = (pdf_text if kind == ".pdf" else docx_text)(raw)
        text = text.replace("\0", "").encode("utf-8", "replace").decode()  # their fonts' fault, no file's
        if len(text) > self.max_document_bytes:
            raise Unusable(f"its text is larger than {self.max_document_bytes:,} bytes")
        return title, self._usable(text, "empty: it has no text")

    def _page(self, raw: bytes, encoding: str) -> str:
        declared = declared_encoding(raw) if encoding == "UTF-8" else "utf-8"
        if declared == "utf-8":
            return decode(raw, self.errors, encoding)
        try:
            return raw.decode(declared, self.errors)
        except UnicodeDecodeError as error:
            raise Unusable(f"not {declared}, which the page says it is, at byte {error.start}") from error

    def _document_or_reason(self, row: Row) -> Document | SetAside:
        try:
            return self._document(row)
        except Unusable as error:
            return SetAside(row.source, str(error))

    def _document(self, row: Row) -> Document:
        """Raises Unusable."""
        if self.text_key not in row.values:
            keys = ", ".join(list(row.values)[:6])
            raise Unusable(f"no key {self.text_key!r} (it has {keys}); {TEXT_KEY}")
        value = row.values[self.text_key]
        if not isinstance(value, str):
            raise Unusable(f"{self.text_key!r} is {type(value).__name__}, not text")
        if len(value) > self.max_document_bytes:
            raise Unusable(f"larger than {self.max_document_bytes:,} bytes")
        title, about = row.values.get("title"), row.values.get("metadata")
        try:
            name = own_id(row.values)
        except ValueError as error:
            raise Unusable(str(error)) from error
        return Document(
            self._label(row.source if name is None else name),
            self._label(title) if isinstance(title, str) else "",
            self._usable(value),
            row.source,
            metadata={k: v for k, v in about.items() if not is_missing(v)} if isinstance(about, Mapping) else {},
        )

    def _label(self, value: str) -> str:
        return value.encode("utf-8", "replace").decode()

    def _usable(self, text: str, empty: str = "empty") -> str:
        if self.errors == "replace":
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            is_byte = "\udc80" <= text[error.start] <= "\udcff" and error.end == error.start + 1
            what = "not UTF-8, or half of a surrogate pair" if is_byte else "holds half of a surrogate pair"
            raise Unusable(f"{what} ({REPLACE} repairs it)") from error
        if "\0" in text:
            raise Unusable("binary: it holds a NUL byte")
        if not text.strip():
            raise Unusable(empty)
        return text


def _cut_off(source: str, error: BaseException) -> SetAside:
    why = f"the file cannot be read: {getattr(error, 'strerror', None) or error}"
    return SetAside(source, why, is_unread=is_unread(error))


def _heading(text: str) -> str:
    """The title of Markdown that begins with one."""
    first = text.lstrip().split("\n", 1)[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def in_batches(
    rows: Iterable[ReadRow], most_characters: int, most: int | None = None
) -> Iterator[list[ReadRow]]:  # fmt: skip
    """Lists of rows that are full with so many characters of text, or so many rows."""
    batch: list[ReadRow] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len(row.text) if isinstance(row, Document) else 0
        if size >= most_characters or len(batch) == most:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def spool_standard_input(folder: Path, max_document_bytes: int = MAX_DOCUMENT_BYTES) -> Path:
    """Copy standard input to a file in `folder`, so that it can be read twice, with the suffix of what it looks like.

    Raises MissingInputError where it is closed or endless. Of one text no more is kept than shows that it is too long.
    """
    stream = standard_input()
    head = stream.read(HEAD)
    try:
        kind = _kind_of_text(as_utf8(io.BytesIO(head))[0].read())
    except Unusable:
        kind = ".txt"
    path = folder / f".stdin{kind}"
    with open(path, "wb") as file:
        file.write(head)
        while (part := stream.read(1 << 20)) and (kind == ".json" or file.tell() <= max_document_bytes):
            file.write(part)
    return path


def _kind_of_text(head: bytes) -> str:
    start = head.lstrip()
    if start[:1] == b"{" or (start[:1] == b"[" and start[1:].lstrip()[:1] in (b"{", b"]")):
        return ".json"
    return ".html" if start[:14].lower().startswith((b"<!doctype html", b"<html")) else ".txt"


def spool_json_lines(path: Path, file: IO[bytes]) -> None:
    """Write a file of JSON lines, unpacked and in UTF-8, to `file`, and go back to its start.

    Raises MissingInputError where it is not there, of another kind, or cut short.
    """
    if kind_of(path) not in JSON_LINES:
        known = f"known: {', '.join(JSON_LINES)}, compressed or not"
        raise MissingInputError(f"{shown(path)} is not a file of JSON lines", known)
    try:
        with open_text(path)[0] as source:
            shutil.copyfileobj(source, file, 1 << 20)
    except MissingInputError:
        raise
    except (Unusable, *STREAM_ERRORS) as error:
        raise MissingInputError(
            f"{shown(path)} cannot be read to its end", str(error), "make or copy it again"
        ) from error
    file.seek(0)
