"""An n-gram memory of a store: every suffix of a context is looked up in all of its text, however long it is (infini-gram,
arXiv 2401.17377).

Owns STORE/memory/ngram/ (docs/formats.md): for each part of up to PART_TOKENS tokens `tokens-NNNNN.bin`, u2 or u4 [n, 1], the
end-of-document token and then the documents, each with its own end; `order-NNNNN.bin`, u4 [n, 1], the places in the order of
what stands before them (suffix_order.py); `starts-NNNNN.bin`, i8 [V + 1, 1], where each token begins there;
`documents-NNNNN.bin`, i8 [documents, 2], where each document ends and the mark of what it says; `manifest.json`. The files are
mapped: what is not looked up need not be in memory. Letters: n tokens of a part, T tokens of a text, L tokens of the longest
suffix, V vocabulary.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retro_engine.data import array_file, files
from retro_engine.data.array_file import ArrayFile
from retro_engine.data.store import Store
from retro_engine.errors import StoreError
from retro_engine.memory.mixture import Guesses, collect
from retro_engine.memory.suffix_order import LONGEST, count_suffixes, order_of, starts_of

FORMAT = 1
PART_TOKENS = 1 << 26  # sorted at once: some 27 bytes each then, more of a vocabulary above 65,536
READ_ROWS = 1 << 15
AGAIN = "retro memory ngram STORE makes it"
NAMES = ("tokens", "order", "starts", "documents")


@dataclass(frozen=True)
class Part:
    """A stretch of documents with its order."""

    tokens: np.ndarray
    order: np.ndarray
    starts: np.ndarray
    ends: np.ndarray  # of the documents
    contents: np.ndarray

    @classmethod
    def of(cls, tokens: np.ndarray, ends: np.ndarray, contents: np.ndarray, vocab_size: int) -> "Part":
        made = tokens, order_of(tokens), starts_of(tokens, vocab_size)
        for array in made:
            array.setflags(write=False)  # as mapped ones are: compiled once
        return cls(*made, ends, contents)

    def documents(self, chosen: np.ndarray) -> list[np.ndarray]:
        """The tokens of these documents."""
        begins = np.concatenate(([1], self.ends))[chosen]
        return [self.tokens[begin:end] for begin, end in zip(begins.tolist(), self.ends[chosen].tolist())]


def ngram_folder(store: Store) -> Path:
    """Where the memory of a store lies unless it is told otherwise."""
    return store.folder / "memory" / "ngram"


def build_ngram_memory(store: Store, folder: Path, part_tokens: int = PART_TOKENS) -> "NgramMemory":
    """Publish the memory of a store at `folder`. Raises UsageError where there is something."""
    files.check_unused(folder)
    mark = _mark(store.manifest["tokenizer"], store.fingerprint)
    with files.publish_folder(folder) as aside:
        hashes, parts = {}, []
        for number, (tokens, ends, contents) in enumerate(_parts(store, part_tokens)):
            part = Part.of(tokens, ends, contents, store.vocab_size)
            arrays = {
                "tokens": part.tokens[:, None],
                "order": part.order[:, None],
                "starts": part.starts[:, None],
                "documents": np.column_stack((part.ends, part.contents)),
            }
            for name in NAMES:
                file = f"{name}-{number:05d}.bin"
                hashes[file] = array_file.write_array(aside / file, f"ng-{name}", arrays[name], mark)
            parts.append({"documents": len(ends), "tokens": len(tokens)})
        content = {
            "format": FORMAT,
            "tokenizer": store.manifest["tokenizer"],
            "store": store.fingerprint,
            "vocab_size": store.vocab_size,
            "eod_id": store.eod_id,
            "parts": parts,
            "files": hashes,
        }
        files.write_manifest(aside, "ngram", content)
    return NgramMemory(folder)


def _mark(tokenizer: str, store: str) -> str:
    return files.fingerprint({"tokenizer": tokenizer, "store": store, "format": FORMAT})


def document_tokens(store: Store, first: int, last: int) -> Iterator[np.ndarray]:
    """The tokens of documents first ... last - 1, with their ends."""
    starts = np.append(store.documents[:, 0], store.num_rows)
    while first < last:
        until = max(first + 1, int(np.searchsorted(starts, starts[first] + READ_ROWS, "right")) - 1)
        until = min(until, last)
        rows, lengths = store.rows(int(starts[first]), int(starts[until]))
        flat = rows[np.arange(store.chunk_size) < lengths[:, None]]
        yield from np.split(flat, np.cumsum(store.documents[first:until, 1])[:-1])
        first = until


def _parts(store: Store, part_tokens: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Tokens, ends and contents of as many documents as go into one part each."""
    ends = np.cumsum(store.documents[:, 1])
    first = 0
    while first < store.num_documents:
        begin = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, begin + part_tokens, "right")))
        head = np.array([store.eod_id], store.tokenizer.dtype)
        tokens = np.concatenate([head, *document_tokens(store, first, last)]).astype(store.tokenizer.dtype)
        yield tokens, ends[first:last] - begin + 1, store.contents[first:last]
        first = last


