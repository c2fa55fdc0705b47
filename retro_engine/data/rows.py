"""Rows of a file, each an object with its place: JSON lines, JSON (an array of rows, or one object), TSV, CSV, Parquet.

A row that cannot be read is set aside with its file, line (or number) and reason, and the others are not touched. Memory
is bounded by the longest row.
"""

import codecs
import csv
import io
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from retro_engine.data.inputs import SetAside, is_unread, kind_of, open_file, shown
from retro_engine.data.streams import HEAD, STREAM_ERRORS, TEXT_KEY, Joined, Unusable, decode, open_text
from retro_engine.errors import MissingInputError, extra

PARQUET_ROWS = 256  # read at once
SKIP_STEP = 1 << 20  # bytes of a line that is too long, passed over at once
VALUE_STEP = 1 << 16  # bytes of JSON read at first; doubled until a value is whole
PASSAGES = ("id", "text", "title")  # the columns of DPR's passages, where a TSV file has no line of names
BROKEN = "the file cannot be read further"


@dataclass(frozen=True)
class Row:
    values: dict[str, Any]
    source: str  # file:line, or file:number where rows have no lines of their own
    number: int


@dataclass(frozen=True)
class RowReader:
    """How rows are read. `errors`: strict sets rows with bad UTF-8 aside, replace repairs them.

    `columns` are read from Parquet where it has them; tables and Parquet must have `required`, where one is named.
    """

    errors: str
    max_bytes: int
    columns: tuple[str, ...]
    required: str = ""

    def read(self, path: Path, kind: str = "") -> Iterator[Row | SetAside]:
        """The rows of a file by its kind ("" = its suffix says); a file of unknown kind is read as JSON."""
        kind = kind or kind_of(path)
        if kind == ".parquet":
            yield from self._parquet(path)
            return
        number = 0
        try:
            file, encoding = open_text(path)
            with file:
                text = _Text(_with_line_feeds(file), encoding, self.errors, self.max_bytes)
                rows = self._rows_of(text, kind, shown(path))
                for row in rows:
                    number = row.number if isinstance(row, Row) else text.number
                    yield row
        except Unusable as error:
            yield SetAside(shown(path), str(error))
        except MissingInputError as error:
            yield SetAside(shown(path), f"{error.what}: {error.why}", is_unread=is_unread(error))
        except STREAM_ERRORS as error:  # a truncated or damaged stream
            yield SetAside(f"{shown(path)}:{number + 1}", f"{BROKEN}: {error}", is_unread=is_unread(error))

    def _rows_of(self, text: "_Text", kind: str, name: str) -> Iterator[Row | SetAside]:
        if kind in (".tsv", ".csv"):
            return self._table(text, kind, name)
        if kind in (".jsonl", ".ndjson"):
            return self._json_lines(text, name)
        return self._json(text, name)

    def _json_lines(self, text: "_Text", name: str) -> Iterator[Row | SetAside]:
        for line in text:
            if not line.strip():
                continue
            yield _row(name, text.number, lambda line=line: _object(_parse(text.decoded(line))))  # type: ignore[misc]

    def _json(self, text: "_Text", name: str) -> Iterator[Row | SetAside]:
        """An array of rows, one object, or lines of objects; rows of an array are counted, not their lines."""
        head = text.head().lstrip(b" \t\r\n\xef\xbb\xbf")
        if head.startswith(b"["):
            yield from self._array(text, name)
        elif not head.startswith(b"{") or _is_whole(head.split(b"\n")[0]):
            yield from self._json_lines(text, name)
        else:
            try:
                yield Row(_object(_parse(text.rest())), f"{name}:1", 1)
            except Unusable as error:
                yield SetAside(name, str(error))

    def _array(self, text: "_Text", name: str) -> Iterator[Row | SetAside]:
        for number, value in enumerate(_values(text), 1):
            yield _row(name, number, lambda value=value: _object(value))  # type: ignore[misc]

    def _table(self, text: "_Text", kind: str, name: str) -> Iterator[Row | SetAside]:
        """Lines of TSV or CSV under their names."""
        records = _tsv_records(text) if kind == ".tsv" else _csv_records(text, self.max_bytes)
        columns: list[str] | None = None
        for number, cells in records:
            source = f"{name}:{number}"
            if isinstance(cells, Unusable):
                yield SetAside(source, str(cells))
                continue
            if columns is None:
                try:
                    columns, is_named = self._columns(cells, kind)
                except Unusable as error:
                    yield SetAside(name, str(error))
                    return
                if is_named:
                    continue
            if len(cells) != len(columns):
                yield SetAside(source, f"it has {len(cells)} columns, not {len(columns)} ({', '.join(columns[:6])})")
                continue
            yield Row(dict(zip(columns, cells)), source, number)

    def _columns(self, first: list[str], kind: str) -> tuple[list[str], bool]:
        """Names of the columns, and whether the first line has them. DPR's passages come without, too."""
        names = [cell.strip() for cell in first]
        if not self.required or self.required in names:
            if len(set(names)) < len(names):
                raise Unusable(f"a column's name stands twice ({', '.join(names[:6])})")
            return names, True
        is_passage = kind == ".tsv" and self.required == "text" and 2 <= len(first) <= 3
        if is_passage and (len(first[1]) > 40 or len(first[1].split()) > 2):  # text, no name
            return list(PASSAGES[: len(first)]), False
        shown_names = ", ".join(name[:40] for name in names[:6])
        raise Unusable(f"no column {self.required!r} (it has {shown_names}); {TEXT_KEY}")

    def _parquet(self, path: Path) -> Iterator[Row | SetAside]:
        parquet, arrow = _import_parquet()
        number = 0
        try:
            with open_file(path) as opened, parquet.ParquetFile(opened) as file:
                names = file.schema_arrow.names
                if self.required and self.required not in names:
                    found = ", ".join(names[:6])
                    why = f"no column {self.required!r} (it has {found}); {TEXT_KEY}"
                    yield SetAside(shown(path), why)
                    return
                columns = [name for name in dict.fromkeys(self.columns) if name in names]
                for batch in file.iter_batches(PARQUET_ROWS, columns=columns):
                    values = {name: batch.column(batch.schema.names.index(name)) for name in columns}
                    for row in range(batch.num_rows):
                        number += 1
                        cells = lambda row=row, of=values: {name: self._cell(v, row) for name, v in of.items()}  # noqa: E731
                        yield _row(shown(path), number, cells)
        except MissingInputError as error:
            yield SetAside(shown(path), f"{error.what}: {error.why}", is_unread=is_unread(error))
        except (arrow.ArrowException, OSError) as error:
            reason = (str(error).strip().split("\n") or [""])[0]
            yield SetAside(f"{shown(path)}:{number + 1}", f"{BROKEN}: {reason}", is_unread=is_unread(error))

    def _cell(self, column: Any, row: int) -> Any:
        """A value; bytes, which Spark and others write for text, and strings that hold other bytes are decoded."""
        try:
            value = column[row].as_py()
        except UnicodeDecodeError:  # a string column may hold any bytes
            value = getattr(column[row], "value", column[row]).as_buffer().to_pybytes()
        return decode(value, self.errors) if isinstance(value, bytes) else value


