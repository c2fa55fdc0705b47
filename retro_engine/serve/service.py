"""What one server serves: a model in its engine, a live library, and the published stores that are read beside it."""

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from retro_engine.config import ModelConfig
from retro_engine.data.coding import Coding
from retro_engine.data.store import Store
from retro_engine.data.token_bytes import TokenBytes
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import StoreError, UsageError
from retro_engine.generate.chat_template import ChatTemplate
from retro_engine.generate.encode_store import open_encodings
from retro_engine.generate.engine import Engine, Request
from retro_engine.generate.generator import Generator
from retro_engine.generate.open_memory import open_beside
from retro_engine.generate.open_model import OpenedModel, check_reading, read_in_front
from retro_engine.generate.sampling import Sampling
from retro_engine.interop.in_place import open_any
from retro_engine.library.documents import Embedder, HashEmbedder
from retro_engine.library.embedders import check_named, new_embedder
from retro_engine.library.file import LibraryFile, is_made
from retro_engine.library.filters import Filter
from retro_engine.library.importer import Importer
from retro_engine.library.library import Library
from retro_engine.library.live import LiveRetriever, library_coding
from retro_engine.library.search import check_mode
from retro_engine.memory.next_token import MemoryBeside
from retro_engine.model.device import pick_device
from retro_engine.model.memory import trim
from retro_engine.readers.reader import base_path, open_reader
from retro_engine.readers.reader_file import Reader, find_reader
from retro_engine.retrieval.hit import Found
from retro_engine.retrieval.search import Retriever
from retro_engine.serve.encode_ahead import EncodeAhead
from retro_engine.serve.work import Work
from retro_engine.train.run_data import run_databases


@dataclass(frozen=True, kw_only=True)
class ServiceOptions:
    """What to open, and how."""

    run: str  # "" where it is a reader
    reader: str | None = None  # a name or a folder, in place of a run (readers/reader_file.py)
    base: str | None = None  # of the reader: its .gguf file; None: where `retro fetch` puts it
    library: str | None = None  # None: RUN/library; made when it is not there
    embedder: str | None = (
        None  # of a library that is made: none, hash, minilm, a model (library/embedders.py); None: hash
    )
    stores: Sequence[str] | None = None  # None: those that the run's neighbors came from; [] = none
    encodings: Sequence[str] = ()  # of retro encode, elsewhere than beside their store
    mode: str = "lexical"
    weights: Sequence[float] = (1.0, 1.0)  # of the library, and of the stores
    name: str | None = None  # of the model; None: the run's
    aliases: Sequence[str] = ()  # other names that requests may use
    max_batch: int = 8
    max_waiting: int = 64
    dtype: str | None = None  # of the model's weights: fp32, bf16, int8, int4; None: as saved
    shares_prefixes: bool = False  # callers use each other's: faster, and times tell what others have asked
    device: str = "auto"  # a GPU where there is one; cpu, gpu
    reading: str | None = None  # of a plain decoder: prefix, none; None: prefix, documents where there are some
    neighbor_bytes: int | None = None  # of encoded neighbors that are kept: `Generator`
    memory: str | None = None  # beside the model: ngram (of the run's store), or a folder; None: none
    memory_weights: str | None = None  # a number, or a file of eval --memory-out


