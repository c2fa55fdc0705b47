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
from retro_engine.readers.bases import base_path
from retro_engine.readers.reader import open_reader
from retro_engine.readers.reader_file import Reader, find_reader
from retro_engine.retrieval.hit import Found
from retro_engine.retrieval.search import Retriever
from retro_engine.serve.api_error import ApiError
from retro_engine.serve.encode_ahead import EncodeAhead
from retro_engine.serve.follow import FollowedFolders, check_folders
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
    reading: str | None = None  # of a plain decoder: prefix, prompt, none; None: documents, where there are some
    neighbor_bytes: int | None = None  # of encoded neighbors that are kept: `Generator`
    follow: Sequence[str] = ()  # folders whose files the library holds
    memory: str | None = None  # beside the model: ngram (of the run's store), or a folder; None: none
    memory_weights: str | None = None  # a number, or a file of eval --memory-out


WARM_TOKENS = 4  # that a server generates before it is ready, twice


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
    followed: FollowedFolders | None = None
    in_prompt: LiveRetriever | None = None  # the model reads no neighbors: what is found stands in its prompts

    @property
    def source(self) -> LiveRetriever | None:
        """What is searched, whichever way the model reads it."""
        found = self.in_prompt or self.generator.retriever
        return found if isinstance(found, LiveRetriever) else None

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
        R, source = self.generator.model.config.r, self.source
        if source is None:  # a plain decoder
            return Found.of([], k, R, self.tokenizer.pad_id)
        return source.search(text, k, mode, weights, R, where)

    def why_nothing(self, text: str, where: Filter | None = None) -> str:
        """Why a search for a text has no hit."""
        if self.library is not None and where is not None:
            return self.library.why_nothing(text, where=where)
        if self.library is not None:
            return self.library.why_nothing(text) + (", nor in the stores" if self.static is not None else "")
        return "there is nothing to search" if self.static is None else "none of its words is in the stores"

    def check_search(self, mode: str | None, min_score: float | None = None, param: str = "min_score") -> None:
        """Raises UsageError for a mode that the library has no vectors for, ApiError for a least score of ranks."""
        if min_score is not None and self.source is not None:
            try:
                self.source.check_least(mode)
            except UsageError as error:
                raise ApiError(400, f"{error.what}: {error.why}", param, "contradiction") from None
        if mode not in (None, "lexical") and self.library is not None and self.library.chunker.width is None:
            raise UsageError(f"mode {mode} needs vectors", "the library was made without an embedder", "lexical")

    def warm_up(self) -> None:
        """Compute once what a first request would wait for and no route asks for by itself: a token without neighbors, and a
        search.
        """
        text = self.known_words()
        self.engine.submit(Request(self.tokenizer.encode(text)[:1] or [0], 2, neighbors=[])).result()
        if self.source is not None:
            self.find(text, 1, self.mode)
        self.token_bytes  # noqa: B018 (made when it is read first)

    def forget(self) -> None:
        """What it asked itself was nobody's request: nothing of it is kept or counted, and its memory is free again."""
        self.engine.forget()
        trim()

    def given(self, text: str) -> dict[str, Any]:
        """A body's field that has a text read, where neighbors can be and a whole chunk has room behind them."""
        config = self.generator.model.config
        return {"retro": {"neighbors": [text]}} if config.retrieval and config.most_tokens is None else {}

    def known_words(self) -> str:
        """A chunk of what a search finds."""
        known = [token for token in self.tokenizer.encode(self._known_text()) if token != self.tokenizer.eod_id]
        return self.tokenizer.decode(known[: self.generator.model.config.chunk_size]).strip() or "a"

    def _known_text(self) -> str:
        """One that a search has hits for, where there is anything to find."""
        if self.static is not None and (stores := [store for store in self.static.stores if store.num_rows]):
            return stores[0].text(0)
        entries = [] if self.library is None else self.library.entries(limit=1)
        found = self.library.get(entries[0].id) if self.library is not None and entries else None
        return "a" if found is None else found.text[:1000]

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
        if self.followed is not None:
            self.followed.close()
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
    is_plain = not model.config.retrieval
    check_reading(model, None if is_plain and options.reading == "prompt" else options.reading)
    is_own = shared is None
    has_documents, stores = reads_documents(options, folder, model.config), []
    if has_documents:
        named = options.stores is not None or reader is not None or is_plain
        stores = [Store(path) for path in options.stores or ()] if named else run_databases(folder)
    chunk_size = _chunk_size(options, folder, stores, shared) if is_plain else None
    if is_plain and options.reading in (None, "prefix"):
        try:  # for documents, or for neighbors that requests give
            read_in_front(model, tokenizer, chunk_size)
        except UsageError:  # what is found stands in its prompt; with nothing to read it is a plain decoder
            if options.reading is not None:
                raise
    _check_documents(options, model.config.retrieval, has_documents, is_own)
    library = importer = None
    if has_documents:
        size = chunk_size if chunk_size and is_plain else model.config.chunk_size
        step = None if reader is None else reader.reading.stride
        library, importer = shared or _open_documents(options, folder, tokenizer, size, step)
    static = Retriever(stores) if stores else None
    retriever = None if library is None else LiveRetriever(library, static, options.weights, options.mode)
    read = retriever if model.config.retrieval else None
    encoded = open_encodings(folder, model.config, tokenizer, read.stores if read else [], options.encodings)
    generator = Generator(model.eval(), tokenizer, read, options.neighbor_bytes, encoded=encoded, beside=beside)
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
        in_prompt=retriever if read is None else None,
        followed=FollowedFolders(library, options.follow) if options.follow and library is not None else None,
    )


def _check_documents(options: ServiceOptions, reads: bool, has_documents: bool, is_own: bool) -> None:
    """Raises UsageError for settings of what is not there, before anything is opened that would have to be closed."""
    if options.neighbor_bytes and not reads:
        raise UsageError(f"--neighbor-bytes {options.neighbor_bytes}", "this model reads no neighbors", "leave it out")
    if options.embedder is not None and not has_documents:
        why = "a plain decoder has one where it is named"
        raise UsageError(f"--embedder {options.embedder} without a library", why, "--library FOLDER")
    if options.follow and not (has_documents and is_own):
        why = "what its files hold is kept in one"
        raise UsageError(f"--follow {options.follow[0]} without a library", why, "--library FOLDER")
    check_folders(options.follow)


def _open_documents(
    options: ServiceOptions, checkpoint_folder: Path, tokenizer: Tokenizer, chunk_size: int, step: int | None
) -> tuple[Library, Importer]:
    """The library, and its imports, which go on where they were stopped."""
    folder = library_folder(options, checkpoint_folder)
    library = open_library(folder, tokenizer, chunk_size, step, options.embedder)
    importer = Importer(library)
    importer.recover()
    return library, importer


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
    return options.reading in ("prefix", "prompt") or is_named or is_there


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
    library = Library(folder, tokenizer=tokenizer)
    try:
        if embedder is not None:
            check_named(library.file.settings, embedder, str(folder))
        Coding("the model", tokenizer.fingerprint, chunk_size, "model").check(library_coding(library))
    except (StoreError, UsageError):
        library.close()
        raise
    return library
