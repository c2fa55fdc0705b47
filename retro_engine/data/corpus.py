"""Files to documents: .txt, .md, .jsonl (plain, .gz, .zst), .parquet, folders and standard input.

A document that cannot be used (bad UTF-8, no text, not an object, over the size limit ...) is set aside with
its file, line and reason; nothing of it reaches the store, and the other documents are not touched.
"""

import gzip
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from retro_engine.data.identity import ID_KEYS, own_id
from retro_engine.errors import MissingExtraError, MissingInputError, UsageError

SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
PARQUET_ROWS = 256  # read at once
MAX_DOCUMENT_BYTES = 64 << 20
ZSTD_STEP = 1 << 10  # compressed bytes decompressed at once


@dataclass(frozen=True)
class Document:
    id: str
    title: str
    text: str
    source: str = ""  # file:line, or the file


@dataclass(frozen=True)
class SetAside:
    """A row that is not used, and why."""

    source: str
    reason: str


class _Unusable(Exception):
    """The reason why one row is set aside."""


@dataclass(frozen=True)
class Reader:
    """How files are read. `errors`: strict sets rows with bad UTF-8 aside, replace repairs them."""

    text_key: str = "text"
    errors: str = "strict"
    max_document_bytes: int = MAX_DOCUMENT_BYTES

    def read(self, paths: Sequence[Path]) -> Iterator[Document | SetAside]:
        """Documents of `paths` in order; the files of a folder in the order of their names."""
        for path in paths:
            if path.name.endswith((".txt", ".md")):
                yield self._text_file(path)
            elif path.name.endswith(".parquet"):
                yield from self._parquet(path)
            else:
                yield from self._json_lines(path)

    def _text_file(self, path: Path) -> Document | SetAside:
        try:
            if path.stat().st_size > self.max_document_bytes:
                return SetAside(str(path), f"larger than {self.max_document_bytes:,} bytes")
            text = self._usable(self._decode(path.read_bytes()))
        except (_Unusable, OSError) as error:
            return SetAside(str(path), str(error))
        heading = text.lstrip().split("\n", 1)[0]
        is_heading = path.suffix == ".md" and heading.startswith("#")
        return Document(str(path), heading.lstrip("# ").strip() if is_heading else path.stem, text, str(path))

    def _json_lines(self, path: Path) -> Iterator[Document | SetAside]:
        number = 0
        try:
            with _open(path) as file:
                while line := file.readline(self.max_document_bytes + 1):
                    number += 1
                    source = f"{path}:{number}"
                    if len(line) > self.max_document_bytes:
                        while line and not line.endswith(b"\n"):
                            line = file.readline(1 << 20)
                        yield SetAside(source, f"line longer than {self.max_document_bytes:,} bytes")
                    elif line.strip():
                        try:
                            yield self._json_document(line, source)
                        except _Unusable as error:
                            yield SetAside(source, str(error))
        except _stream_errors() as error:  # a truncated or damaged stream
            yield SetAside(f"{path}:{number + 1}", f"the file cannot be read further: {error}")

    def _parquet(self, path: Path) -> Iterator[Document | SetAside]:
        """Rows of a Parquet file: the columns text_key and, where they are there, id (or _id) and title."""
        parquet, arrow = _import_parquet()
        number = 0
        try:
            with parquet.ParquetFile(path) as file:
                names = file.schema_arrow.names
                if self.text_key not in names:
                    shown = ", ".join(names[:6])
                    yield SetAside(str(path), f"no column {self.text_key!r} (it has {shown}); --text-key names another")
                    return
                columns = [name for name in (self.text_key, *ID_KEYS, "title") if name in names]
                for batch in file.iter_batches(PARQUET_ROWS, columns=columns):
                    values = {name: batch.column(batch.schema.names.index(name)) for name in columns}
                    for row in range(batch.num_rows):
                        number += 1
                        try:
                            yield self._row({n: v[row].as_py() for n, v in values.items()}, f"{path}:{number}")
                        except UnicodeDecodeError:  # a string column may hold any bytes
                            yield SetAside(f"{path}:{number}", "not UTF-8")
                        except _Unusable as error:
                            yield SetAside(f"{path}:{number}", str(error))
        except (arrow.ArrowException, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            yield SetAside(f"{path}:{number + 1}", f"the file cannot be read further: {reason}")

    def _json_document(self, line: bytes, source: str) -> Document:
        text = self._decode(line)
        try:
            row = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
        except RecursionError:
            raise _Unusable("JSON nested too deeply") from None
        except ValueError as error:
            raise _Unusable(f"not JSON: {error}") from error
        if not isinstance(row, dict):
            raise _Unusable(f"not a JSON object but {type(row).__name__}")
        if self.text_key not in row:
            keys = ", ".join(list(row)[:6])
            raise _Unusable(f"no key {self.text_key!r} (it has {keys}); --text-key names another")
        return self._row(row, source)

    def _row(self, row: dict[str, Any], source: str) -> Document:
        """The document of a row that has the text key."""
        value = row[self.text_key]
        if not isinstance(value, str):
            raise _Unusable(f"{self.text_key!r} is {type(value).__name__}, not text")
        if len(value) > self.max_document_bytes:
            raise _Unusable(f"larger than {self.max_document_bytes:,} bytes")
        title = row.get("title")
        try:
            name = own_id(row)
        except ValueError as error:
            raise _Unusable(str(error)) from error
        return Document(
            self._label(source if name is None else name),
            self._label(title) if isinstance(title, str) else "",
            self._usable(value),
            source,
        )

    def _label(self, value: str) -> str:
        return value.encode("utf-8", "replace").decode()

    def _decode(self, raw: bytes) -> str:
        raw = raw.removeprefix(b"\xef\xbb\xbf")
        try:
            return raw.decode("utf-8", self.errors)
        except UnicodeDecodeError as error:
            raise _Unusable(f"not UTF-8 at byte {error.start} (--errors replace repairs it)") from error

    def _usable(self, text: str) -> str:
        if self.errors == "replace":
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise _Unusable("holds half of a surrogate pair (--errors replace repairs it)") from error
        if "\0" in text:
            raise _Unusable("binary: it holds a NUL byte")
        if not text.strip():
            raise _Unusable("empty")
        return text


def find_files(inputs: Sequence[str | Path]) -> tuple[list[Path], list[Path]]:
    """The files that `inputs` name, folders walked in order of name, and those in folders that are passed over.

    Raises MissingInputError for a path that does not exist or cannot be read, UsageError for an unknown kind.
    """
    files: list[Path] = []
    passed_over: list[Path] = []
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            for folder, folders, names in os.walk(path):
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                for name in sorted(names):
                    found = Path(folder) / name
                    if not name.startswith("."):
                        (files if name.endswith(SUFFIXES) and found.is_file() else passed_over).append(found)
        elif not path.exists():
            raise MissingInputError(f"{path} does not exist", "", "name a file or a folder that does")
        elif not path.name.endswith(SUFFIXES):
            raise UsageError(f"{path} is of an unknown kind", f"known: {', '.join(SUFFIXES)}", "rename or convert it")
        else:
            files.append(path)
    for path in files:
        if not os.access(path, os.R_OK):
            raise MissingInputError(f"{path} cannot be read", "permission denied", f"chmod +r {path}")
    return files, passed_over


def spool_standard_input(folder: Path) -> Path:
    """Copy standard input to a file in `folder`, so that it can be read twice; .jsonl when it starts with {."""
    first = sys.stdin.buffer.read(1 << 16)
    path = folder / f".stdin{'.jsonl' if first.lstrip()[:1] == b'{' else '.txt'}"
    with open(path, "wb") as file:
        while first:
            file.write(first)
            first = sys.stdin.buffer.read(1 << 20)
    return path


def spool_json_lines(path: Path, file: IO[bytes]) -> None:
    """Write a file of JSON lines, unpacked, to `file`, and go back to its start.

    Raises MissingInputError where it is not there, of another kind, or cut short.
    """
    if not path.is_file() or not path.name.endswith(SUFFIXES[2:5]):
        raise MissingInputError(f"{path} is not a file of JSON lines", "", f"known: {', '.join(SUFFIXES[2:5])}")
    try:
        with _open(path) as source:
            shutil.copyfileobj(source, file, 1 << 20)
    except _stream_errors() as error:
        raise MissingInputError(f"{path} cannot be read to its end", str(error), "make or copy it again") from error
    file.seek(0)


def _open(path: Path) -> IO[bytes]:
    if path.name.endswith(".gz"):
        return io.BufferedReader(gzip.open(path, "rb"))  # type: ignore[arg-type,return-value]
    if path.name.endswith(".zst"):
        return io.BufferedReader(_ZstdStream(path), 1 << 20)
    return open(path, "rb")


class _ZstdStream(io.RawIOBase):
    """Decompressed frames of a .zst file; EOFError where the last one is cut short."""

    def __init__(self, path: Path):
        import zstandard

        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame = self._new_frame()
        self._file = open(path, "rb")  # noqa: SIM115 (closed by close)
        self._input = b""
        self._ready = memoryview(b"")
        self._has_begun = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if self._frame.eof:
                self._input = self._frame.unused_data + self._input
                self._frame, self._has_begun = self._new_frame(), False
            self._input = self._input or self._file.read(1 << 17)
            if not self._input:
                if self._has_begun:
                    raise EOFError("the compressed data is cut short")
                return 0
            self._has_begun = True
            # a little at a time: a few bytes can stand for very many
            self._ready = memoryview(self._frame.decompress(self._input[:ZSTD_STEP]))
            self._input = self._input[ZSTD_STEP:]
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _stream_errors() -> tuple[type[Exception], ...]:
    """What a damaged or truncated file raises while it is read."""
    import zlib

    import zstandard

    return (EOFError, OSError, zlib.error, zstandard.ZstdError)


def _import_parquet() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError(
            ".parquet files need pyarrow", "it is not installed", "pip install 'retro-engine[data]'"
        ) from error
    return pyarrow.parquet, pyarrow


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a key stands twice")
    return row
