"""The Python quick start: Corpus, Index, Retro, fit; and `ask`, which answers from documents. Everything here also exists as a command.

corpus = Corpus.from_files("docs/**/*.md")
index = Index.build(corpus)
data = corpus.with_neighbors(index, k=2)
fit(data, preset="tiny", out="runs/mine", steps=400)
model = Retro.from_pretrained("runs/mine")
print(model.evaluate(data.valid))
print(model.generate("The neighbor table", index=index).text)
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from retro_engine.data.store import Store
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import StoreError
from retro_engine.generate.generator import Generation, Generator, model_coding
from retro_engine.generate.open_memory import open_beside
from retro_engine.generate.open_model import read_in_front
from retro_engine.generate.sampling import Sampling
from retro_engine.interop.in_place import open_any
from retro_engine.memory.next_token import MemoryBeside
from retro_engine.model.retro import RetroModel
from retro_engine.progress import Reporter

if TYPE_CHECKING:  # what continues a prompt takes neither training nor retrieval, and answers sooner
    from retro_engine.data.batches import Sequences
    from retro_engine.data.neighbor_table import NeighborTable
    from retro_engine.evaluate.losses import DocumentLosses
    from retro_engine.readers.ask import Answer
    from retro_engine.retrieval.search import Building, Retriever
    from retro_engine.train.loop import TrainingResult

TABLE_WIDTH = 20  # K: neighbors kept a chunk, so that some may be passed over


@dataclass
class Share:
    """Some documents of a store with their neighbors."""

    store: Store
    table: "NeighborTable"
    documents: np.ndarray
    database_documents: np.ndarray


@dataclass
class Data:
    """A corpus with its neighbors, split into documents to train, validate and test on."""

    store: Store
    table: "NeighborTable"
    num_neighbors: int
    splits: str

    def _share(self, name: str) -> Share:
        from retro_engine.data.batches import split_documents

        shares = split_documents(self.store, self.splits)
        return Share(self.store, self.table, shares[name], shares["train"])

    @property
    def train(self) -> Share:
        return self._share("train")

    @property
    def valid(self) -> Share:
        return self._share("valid")

    @property
    def test(self) -> Share:
        return self._share("test")


class Corpus:
    """Documents as a chunk store on disk."""

    def __init__(self, store: Store):
        self.store = store

    @classmethod
    def from_files(
        cls,
        *patterns: str | Path,
        out: str | Path | None = None,
        chunk_size: int = 64,
        tokenizer: str = "auto",
        quiet: bool = False,
        format: str | None = None,
        split: str = "auto",
        **reading: Any,
    ) -> "Corpus":
        """Read files, folders and glob patterns into a store at `out` (None = a temporary folder; `fit` keeps it beside the run).
        `format` and `split` are those of `retro prepare`.

        What is passed over or set aside is said, and listed in the store's set_aside.jsonl. Raises MissingInputError
        when nothing matches; further arguments are those of `data.prepare.prepare`.
        """
        from retro_engine.data.corpus import Reader
        from retro_engine.data.kept_stores import hold, temporary_folder
        from retro_engine.data.prepare import prepare

        reader = Reader(format=format, split=split)
        reading = {"say": Reporter("quiet" if quiet else "text").say, "reader": reader, **reading}
        folder, holder = temporary_folder() if out is None else (Path(out), None)
        store = prepare(patterns, folder, tokenizer, chunk_size=chunk_size, **reading)
        if holder is not None:
            hold(store, holder)
        return cls(store)

    @classmethod
    def open(cls, folder: str | Path) -> "Corpus":
        return cls(Store(folder))

    def with_neighbors(self, index: "Index", k: int = 2, splits: str = "90,10,0", name: str | None = None) -> Data:
        """The corpus with the nearest chunks of `index` for each of its chunks; opened when they are there."""
        from retro_engine.data.neighbor_table import NeighborTable
        from retro_engine.retrieval.embed import short_name
        from retro_engine.retrieval.neighbors import build_neighbors

        retriever = index.retriever
        folder = self.store.folder / "neighbors" / (name or short_name(retriever.kind))
        if folder.is_dir() and (folder / "manifest.json").is_file():
            table = NeighborTable(folder, self.store)
            _check_same_databases(table, retriever)
        else:
            width = max(k, TABLE_WIDTH)
            table = build_neighbors(
                self.store, retriever.stores, retriever.kind, width, name, building=retriever.building
            )
        table.ids(np.zeros(0, np.int64), k)
        return Data(self.store, table, k, splits)


def _check_same_databases(table: "NeighborTable", retriever: "Retriever") -> None:
    """Raise StoreError where a table that is there has its neighbors from other stores than those of the index."""
    found = [store.fingerprint for store in table.databases]
    wanted = [store.fingerprint for store in retriever.stores]
    if found != wanted:
        shown = ["+".join(mark[:12] for mark in marks) for marks in (found, wanted)]
        raise StoreError(
            f"{table.folder} has neighbors from stores {shown[0]}",
            f"the index is of {shown[1]}",
            "name=NAME makes another",
        )


class Index:
    """A retriever over one or more corpora."""

    def __init__(self, retriever: "Retriever"):
        self.retriever = retriever

    @classmethod
    def build(cls, *corpora: Corpus, retriever: str = "bm25", building: "Building | None" = None) -> "Index":
        """`retriever`: lexical (bm25), dense, hybrid, hash, minilm or a model; `building` says how, else as is usual."""
        from retro_engine.retrieval.search import Retriever

        return cls(Retriever([corpus.store for corpus in corpora], retriever, building=building))

    def search(self, text: str, k: int = 5) -> list[Any]:
        """The k best chunks (Hit: document, title, chunk, score, text, continuation, source)."""
        return self.retriever.hits(text, k)


@dataclass
class Evaluation:
    """Losses with retrieval on, off and random; prints as bits per byte."""

    losses: "dict[str, DocumentLosses]"

    def __str__(self) -> str:
        return "bits per byte: " + ", ".join(
            f"{mode} {result.bits_per_byte:.3f}" for mode, result in self.losses.items()
        )

    def summary(self) -> dict[str, Any]:
        return {mode: result.summary() for mode, result in self.losses.items()}


class Retro:
    """A trained model with its tokenizer."""

    def __init__(
        self,
        model: RetroModel,
        tokenizer: Tokenizer,
        defaults: dict[str, Any] | None = None,
        folder: str | Path = "",
    ):
        """`defaults`: generation_config.json, what `generate` does when nothing is said; `folder`: of the checkpoint."""
        self.model, self.tokenizer, self.folder = model, tokenizer, Path(folder)
        values = defaults or {}
        self.sampling = Sampling() if values.get("greedy", True) else Sampling(**values)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | Future[Path],
        dtype: str | torch.dtype | None = None,
        device: str | torch.device = "auto",
    ) -> "Retro":
        """A run's best checkpoint, or a checkpoint folder, after checking its files; or a GGUF file: `open_any`."""
        opened = open_any(path, dtype, device)
        return cls(opened.model, opened.tokenizer, opened.generation, opened.folder)

    def read_in_front(self, chunk_size: int | None = None, asked: dict[str, Any] | None = None) -> "Retro":
        """Itself, a plain decoder, as one that reads neighbors in front: `open_model.read_in_front`."""
        read_in_front(self.model, self.tokenizer, chunk_size, asked)
        return self

    @property
    def device(self) -> torch.device:
        return self.model.device

    def sequences(self, share: Share) -> "Sequences":
        """Raises StoreError for a store of another tokenizer or chunk size."""
        from retro_engine.data.batches import Sequences

        c = self.model.config
        model_coding(self.model, self.tokenizer).check(share.store.coding)
        table = share.table if c.retrieval else None
        return Sequences.of_model(c, share.store, share.documents, table, share.database_documents)

    def evaluate(self, share: Share, modes: Sequence[str] | None = None, limit: int | None = None) -> Evaluation:
        """Bits per byte over every token of `share`, retrieval on, off and random."""
        from retro_engine.evaluate.perplexity import evaluate

        modes = modes or (("on", "off", "random") if self.model.config.retrieval else ("off",))
        return Evaluation(evaluate(self.model, self.sequences(share), self.tokenizer.token_bytes(), modes, limit=limit))

    def generate(
        self,
        prompt: str,
        index: Index | None = None,
        max_new_tokens: int = 64,
        neighbors: Sequence[str] | None = None,
        sampling: Sampling | None = None,
        pad_prompt: bool = True,
        encodings: Sequence[str | Path] = (),
        memory: MemoryBeside | None = None,
    ) -> Generation:
        """Continue `prompt`, reading from `index`, from the texts `neighbors`, or from nothing.

        `encodings`: folders that `retro encode` wrote for these weights, as they were loaded; what is in them is not encoded
        again. `memory`: of `open_memory`.
        """
        source, encoded = index.retriever if index is not None else None, []
        if encodings:
            from retro_engine.generate.encode_store import open_encodings

            stores = source.stores if source is not None else []
            encoded = open_encodings(self.folder, self.model.config, self.tokenizer, stores, encodings)
        generator = Generator(self.model, self.tokenizer, source, encoded=encoded, beside=memory)
        return generator.generate(prompt, max_new_tokens, sampling or self.sampling, neighbors, pad_prompt=pad_prompt)

    def open_memory(self, name: str | Path = "ngram", weights: str | float | Path = 0.3) -> MemoryBeside:
        """An n-gram memory for `generate`: that of the run's store, or a folder; `weights`: what `retro eval --memory-out` wrote, or
        one for every suffix that is found.

        Raises MissingInputError where there is none, StoreError for another tokenizer's, UsageError for weights that are no shares.
        """
        return open_beside(str(name), str(weights), self.folder, self.tokenizer)