@dataclass(kw_only=True)
class Service:
    """An open model and library; close it."""

    name: str
    generator: Generator
    engine: Engine
    library: Library | None
    importer: Importer | None
    static: Retriever | None
    defaults: dict[str, Any] = field(default_factory=dict)  # of sampling, from the checkpoint
    chat: ChatTemplate | None = None  # None: question and answer
    aliases: tuple[str, ...] = ()
    mode: str = "lexical"
    work: Work = field(default_factory=Work)  # beside the engine
    ahead: EncodeAhead | None = None  # of documents that are added
    reader: Reader | None = None  # the model is one: it answers questions

    @property
    def names(self) -> tuple[str, ...]:
        """Those that requests may use, the model's own first."""
        return tuple(dict.fromkeys((self.name, *self.aliases)))

    @functools.cached_property
    def token_bytes(self) -> TokenBytes:
        return TokenBytes(self.tokenizer)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.generator.tokenizer

    @property
    def index_version(self) -> int:
        """Counts up with every change of the documents."""
        return self.library.version if self.library is not None else 0

    @property
    def embedder(self) -> Embedder | None:
        """The library's, where it is one that reads meaning: hashed words are for searching alone."""
        known = self.library.chunker.embedder if self.library is not None else None
        return None if known is None or known.name == HashEmbedder.name else known

    @property
    def embedder_name(self) -> str | None:
        return None if self.embedder is None else self.embedder.name

    def find(
        self,
        text: str,
        k: int,
        mode: str | None = None,
        weights: Sequence[float] = (1.0, 1.0),
        where: Filter | None = None,
    ) -> Found:
        """What generation would read for a text: the k best chunks of library and stores (`mode`, with `weights` of hybrid);
        `where`: of the library's documents that match.
        """
        R, source = self.generator.model.config.r, self.generator.retriever
        if not isinstance(source, LiveRetriever):  # a plain decoder
            return Found.of([], k, R, self.tokenizer.pad_id)
        return source.search(text, k, mode, weights, R, where)

    def why_nothing(self, text: str, where: Filter | None = None) -> str:
        """Why a search for a text has no hit."""
        if self.library is not None and where is not None:
            return self.library.why_nothing(text, where=where)
        if self.library is not None:
            return self.library.why_nothing(text) + (", nor in the stores" if self.static is not None else "")
        return "there is nothing to search" if self.static is None else "none of its words is in the stores"

    def check_search(self, mode: str | None) -> None:
        """Raises UsageError for a mode that the library has no vectors for."""
        if mode not in (None, "lexical") and self.library is not None and self.library.chunker.width is None:
            raise UsageError(f"mode {mode} needs vectors", "the library was made without an embedder", "lexical")

    def warm_up(self) -> None:
        """Compute once what a first request would wait for: what is compiled, imported or touched at first use. Nothing of it
        is kept or counted.
        """
        model, ids = self.generator.model, self.tokenizer.encode("a") or [0]
        generator = Generator(model, self.tokenizer, neighbor_bytes=0, beside=self.generator.beside)
        with Engine(generator, max_batch=1, prefix_bytes=0) as engine:
            engine.submit(Request(ids, 2, neighbors=[])).result()
            if model.config.retrieval and model.config.most_tokens is None:  # else a whole chunk may not have room
                engine.submit(Request(ids, 2, neighbors=["a"])).result()
        if self.generator.retriever is not None:
            self.find("a", 1, self.mode)
        trim()

    def close(self) -> None:
        """End the requests that run, then the imports, then the library."""
        self.work.close()
        self.engine.close()
        if self.chat is not None:
            self.chat.close()
        if self.importer is not None:
            self.importer.stop()
        if self.ahead is not None:
            self.ahead.close()
        if self.library is not None:
            self.library.close()


def open_service(options: ServiceOptions, shared: tuple[Library, Importer] | None = None) -> Service:
    """Load the best checkpoint of a run, open its library (unless it is `shared`: another process has it) and stores.

    Raises RetroError's for whatever is missing, damaged or does not fit.
    """
    check_mode(options.mode, (1.0, 1.0))
    reader = None if options.reader is None else find_reader(options.reader)
    opened = _open_model(options, reader)
    folder, model, tokenizer = opened.folder, opened.model, opened.tokenizer
    beside = _open_memory(options, opened)
    check_reading(model, options.reading)
    library = importer = static = None
    is_own = shared is None
    has_documents, stores = reads_documents(options, folder, model.config), []
    if has_documents:
        named = options.stores is not None or reader is not None or not model.config.retrieval
        stores = [Store(path) for path in options.stores or ()] if named else run_databases(folder)
    if not model.config.retrieval and options.reading != "none":
        try:  # for documents, or for neighbors that requests give
            read_in_front(model, tokenizer, _chunk_size(options, folder, stores, shared))
        except UsageError:  # with nothing to read it is a plain decoder
            if has_documents or options.reading is not None:
                raise
    if options.neighbor_bytes and not model.config.retrieval:
        raise UsageError(f"--neighbor-bytes {options.neighbor_bytes}", "this model reads no neighbors", "leave it out")
    if options.embedder is not None and not has_documents:
        raise UsageError(f"--embedder {options.embedder} without a library", "a plain decoder has one where it is named", "--library FOLDER")  # fmt: skip
    if has_documents:
        static = Retriever(stores) if stores else None
        if shared is None:
            chunk_size = model.config.chunk_size
            step = None if reader is None else reader.reading.stride
            library = open_library(library_folder(options, folder), tokenizer, chunk_size, step, options.embedder)
            shared = library, Importer(library)
            shared[1].recover()
        library, importer = shared
    retriever = None if library is None else LiveRetriever(library, static, options.weights, options.mode)
    encoded = open_encodings(folder, model.config, tokenizer, retriever.stores if retriever else [], options.encodings)
    generator = Generator(model.eval(), tokenizer, retriever, options.neighbor_bytes, encoded=encoded, beside=beside)
    engine = Engine(generator, options.max_batch, options.max_waiting, shares_prefixes=options.shares_prefixes)
    ahead = None
    if is_own and library is not None and generator.encodings is not None and generator.encodings.max_bytes:
        ahead = EncodeAhead(library, generator.encodings, model.config.r)
    Sampling(**opened.generation)
    name = options.name or (run_folder(folder).resolve().name if reader is None else reader.name)
    return Service(
        name=name,
        generator=generator,
        engine=engine,
        library=library,
        importer=importer,
        static=static,
        defaults=opened.generation,
        aliases=tuple(options.aliases),
        chat=ChatTemplate(tokenizer) if tokenizer.chat_files.templates else None,
        mode=options.mode,
        work=Work(options.max_waiting),
        ahead=ahead,
        reader=reader,
    )