class _LineFeeds(Joined):
    """The rest of a file with line feeds in place of carriage returns."""

    def _take(self, raw: bytes) -> bytes:
        return raw.replace(b"\r", b"\n")


def _with_line_feeds(file: Any) -> IO[bytes]:
    """The file; where its lines end with carriage returns alone, as those of old spreadsheets, with line feeds."""
    head: bytes = file.peek(HEAD)
    is_old = b"\r" in head[:-1] and b"\n" not in head
    return io.BufferedReader(_LineFeeds(file, b""), 1 << 20) if is_old else file


class _Text:
    """Lines of UTF-8 with a bound on their length, and where they stand."""

    def __init__(self, file: IO[bytes], encoding: str, errors: str, max_bytes: int):
        self.file, self.encoding, self.errors, self.max_bytes = file, encoding, errors, max_bytes
        self.number = 0
        self._put_back: deque[bytes] = deque()

    def __iter__(self) -> Iterator[bytes]:
        while line := self.next_line():
            yield line

    def next_line(self) -> bytes:
        """A line with its end, or of max_bytes + 1 bytes where it is longer; nothing at the end of the file."""
        line = self._put_back.popleft() if self._put_back else self._read_line()
        self.number += bool(line)
        return line

    def _read_line(self) -> bytes:
        line = self.file.readline(self.max_bytes + 1)
        rest = line
        while len(line) > self.max_bytes and rest and not rest.endswith(b"\n"):
            rest = self.file.readline(SKIP_STEP)
        return line

    def put_back(self, lines: Sequence[bytes]) -> None:
        self._put_back.extendleft(reversed(lines))
        self.number -= len(lines)

    def head(self) -> bytes:
        """The first bytes, at least up to the first line break where it is near; they are read again."""
        head = b""
        while len(head) <= self.max_bytes and (part := self.file.read(VALUE_STEP)):
            head += part
            if b"\n" in head.strip() or head.lstrip(b" \t\r\n\xef\xbb\xbf").startswith(b"["):
                break
        self.file = io.BufferedReader(Joined(self.file, head))
        return head

    def decoded(self, line: bytes) -> str:
        """Raises Unusable."""
        if len(line) > self.max_bytes:
            raise Unusable(f"line longer than {self.max_bytes:,} bytes")
        return decode(line, self.errors, self.encoding)

    def rest(self) -> str:
        """Raises Unusable for more than max_bytes."""
        parts, size = [], 0
        while part := self.file.read(VALUE_STEP):
            parts.append(part)
            size += len(part)
            if size > self.max_bytes:
                raise Unusable(f"larger than {self.max_bytes:,} bytes")
        return decode(b"".join(parts), self.errors, self.encoding)