def fit(
    data: Data,
    preset: str = "tiny",
    out: str | Path = "runs/retro",
    steps: int | None = None,
    overrides: Sequence[str] = (),
    quiet: bool = False,
) -> "TrainingResult":
    """Train on `data`; `overrides` are the command line's, like "model.optim.lr=1e-3". A temporary store is kept as OUT/store,
    so that every command can use the run.
    """
    from retro_engine.config import load_config
    from retro_engine.data.kept_stores import keep
    from retro_engine.train.loop import train

    settings: list[str | tuple[str, Any]] = [
        ("model.data.splits_string", data.splits),
        ("model.chunk_size", data.store.chunk_size),
        ("model.num_neighbors", data.num_neighbors),
        ("exp_manager.exp_dir", str(out)),
    ]
    if steps is not None:
        settings.append(("trainer.max_steps", steps))
    load_config([*settings, *overrides], preset)  # what is wrong with them is said before anything is written
    store, table = keep(data.store, data.table, Path(out))
    settings += [("model.data.store", str(store)), ("model.data.neighbors", str(table))]
    config = load_config([*settings, *overrides], preset)
    return train(config, Reporter("quiet" if quiet else "text"))


def ask(
    documents: str | Path | Sequence[str | Path],
    question: str,
    reader: str | Path | None = None,
    base: str | Path | None = None,
    *,
    k: int | None = None,
    max_new_tokens: int | None = None,
    dtype: str | None = None,
) -> "Answer":
    """Answer a question from files and folders; `reader`: a name or a folder, `base`: its GGUF file (None: the package's own
    reader, and what `retro fetch` brought). For several questions: `retro_engine.readers.ask.Asker`.
    """
    from retro_engine.readers.ahead import checked_question
    from retro_engine.readers.ask import Asker

    checked_question(question)  # before anything is loaded
    return Asker(documents, reader, base, k=k, max_new_tokens=max_new_tokens, dtype=dtype).ask(question)
