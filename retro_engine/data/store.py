"""The chunk store: documents cut into rows of m tokens, each document starting on a row of its own.

A chunk id is a row number; the continuation of row c is row c + 1 when it is of the same document. Every row's
count of valid tokens is stored, so that padding is never read as text. Reads and writes STORE/manifest.json,
tokenizer.json and, for each shard, tokens-, lengths-, rows-, documents-, names- and contents-NNNNN.bin
(docs/formats.md); a store of minor version 0 has no contents: they are computed from its tokens when they are asked for.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retro_engine.data import array_file, files
from retro_engine.data.array_file import ArrayFile
from retro_engine.data.coding import Coding
from retro_engine.data.contents import content_mark
from retro_engine.data.corpus import Document
from retro_engine.data.inputs import SetAside
from retro_engine.data.tokenizer import FILE as TOKENIZER_FILE
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import StoreError, UsageError

SHARD_ROWS = 1 << 18  # a shard closes at the first document end past this many rows
DOCUMENT_COLUMNS = ("first_row", "num_tokens", "num_bytes", "name_end")  # of documents-NNNNN.bin, shard-relative
MINOR_VERSION = 1  # 1: with the contents of the documents; a reader of 0 passes over them
PARTS = ("tokens", "lengths", "rows", "documents", "names", "contents")
ARRAY_DTYPES = {
    "lengths": "<u2",
    "rows": "<u4",
    "documents": "<i8",
    "names": "u1",
    "contents": "<i8",
}  # tokens: the manifest's
SET_ASIDE_FILE = "set_aside.jsonl"


_as_json = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps makes an encoder at every call


class StoreWriter:
    """Writes a store shard by shard: memory does not grow with the corpus. `close` publishes it.

    With `inputs`, the fingerprint of what the documents come from, every shard gets a marker, and shards that an
    interrupted writer of the same inputs finished stay: the caller leaves out the first `counts["documents"]`.
    """

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, chunk_size: int, shard_rows: int = SHARD_ROWS, inputs: str = ""
    ):
        if not 1 <= chunk_size < 1 << 16:
            raise UsageError(f"chunk_size={chunk_size} cannot be used", "a chunk has 1 to 65,535 tokens")
        refuse_published(folder)
        files.make_folder(folder)
        self.folder, self.tokenizer, self.chunk_size, self.shard_rows = folder, tokenizer, chunk_size, shard_rows
        self._mark = files.fingerprint([inputs, tokenizer.fingerprint, chunk_size, shard_rows]) if inputs else ""
        self.counts = {"documents": 0, "rows": 0, "tokens": 0, "bytes": 0, "set_aside": 0}
        self._files: dict[str, str] = {}
        self._set_aside: list[str] = []
        self._shards: list[dict[str, int]] = []
        self._resume()
        _remove_unpublished(folder, len(self._shards))
        self._clear()

    def add(self, document: Document, ids: Sequence[int] | np.ndarray) -> None:
        """Append a document of token ids; the end-of-document token is added here."""
        tokens = np.empty(len(ids) + 1, np.int64)
        tokens[:-1] = ids
        tokens[-1] = self.tokenizer.eod_id
        names, num_bytes = (document.id, document.title), len(document.text.encode())
        self.add_tokens(names, tokens, num_bytes, content_mark(document.text), document.source)

    def add_tokens(
        self, names: tuple[str, str], tokens: np.ndarray, num_bytes: int, contents: int, source: str = ""
    ) -> None:
        """Append a document by its id and title, its tokens with the end, bytes of text, and mark of what it says."""
        if tokens.max() >= self.tokenizer.vocab_size or tokens.min() < 0:
            raise StoreError(
                f"{source or names[0]}: token id {tokens.max()} is outside the vocabulary",
                f"it has {self.tokenizer.vocab_size} entries",
            )
        m = self.chunk_size
        num_rows = -(-len(tokens) // m)
        rows = np.full((num_rows, m), self.tokenizer.pad_id, self.tokenizer.dtype)
        rows.reshape(-1)[: len(tokens)] = tokens
        lengths = np.full(num_rows, m, np.uint16)
        lengths[-1] = len(tokens) - m * (num_rows - 1)
        self._names += _as_json(list(names)).encode()
        self._contents.append(contents)
        self._documents.append((self._num_rows, len(tokens), num_bytes, len(self._names)))
        self._tokens.append(rows)
        self._lengths.append(lengths)
        self._num_rows += num_rows
        for key, value in (("documents", 1), ("rows", num_rows), ("tokens", len(tokens)), ("bytes", num_bytes)):
            self.counts[key] += value
        if self._num_rows >= self.shard_rows:
            self._flush()

    def set_aside(self, row: SetAside) -> None:
        """Note a row that is not used."""
        self.counts["set_aside"] += 1
        self.pass_over(row)

    def pass_over(self, row: SetAside) -> None:
        """Note a file that is not read; it is listed, but no row that is counted."""
        self._set_aside.append(json.dumps({"source": row.source, "reason": row.reason}) + "\n")

    def close(self, losses: Sequence[dict[str, Any]] = ()) -> "Store":
        """Publish the store. `losses`: what its tokenizer loses (lossiness.as_json).

        Raises StoreError when it holds no document.
        """
        if self.counts["documents"] == 0:
            first = self._set_aside[0].strip() if self._set_aside else "the input is empty"
            raise StoreError("there is no document", first, "name other files")
        self._flush()
        files.publish(self.folder / TOKENIZER_FILE, [self.tokenizer.json.encode()])
        if self._set_aside:
            files.publish(self.folder / SET_ASIDE_FILE, ["".join(self._set_aside).encode()])
        files.write_manifest(
            self.folder,
            "store",
            {
                "minor": MINOR_VERSION,
                "chunk_size": self.chunk_size,
                "dtype": np.dtype(self.tokenizer.dtype).name,
                "vocab_size": self.tokenizer.vocab_size,
                "eod_id": self.tokenizer.eod_id,
                "pad_id": self.tokenizer.pad_id,
                "tokenizer": self.tokenizer.fingerprint,
                "counts": self.counts,
                "losses": list(losses),
                "shards": self._shards,
                "files": self._files,
            },
        )
        return Store(self.folder)

    def _flush(self) -> None:
        if not self._num_rows:
            return
        number = len(self._shards)
        documents = np.array(self._documents, np.int64).reshape(-1, len(DOCUMENT_COLUMNS))
        rows_of = np.diff(documents[:, 0], append=self._num_rows)
        arrays = {
            "tokens": np.concatenate(self._tokens),
            "lengths": np.concatenate(self._lengths)[:, None],
            "rows": np.repeat(np.arange(len(documents), dtype=np.uint32), rows_of)[:, None],
            "documents": documents,
            "names": np.frombuffer(bytes(self._names), np.uint8)[:, None],
            "contents": np.array(self._contents, np.int64)[:, None],
        }
        for part, values in arrays.items():
            name = f"{part}-{number:05d}.bin"
            self._files[name] = array_file.write_array(self.folder / name, part, values, self.tokenizer.fingerprint)
        self._shards.append({"documents": len(documents), "rows": self._num_rows})
        if self._mark:
            written = {name: self._files[name] for name in shard_files(number)}
            counts = {key: count for key, count in self.counts.items() if key != "set_aside"}
            marker = {"inputs": self._mark, "files": written, "shard": self._shards[-1], "counts": counts}
            files.publish(self.folder / marker_name(number), [json.dumps(marker, sort_keys=True).encode() + b"\n"])
        self._clear()

    def _resume(self) -> None:
        """Take over the shards that are finished and whole."""
        while self._mark:
            number = len(self._shards)
            try:
                marker = files.read_json(self.folder / marker_name(number))
                if marker["inputs"] != self._mark or set(marker["files"]) != set(shard_files(number)):
                    return
                files.verify_files(self.folder, marker["files"])
                self._files |= marker["files"]
                self.counts |= {key: int(marker["counts"][key]) for key in ("documents", "rows", "tokens", "bytes")}
                self._shards.append({key: int(marker["shard"][key]) for key in ("documents", "rows")})
            except (OSError, ValueError, KeyError, TypeError):  # StoreError is a ValueError
                return

    def _clear(self) -> None:
        self._tokens: list[np.ndarray] = []
        self._lengths: list[np.ndarray] = []
        self._documents: list[tuple[int, int, int, int]] = []
        self._contents: list[int] = []
        self._names = bytearray()
        self._num_rows = 0


def refuse_published(folder: Path) -> None:
    """Raise UsageError when `folder` holds a published store."""
    if (folder / files.MANIFEST).exists():
        raise UsageError(
            f"{folder} holds a store", "a published store never changes", f"choose another --out, or rm -r {folder}"
        )


def shard_files(number: int) -> list[str]:
    return [f"{part}-{number:05d}.bin" for part in PARTS]


def marker_name(number: int) -> str:
    return f"shard-{number:05d}.ok"


def _remove_unpublished(folder: Path, finished: int) -> None:
    """Remove what a run that was killed before its manifest left behind past `finished` shards, and nothing else."""
    name = rf"({'|'.join(PARTS)})-\d{{5}}\.bin|shard-\d{{5}}\.ok"
    kept = {file for number in range(finished) for file in (*shard_files(number), marker_name(number))}
    for path in folder.iterdir():
        if path.name in kept:
            continue
        if re.fullmatch(r"shard-\d{5}\.ok", path.name):
            path.unlink()
            continue
        is_shard = re.fullmatch(name, path.name) is not None and _first_bytes(path) == array_file.MAGIC
        if is_shard or re.fullmatch(
            rf"\.({name}|{TOKENIZER_FILE}|{SET_ASIDE_FILE}|{files.MANIFEST})\.\d+\.tmp", path.name
        ):
            path.unlink()
    (folder / SET_ASIDE_FILE).unlink(missing_ok=True)


def _first_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(len(array_file.MAGIC))


@dataclass
class Shard:
    """One shard's arrays and the number of its first row and first document."""

    arrays: dict[str, ArrayFile]
    first_row: int
    first_document: int
    documents: np.ndarray | None = None  # once its table was checked