def _open_model(options: ServiceOptions, reader: Reader | None) -> OpenedModel:
    """A run's model, or a reader's. Raises UsageError for a reader without a library, which its folder has no place for."""
    if reader is None:
        return open_any(options.run, options.dtype, options.device)
    if options.library is None:
        raise UsageError(f"--reader {options.reader} needs a library", "it answers from documents", "--library FOLDER")
    opened = open_reader(reader, base_path(reader, options.base), options.dtype)
    return replace(opened, model=opened.model.to(pick_device(options.device)))


def _open_memory(options: ServiceOptions, opened: OpenedModel) -> MemoryBeside | None:
    """What stands beside the model. Raises UsageError for a reader, whose answers are the documents' own words."""
    if options.memory is None:
        if options.memory_weights is not None:
            raise UsageError("--memory-weights is of a memory", "none is read", "--memory ngram")
        return None
    if options.reader is not None:
        raise UsageError(f"--memory {options.memory} with --reader", "a reader answers from documents", "leave it out")
    return open_beside(options.memory, options.memory_weights, opened.folder, opened.tokenizer)


def _chunk_size(
    options: ServiceOptions, checkpoint_folder: Path, stores: Sequence[Store], shared: tuple[Library, Importer] | None
) -> int | None:
    """Tokens a chunk of what there is to read; None = there is nothing yet."""
    if shared is not None:
        return shared[0].file.chunk_size
    known = made_chunk_size(library_folder(options, checkpoint_folder))
    return known or (stores[0].chunk_size if stores else None)


def made_chunk_size(library: Path) -> int | None:
    """Tokens a chunk of a library that is there."""
    if not is_made(library):
        return None
    with contextlib.closing(LibraryFile(library, is_read_only=True)) as file:
        return file.chunk_size


def reads_documents(options: ServiceOptions, checkpoint_folder: Path, config: ModelConfig) -> bool:
    """Whether there is a library: for a plain decoder where documents are named, or were added before, or it is told to
    read. Raises UsageError for documents that it is told not to read.
    """
    if config.retrieval:
        return True
    is_named = options.library is not None or bool(options.stores)
    if options.reading == "none" and is_named:
        what = "--library" if options.library is not None else "--stores"
        raise UsageError(f"{what} with --reading none", f"{options.run} then reads no documents", f"leave {what} out")
    is_there = options.reading is None and is_made(library_folder(options, checkpoint_folder))
    return options.reading == "prefix" or is_named or is_there


def run_folder(checkpoint_folder: Path) -> Path:
    """The run that a checkpoint is of; itself where it lies alone; of a file the folder beside it with its name."""
    if checkpoint_folder.is_file():
        return checkpoint_folder.with_suffix("")
    parent = checkpoint_folder.parent
    return parent.parent if parent.name == "checkpoints" else checkpoint_folder


def library_folder(options: ServiceOptions, checkpoint_folder: Path) -> Path:
    return Path(options.library or run_folder(checkpoint_folder) / "library")


def open_library(
    folder: Path, tokenizer: Tokenizer, chunk_size: int, step: int | None = None, embedder: str | None = None
) -> Library:
    """The library, made with the model's tokenizer and chunk size when it is not there; `step`: from chunk to chunk (None:
    a whole one).

    Raises StoreError for one of another tokenizer or chunk size, UsageError for one of another embedder than is named.
    """
    if not is_made(folder):
        Library.create(folder, tokenizer, chunk_size, step, new_embedder(embedder or HashEmbedder.name, tokenizer))
    library = Library(folder)
    try:
        if embedder is not None:
            check_named(library.file.settings, embedder, str(folder))
        Coding("the model", tokenizer.fingerprint, chunk_size, "model").check(library_coding(library))
    except (StoreError, UsageError):
        library.close()
        raise
    return library