def _parse(text: str) -> Any:
    """Raises Unusable."""
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise Unusable("JSON nested too deeply") from None
    except ValueError as error:
        raise Unusable(f"not JSON: {error}") from error


def _row(name: str, number: int, values: Callable[[], dict[str, Any]]) -> Row | SetAside:
    """Row `number` of a file, or why it is none: what `values` raises."""
    source = f"{name}:{number}"
    try:
        return Row(values(), source, number)
    except Unusable as error:
        return SetAside(source, str(error))


def _object(value: Any) -> dict[str, Any]:
    if isinstance(value, Unusable):
        raise value
    if not isinstance(value, dict):
        raise Unusable(f"not a JSON object but {type(value).__name__}")
    return value


def _is_whole(line: bytes) -> bool:
    """Is it one JSON value: does a file that begins with it hold a value a line?"""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


class _Refused(Exception):
    """A value that JSON's grammar allows and we do not."""


def _values(text: _Text) -> Iterator[Any]:
    """The values of a JSON array, one at a time; an Unusable for one that is none, and for what ends the array."""
    whole = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    lenient = json.JSONDecoder(parse_constant=str, parse_float=str, parse_int=str)
    window = _Window(text)
    before = "["
    try:
        while True:
            window.expect(before)
            before = ","
            if window.next_sign() == "]":
                break
            try:
                yield window.value(whole)
            except _Refused as error:
                window.value(lenient)
                yield Unusable(f"not JSON: {error}")
            if window.next_sign() == "]":
                break
        window.expect("]")
        if window.next_sign():
            raise Unusable("something follows the array")
    except Unusable as error:
        yield Unusable(f"{BROKEN}: {error}")