class NgramMemory:
    """The memory of one folder; any thread may look things up."""

    kind = "ngram"

    def __init__(self, folder: Path):
        """Raises MissingInputError, or StoreError for what is truncated, damaged, newer or contradicts itself."""
        self.folder = Path(folder)
        self.manifest = files.read_manifest(self.folder, "ngram")
        m = self.manifest
        if m["format"] != FORMAT:
            raise StoreError(f"{folder} has format {m['format']}", f"this program reads {FORMAT}", AGAIN)
        self.vocab_size, self.eod_id = m["vocab_size"], m["eod_id"]
        self.num_tokens = sum(part["tokens"] for part in m["parts"])
        self.left_out: Part | None = None
        try:
            self.parts = [self._open(number, about) for number, about in enumerate(m["parts"])]
        except StoreError as error:
            raise StoreError(error.what, error.why, AGAIN) from error

    def _open(self, number: int, about: dict[str, int]) -> Part:
        """A part, every value of it checked: compiled code checks no bounds."""
        mark = _mark(self.manifest["tokenizer"], self.manifest["store"])
        found = {
            name: ArrayFile(self.folder / f"{name}-{number:05d}.bin", f"ng-{name}", mark).checked() for name in NAMES
        }
        n, d = about["tokens"], about["documents"]
        shapes = {"tokens": (n, 1), "order": (n, 1), "starts": (self.vocab_size + 1, 1), "documents": (d, 2)}
        kinds = {"tokens": "u", "order": "u", "starts": "i", "documents": "i"}
        holds = n > 0 and d > 0 and self.eod_id < self.vocab_size
        for name, values in found.items():
            holds = holds and values.shape == shapes[name] and values.dtype.kind == kinds[name]
        if holds:
            starts, ends = found["starts"][:, 0], found["documents"][:, 0]
            holds = (
                int(found["tokens"].max()) < self.vocab_size
                and int(found["order"].max()) < n
                and (int(starts[0]), int(starts[-1]), int(ends[-1])) == (0, n, n)
                and bool((np.diff(starts) >= 0).all())
                and int(ends[0]) > 1
                and bool((np.diff(ends) > 0).all())
            )
        if not holds:
            raise StoreError(f"{self.folder} contradicts itself", f"part {number} is not as its manifest says")
        tokens, order, starts, ends = (found[name][:, 0] for name in NAMES)
        return Part(tokens, order, starts, ends, found["documents"][:, 1])

    def check(self, tokenizer: str, owner: str) -> None:
        """Raises StoreError unless `owner`'s tokenizer, by its fingerprint, is the one that made these ids."""
        if tokenizer != self.manifest["tokenizer"]:
            raise StoreError(
                f"{self.folder} has tokenizer {self.manifest['tokenizer'][:12]}",
                f"{owner} has {tokenizer[:12]}",
                "retro prepare --tokenizer MODEL its files, and retro memory ngram that store",
            )

    def without(self, contents: np.ndarray) -> tuple["NgramMemory", np.ndarray]:
        """The memory without the documents that say what these marks are of, and the marks that it held.

        What is left out is counted apart and taken off. Raises StoreError where nothing is left.
        """
        chosen = [np.flatnonzero(np.isin(part.contents, contents)) for part in self.parts]
        if not sum(map(len, chosen)):
            return self, np.empty(0, np.int64)
        if sum(map(len, chosen)) == sum(len(part.ends) for part in self.parts):
            raise StoreError(
                f"{self.folder} holds nothing but documents that are held out",
                "what is predicted from itself says nothing",
                "evaluate other documents, or build a memory of another store",
            )
        pieces = [piece for part, which in zip(self.parts, chosen) for piece in part.documents(which)]
        head = np.array([self.eod_id], self.parts[0].tokens.dtype)
        tokens = np.concatenate([head, *pieces])
        marks = np.concatenate([part.contents[which] for part, which in zip(self.parts, chosen)])
        out = copy.copy(self)
        out.left_out = Part.of(tokens, np.empty(0, np.int64), marks, self.vocab_size)
        return out, np.unique(marks)

    def counts(self, text: np.ndarray, first: int = 0) -> np.ndarray:
        """[T, L + 2] i8: how often the l tokens that end at each place of `text` from `first` on occur; l = 0: how many
        tokens there are.
        """
        counts = np.zeros((len(text) - first, LONGEST + 2), np.int64)
        for part in self.parts:
            count_suffixes(part.tokens, part.order, part.starts, text, 1, counts)
        if self.left_out is not None:
            out = self.left_out
            count_suffixes(out.tokens, out.order, out.starts, text, -1, counts)
        return counts

    def guesses(self, document: np.ndarray, first: int = 1) -> Guesses:
        """For every token of a document from `first` on: what each suffix of the text before it gives it."""
        text = np.concatenate(([self.eod_id], document)).astype(np.int64)
        counts = self.counts(text, first)
        return collect(counts[:-1], counts[1:])

    def summary(self) -> dict[str, Any]:
        m = self.manifest
        sizes = {name: sum(getattr(part, name).nbytes for part in self.parts) for name in NAMES[:3]}
        documents = sum(16 * len(part.ends) for part in self.parts)
        return {
            "kind": "ngram",
            "tokens": self.num_tokens,
            "documents": sum(part["documents"] for part in m["parts"]),
            "bytes_per_token": (sum(sizes.values()) + documents) / self.num_tokens,
            "store": m["store"],
            "tokenizer": m["tokenizer"],
            "fingerprint": m["fingerprint"],
        }

    def verify(self) -> None:
        """Compare every file with the manifest."""
        files.verify_files(self.folder, self.manifest["files"])
