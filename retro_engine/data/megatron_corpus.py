"""Megatron's corpora, NAME.bin and NAME.idx, as a store: their tokens are taken as they are.

NAME.idx is MMIDIDX and two NUL bytes | u8 version (1) | u1 code of the type | u8 sequences S | u8 documents + 1 D | i4 sizes [S]
| i8 where each sequence begins in NAME.bin, in bytes [S] | i8 first sequence of each document, and the end [D]; all
little-endian. NAME.bin has the token ids. Types are u2 and i4; others are refused.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from retro_engine.data import files, store
from retro_engine.data.contents import content_mark
from retro_engine.data.store import Store, StoreWriter
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import MissingInputError, StoreError

MAGIC = b"MMIDIDX\x00\x00"
HEAD = struct.Struct("<9sQBQQ")
TYPES: dict[int, np.dtype[Any]] = {8: np.dtype("<u2"), 4: np.dtype("<i4")}
OTHERS = {1: "uint8", 2: "int8", 3: "int16", 5: "int64", 6: "float64", 7: "float32"}
BATCH = 256  # documents decoded at once


class MegatronCorpus:
    """An opened pair of files."""

    def __init__(self, path: Path):
        """`path`: NAME.idx. Raises MissingInputError, or StoreError for what is no such file, another type or damaged."""
        self.path, self.data_path = path, path.with_suffix(".bin")
        for needed in (self.path, self.data_path):
            if not needed.is_file():
                raise MissingInputError(f"{needed} does not exist", "NAME.bin and NAME.idx lie beside each other")
        raw = files.mapped(self.path)
        if len(raw) < HEAD.size or raw[: len(MAGIC)].tobytes() != MAGIC:
            raise StoreError(f"{path} is no index of Megatron's", "it does not begin with MMIDIDX", "name another file")
        _, version, code, sequences, documents = HEAD.unpack(raw[: HEAD.size].tobytes())
        if version != 1:
            raise StoreError(f"{path} has version {version}", "version 1 is read")
        if code not in TYPES:
            name = OTHERS.get(code, f"type {code}")
            why = "token ids are uint16 or int32: write it again with one of them"
            raise StoreError(f"{path} holds {name}", why, "or retro prepare the text that it was made of")
        if len(raw) != HEAD.size + 12 * sequences + 8 * documents or documents < 2:
            raise StoreError(f"{path} is damaged", f"{len(raw):,} bytes are not {sequences:,} sequences' index", "")
        ends = np.cumsum([HEAD.size, 4 * sequences, 8 * sequences, 8 * documents])
        sizes, starts, firsts = (
            raw[first:last].copy().view(dtype) for first, last, dtype in zip(ends, ends[1:], ("<i4", "<i8", "<i8"))
        )
        self.tokens = files.mapped(self.data_path)
        self.tokens = self.tokens[: len(self.tokens) // TYPES[code].itemsize * TYPES[code].itemsize].view(TYPES[code])
        self._sizes, self._starts, self._firsts = sizes.astype(np.int64), starts // TYPES[code].itemsize, firsts
        holds = (
            (self._sizes >= 0).all()
            and (starts >= 0).all()
            and (starts % TYPES[code].itemsize == 0).all()
            and (self._starts + self._sizes <= len(self.tokens)).all()
            and (int(firsts[0]), int(firsts[-1])) == (0, sequences)
            and (np.diff(firsts) >= 0).all()
        )
        if not holds:
            raise StoreError(
                f"{path} and {self.data_path.name} do not fit", "its sequences are not there", "copy both again"
            )

    def documents(self) -> Iterator[np.ndarray]:
        """The tokens of each document; of one in several sequences, all of them."""
        for first, last in zip(self._firsts[:-1], self._firsts[1:]):
            parts = [self.tokens[self._starts[n] : self._starts[n] + self._sizes[n]] for n in range(first, last)]
            yield np.concatenate([np.empty(0, np.int64), *parts])


def store_from_megatron(paths: list[Path], out: Path, tokenizer: Tokenizer, chunk_size: int) -> Store:
    """Publish the documents of NAME.idx files, made with `tokenizer`, as the store `out`; one without a token is left out.

    A document's end that is stored with it is not taken twice. Raises StoreError for ids that the tokenizer lacks.
    """
    corpora = [MegatronCorpus(path) for path in paths]
    store.refuse_published(out)
    with files.locked(out):
        writer = StoreWriter(out, tokenizer, chunk_size)
        for corpus in corpora:
            waiting: list[tuple[int, np.ndarray]] = []
            for number, tokens in enumerate(corpus.documents()):
                ids = tokens[:-1] if len(tokens) and tokens[-1] == tokenizer.eod_id else tokens
                if len(ids):
                    waiting.append((number, ids))
                if len(waiting) == BATCH:
                    _write(writer, corpus.path, waiting)
                    waiting = []
            _write(writer, corpus.path, waiting)
        return writer.close()


def _write(writer: StoreWriter, path: Path, documents: list[tuple[int, np.ndarray]]) -> None:
    for number, ids in documents:
        if int(ids.max()) >= writer.tokenizer.vocab_size or int(ids.min()) < 0:
            raise StoreError(
                f"{path}: document {number} has token {int(ids.max())}",
                f"the tokenizer has {writer.tokenizer.vocab_size} entries",
                "name the tokenizer that it was made with",
            )
    texts = writer.tokenizer.decode_batch([ids.astype(np.int64).tolist() for _, ids in documents])
    for (number, ids), text in zip(documents, texts):
        tokens = np.append(ids, writer.tokenizer.eod_id).astype(np.int64)
        writer.add_tokens((f"{path.stem}:{number}", ""), tokens, len(text.encode()), content_mark(text))