class _Window:
    """Decoded text of an array around the value that is read."""

    def __init__(self, text: _Text):
        self._text = text
        errors = "surrogateescape" if text.errors == "strict" else text.errors  # bad bytes are a row's, not the file's
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")(errors)
        self._ready, self._place, self._is_end = "", 0, False

    def _more(self, size: int) -> None:
        raw = self._text.file.read(size)
        self._is_end = not raw
        self._ready = self._ready[self._place :] + self._decoder.decode(raw, final=not raw)
        self._place = 0

    def next_sign(self) -> str:
        """The next character that is no white space; nothing at the end."""
        while True:
            while self._place < len(self._ready) and self._ready[self._place] in " \t\r\n":
                self._place += 1
            if self._place < len(self._ready) or self._is_end:
                return self._ready[self._place : self._place + 1]
            self._more(VALUE_STEP)

    def expect(self, sign: str) -> None:
        """Go past `sign` and white space. Raises Unusable where something else stands."""
        found = self.next_sign()
        if found != sign:
            raise Unusable(f"not JSON: expected {sign}" if found else "the array is cut short")
        self._place += 1
        self.next_sign()

    def value(self, decoder: json.JSONDecoder) -> Any:
        """Read as much as the value needs. Raises Unusable where it is not JSON or too long, _Refused (and stays)."""
        step = VALUE_STEP
        while True:
            try:
                value, end = decoder.raw_decode(self._ready, self._place)
                if end < len(self._ready) or self._is_end:  # a number may go on
                    self._place = end
                    return value
                wrong = "the array is cut short"
            except json.JSONDecodeError as error:
                is_cut = error.pos >= len(self._ready.rstrip()) or error.msg.startswith("Unterminated string")
                wrong = "the array is cut short" if is_cut else f"not JSON: {error.msg}"
            except RecursionError:
                raise Unusable("JSON nested too deeply") from None
            except ValueError as error:
                raise _Refused(str(error)) from error
            if self._is_end:
                raise Unusable(wrong)
            if len(self._ready) - self._place > self._text.max_bytes:
                raise Unusable(f"a row larger than {self._text.max_bytes:,} bytes, or {wrong}")
            self._more(step)
            step = min(2 * step, self._text.max_bytes)


def _tsv_records(text: _Text) -> Iterator[tuple[int, list[str] | Unusable]]:
    """A line a record, its number first. Cells in quotes are read as CSV's where all of the cell is in them; a quote that
    only opens a cell is a letter, unless the lines up to the one that closes it have no tab (a cell of several lines).
    """
    while line := text.next_line():
        number = text.number
        try:
            read = text.decoded(line)
            if read.strip():
                yield number, [_unquoted(cell) for cell in _joined_cells(read.rstrip("\r\n").split("\t"), text)]
        except Unusable as error:
            yield number, error


def _joined_cells(cells: list[str], text: _Text) -> list[str]:
    while _is_open(cells[-1]):
        taken: list[bytes] = []
        rest: list[str] = []
        cell, size = cells[-1], 0
        while _is_open(cell) and not rest and size <= text.max_bytes:
            line = text.next_line()
            if not line:
                break
            taken.append(line)
            size += len(line)
            more, *rest = text.decoded(line).rstrip("\r\n").split("\t")
            cell += "\n" + more
        if _is_open(cell) or not cell.endswith('"'):
            text.put_back(taken)
            break
        cells = [*cells[:-1], cell, *rest]
    return cells


def _is_open(cell: str) -> bool:
    return cell.startswith('"') and cell.count('"') % 2 == 1


def _unquoted(cell: str) -> str:
    inside = cell[1:-1]
    is_quoted = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inside.replace('""', "")
    return inside.replace('""', '"') if is_quoted else cell


def _csv_records(text: _Text, max_bytes: int) -> Iterator[tuple[int, list[str] | Unusable]]:
    """Records with the number of their first line."""
    csv.field_size_limit(min(max_bytes, (1 << 31) - 1))  # the module's own limit, 128 KiB, is too small for text
    separator = max(",;\t", key=text.head().strip().split(b"\n")[0].decode("utf-8", "replace").count)
    while True:
        reader = csv.reader(map(text.decoded, text), delimiter=separator, strict=True)
        start = text.number + 1
        try:
            for cells in reader:
                if cells:
                    yield start, cells
                start = text.number + 1
            return
        except csv.Error as error:
            yield start, Unusable(f"not CSV: {error}")
        except Unusable as error:
            yield text.number, error


def _import_parquet() -> tuple[Any, Any]:
    with extra("data", ".parquet files need pyarrow"):
        import pyarrow
        import pyarrow.parquet
    return pyarrow.parquet, pyarrow


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a key stands twice")
    return row