class Store:
    """A published store, opened for reading; nothing is loaded until it is touched."""

    def __init__(self, folder: str | Path):
        """Raises MissingInputError or StoreError: not there, never finished, damaged, foreign, newer."""
        self.folder = Path(folder)
        self.manifest = files.read_manifest(self.folder, "store")
        m = self.manifest
        self.fingerprint: str = m["fingerprint"]
        self.chunk_size: int = m["chunk_size"]
        self.counts: dict[str, int] = m["counts"]
        self.num_rows: int = self.counts["rows"]
        self.num_documents: int = self.counts["documents"]
        self.vocab_size: int = m["vocab_size"]
        self.eod_id: int = m["eod_id"]
        self.pad_id: int = m["pad_id"]
        self.shards: list[Shard] = []
        first_row = first_document = 0
        widths = {"tokens": self.chunk_size, "documents": len(DOCUMENT_COLUMNS)}
        self.has_contents: bool = m.get("minor", 0) >= 1
        parts = PARTS if self.has_contents else PARTS[:-1]
        for number, shard in enumerate(m["shards"]):
            arrays = {part: ArrayFile(self.folder / f"{part}-{number:05d}.bin", part, m["tokenizer"]) for part in parts}
            of_documents = dict.fromkeys(("documents", "contents"), shard["documents"])
            for part, array in arrays.items():
                rows = {"names": array.values.shape[0], **of_documents}.get(part, shard["rows"])
                expected = (rows, widths.get(part, 1))
                dtype = np.dtype(ARRAY_DTYPES.get(part, m["dtype"]))
                if array.values.shape != expected or array.values.dtype != dtype:
                    raise StoreError(
                        f"{array.path} has shape {array.values.shape} of {array.values.dtype}",
                        f"the manifest says {expected} of {dtype}",
                    )
            self.shards.append(Shard(arrays, first_row, first_document))
            first_row += shard["rows"]
            first_document += shard["documents"]
        are_ids = max(self.eod_id, self.pad_id) < self.vocab_size
        if (first_row, first_document) != (self.num_rows, self.num_documents) or not self.num_documents or not are_ids:
            raise StoreError(
                f"{self.folder} contradicts itself", "its shards do not add up to its counts", "retro prepare again"
            )
        self._tokenizer: Tokenizer | None = None
        self._documents: np.ndarray | None = None
        self._contents: np.ndarray | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            path = self.folder / TOKENIZER_FILE
            with contextlib.suppress(FileNotFoundError):  # the tokenizer says what is missing
                files.open_file(path).close()  # it would wait for a pipe
            found = Tokenizer.load(path)
            if found.fingerprint != self.manifest["tokenizer"]:
                raise StoreError(
                    f"{path} is {found.fingerprint[:12]}",
                    f"the store was made with {self.manifest['tokenizer'][:12]}",
                    "retro prepare again",
                )
            if (found.vocab_size, found.eod_id, found.pad_id) != (self.vocab_size, self.eod_id, self.pad_id):
                raise StoreError(
                    f"{path} has {found.vocab_size} entries, end {found.eod_id}, padding {found.pad_id}",
                    f"the manifest says {self.vocab_size}, {self.eod_id}, {self.pad_id}",
                    "retro prepare again",
                )
            self._tokenizer = found
        return self._tokenizer

    @property
    def coding(self) -> Coding:
        """What a reader of its ids must have too."""
        return Coding(str(self.folder), self.manifest["tokenizer"], self.chunk_size)

    def check_mark(self, mark: str, what: str, do: str) -> None:
        """Raise StoreError unless `mark` is the fingerprint of the store that `what` is of."""
        if mark != self.fingerprint:
            raise StoreError(f"{what} {mark[:12]}", f"{self.folder} is {self.fingerprint[:12]}", do)

    @property
    def documents(self) -> np.ndarray:
        """[documents, 3] i64: first row, tokens, bytes."""
        if self._documents is None:
            parts = []
            for shard in self.shards:
                table = self._checked_documents(shard)[:, :3].astype(np.int64)
                table[:, 0] += shard.first_row
                parts.append(table)
            self._documents = np.concatenate(parts)
        return self._documents

    @property
    def contents(self) -> np.ndarray:
        """[documents] i64: the mark of what each document says (`contents.content_mark`).

        A store without them has those of the text that its tokens decode to: the same, where its tokenizer loses nothing.
        """
        if self._contents is None:
            if self.has_contents:
                parts = [shard.arrays["contents"].checked()[:, 0].astype(np.int64) for shard in self.shards]
                self._contents = np.concatenate(parts)
            else:
                self._contents = np.fromiter(self._computed_contents(), np.int64, self.num_documents)
        return self._contents

    def contents_of(self, rows: np.ndarray) -> np.ndarray:
        """The mark of what the document of each row says."""
        return self.contents[np.searchsorted(self.documents[:, 0], rows, "right") - 1]

    def _computed_contents(self, batch: int = 8192) -> Iterator[int]:
        starts = np.append(self.documents[:, 0], self.num_rows)
        first = 0
        while first < self.num_documents:
            last = max(first + 1, int(np.searchsorted(starts, starts[first] + batch, "right")) - 1)
            tokens, lengths = self.rows(int(starts[first]), int(starts[last]))
            flat = tokens[np.arange(self.chunk_size) < lengths[:, None]]
            ends = np.cumsum(self.documents[first:last, 1])
            texts = self.tokenizer.decode_batch([part[:-1].tolist() for part in np.split(flat, ends[:-1])])
            yield from map(content_mark, texts)
            first = last

    def _checked_documents(self, shard: Shard) -> np.ndarray:
        """The table of a shard's documents, which says where everything of theirs lies."""
        if shard.documents is not None:
            return shard.documents
        table, rows = shard.arrays["documents"].checked(), shard.arrays["rows"].values.shape[0]
        first_row, num_tokens, _, name_end = table.T
        row_counts = np.diff(first_row, append=rows)
        holds = (
            first_row[0] == 0
            and (row_counts > 0).all()
            and bool((row_counts == (num_tokens - 1) // self.chunk_size + 1).all())
            and (np.diff(name_end, prepend=0) >= 0).all()
            and name_end[-1] == shard.arrays["names"].values.shape[0]
        )
        if not holds:
            raise StoreError(f"{shard.arrays['documents'].path} contradicts itself", "", "retro prepare again")
        shard.documents = table
        return table

    def row_documents(self) -> np.ndarray:
        """[rows] the document of every row."""
        parts = []
        for shard in self.shards:
            found, starts = shard.arrays["rows"].checked()[:, 0], self._checked_documents(shard)[:, 0]
            expected = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(found)))
            if not np.array_equal(found, expected):
                raise StoreError(f"{shard.arrays['rows'].path} contradicts itself", "", "retro prepare again")
            parts.append(expected + shard.first_document)
        return np.concatenate(parts)

    def document_rows(self, document: int) -> tuple[int, int]:
        """First row of a document, and one past its last."""
        first = int(self.documents[document, 0])
        end = int(self.documents[document + 1, 0]) if document + 1 < self.num_documents else self.num_rows
        return first, end

    def document_of(self, row: int) -> int:
        return int(np.searchsorted(self.documents[:, 0], row, "right")) - 1

    def name(self, document: int) -> tuple[str, str]:
        """Id and title of a document."""
        shard = max((s for s in self.shards if s.first_document <= document), key=lambda s: s.first_document)
        number = document - shard.first_document
        ends = self._checked_documents(shard)[:, 3]
        start = int(ends[number - 1]) if number else 0
        names = shard.arrays["names"]
        raw = names.checked()[start : int(ends[number]), 0].tobytes()
        try:
            identifier, title = json.loads(raw)
            if isinstance(identifier, str) and isinstance(title, str):
                return identifier, title
        except (ValueError, TypeError, RecursionError):
            pass
        raise StoreError(f"{names.path} has no name of document {document}", f"{raw[:60]!r}", "retro prepare again")

    def rows(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [rows, m] and lengths [rows] of rows first ... last - 1."""
        tokens: list[np.ndarray] = []
        lengths: list[np.ndarray] = []
        for shard in self.shards:
            begin = max(first - shard.first_row, 0)
            end = min(last - shard.first_row, shard.arrays["tokens"].values.shape[0])
            if begin < end:
                for part, out in (("tokens", tokens), ("lengths", lengths)):
                    shard.arrays[part].check_range(begin, end)
                    out.append(shard.arrays[part].values[begin:end])
        if not tokens:
            return np.empty((0, self.chunk_size), np.uint16), np.empty(0, np.uint16)
        found, valid = np.concatenate(tokens), np.concatenate(lengths)[:, 0]
        if (
            found.max(initial=0) >= self.vocab_size
            or valid.min(initial=1) < 1
            or valid.max(initial=1) > self.chunk_size
        ):
            raise StoreError(
                f"{self.folder} has a token or a length that cannot be in rows {first} ... {last - 1}",
                f"the vocabulary has {self.vocab_size} entries, a row {self.chunk_size} tokens",
                "retro prepare again",
            )
        return found, valid

    def texts(self, first: int = 0, last: int | None = None, batch: int = 8192) -> Iterator[list[str]]:
        """The text of every chunk, in order, in lists of at most `batch`."""
        last = self.num_rows if last is None else last
        for start in range(first, last, batch):
            tokens, lengths = self.rows(start, min(start + batch, last))
            rows = [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist())]
            yield self.tokenizer.decode_batch(rows)

    def text(self, row: int) -> str:
        return next(self.texts(row, row + 1))[0]

    def continuation(self, row: int) -> str:
        """The text of the chunk that follows in the same document, or nothing."""
        last = self.document_rows(self.document_of(row))[1]
        return self.text(row + 1) if row + 1 < last else ""

    def verify(self) -> None:
        """Compare every file with the manifest. Raises StoreError for the first that differs."""
        files.verify_files(self.folder, self.manifest["files"])
        if self.tokenizer.vocab_size != self.vocab_size:
            raise StoreError(
                f"{self.folder}: the tokenizer has {self.tokenizer.vocab_size} entries",
                f"the manifest says {self.vocab_size}",
            )

    def summary(self) -> dict[str, Any]:
        return {
            "kind": "store",
            "chunk_size": self.chunk_size,
            "vocab_size": self.vocab_size,
            **self.counts,
            "fingerprint": self.fingerprint,
            "tokenizer": self.manifest["tokenizer"],
            **({"tokenizer_loses": self.manifest["losses"]} if self.manifest.get("losses") else {}),
        }
