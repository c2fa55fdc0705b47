"""Replicas of the server on Ray Serve, over one library that a process of its own has open.

`serve run retro_engine.serve.replicas:build run=runs/mine accounts=accounts.sqlite replicas=2`. Every replica has the model in its engine and
answers all routes; what it asks of the library it asks the one `Shelf`, so a document that any replica added is in the
next search of all of them. Ray's proxy holds the connections: the limits on slow clients are Ray's, those on bodies,
prompts and times are ours. Machines must see the same files. Docs: docs/serving.md.
"""

import asyncio
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import MissingExtraError, UsageError
from retro_engine.model.weights import read_config
from retro_engine.retrieval.library import DEFAULT, Library
from retro_engine.retrieval.library_documents import Chunker, HashEmbedder
from retro_engine.retrieval.library_import import Importer, Job
from retro_engine.serve.app import make_app
from retro_engine.serve.auth import Accounts
from retro_engine.serve.limits import ApiError, Limits
from retro_engine.serve.run import Address, make_state
from retro_engine.serve.service import Options, Service, library_folder, open_library, open_service
from retro_engine.train import checkpoint

CALLS = ("add", "delete", "get", "entries", "statistics", "reset", "find", "job", "start", "version", "settings")
SHELF, SERVER = "Shelf", "Server"  # names of the deployments
WAITING = 256  # requests that Ray gives one replica at once: the engine's own queue answers 429 before


class Shelf:
    """The deployment that has the library open."""

    def __init__(self, options: Options):
        folder = checkpoint.find_checkpoint(options.run)
        chunk_size = read_config(folder).chunk_size
        self.library = open_library(library_folder(options, folder), Tokenizer.load(folder), chunk_size)
        self.importer = Importer(self.library)

    async def call(self, name: str, *arguments: Any, **named: Any) -> Any:
        """One of CALLS, in a thread -> the library's version after it, and its answer or error.

        An error is a value here, because Ray rewrites what is raised.
        """
        if name not in CALLS:
            raise ValueError(f"{name} is not one of {', '.join(CALLS)}")
        try:
            answer = await asyncio.to_thread(self._answer, name, *arguments, **named)
        except Exception as error:
            answer = _Failure(error)
        return self.library.version, answer

    def _answer(self, name: str, *arguments: Any, **named: Any) -> Any:
        file = self.library.file
        if name == "version":
            return None
        if name == "settings":
            chunks = (file.chunk_size, file.stride, file.settings["embedder"], file.settings["width"])
            return str(self.library.folder.resolve()), file.settings["tokenizer"], *chunks
        owner: Any = self.importer if name in ("job", "start") else self.library
        return getattr(owner, name)(*arguments, **named)

    def __del__(self) -> None:
        if hasattr(self, "importer"):
            self.importer.stop()
            self.library.close()


class _Failure:
    """An error on its way to a replica."""

    def __init__(self, error: Exception):
        self.error = error


class SharedLibrary(Library):
    """A library that the Shelf has open, with what a server asks of one."""

    def __init__(self, ask: Callable[..., Any]):
        """`ask` calls the Shelf and waits: (name, arguments) -> version, answer."""
        self._asks, self._known_version = ask, 0
        folder, tokenizer_json, chunk_size, stride, embedder, width = self.ask("settings")
        self.folder = Path(folder)
        tokenizer = Tokenizer(tokenizer_json)
        known = HashEmbedder(tokenizer) if embedder == HashEmbedder.name else None
        self.chunker = Chunker(tokenizer, chunk_size, stride, known, width)
        self.file = SimpleNamespace(tokenizer=tokenizer, chunk_size=chunk_size, stride=stride)  # type: ignore[assignment]

    def ask(self, name: str, *arguments: Any, **named: Any) -> Any:
        """What the Shelf answers; its errors are raised here."""
        self._known_version, answer = self._asks(name, *arguments, **named)
        if isinstance(answer, _Failure):
            raise answer.error
        return answer

    @property
    def version(self) -> int:
        """The Shelf's; on an event loop, which must not wait, that of its last answer to this replica."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self.ask("version")
        return self._known_version

    def close(self) -> None:
        """Nothing: the Shelf closes it."""


class SharedImporter(Importer):
    """The Shelf's importer. A stream is kept in the library's folder first, which all machines see."""

    def __init__(self, library: SharedLibrary):
        self.library, self._ask = library, library.ask

    def start(self, source: str | Path | IO[bytes], namespace: str = DEFAULT) -> int:
        path = source if isinstance(source, str | Path) else self._keep(source)
        return int(self._ask("start", str(path), namespace))

    def job(self, number: int) -> Job:
        job: Job = self._ask("job", number)
        return job

    def stop(self) -> None:
        """Nothing: jobs are the Shelf's."""


def _asks(name: str) -> Any:
    def method(self: SharedLibrary, *arguments: Any, **named: Any) -> Any:
        return self.ask(name, *arguments, **named)

    return method


for _name in ("add", "delete", "get", "entries", "statistics", "reset", "find"):
    setattr(SharedLibrary, _name, _asks(_name))


def build(settings: dict[str, str]) -> Any:
    """The Ray Serve application: run=RUN and accounts=FILE, and if wanted replicas=N, allow_host=NAME and of `retro serve`
    library, mode, name, dtype, max_batch and max_waiting.

    Raises MissingExtraError without Ray Serve, UsageError for a setting that does not exist or while nobody has access.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise MissingExtraError(
            "Ray Serve is not installed", str(error), "pip install 'retro-engine[replicas]'"
        ) from error
    given = dict(settings)
    replicas = int(given.pop("replicas", "2"))
    accounts = given.pop("accounts", "")
    hosts = [name for name in (given.pop("allow_host", None),) if name]
    known = {field.name for field in fields(Options)} - {"stores", "weights"}
    if wrong := sorted(given.keys() - known):
        raise UsageError(f"{', '.join(wrong)} cannot be set", f"known: {', '.join(sorted(known))}", "leave it out")
    if "run" not in given or not accounts:
        raise UsageError("run or accounts is not set", "a replica needs both", "run=RUN accounts=FILE")
    numbers = {key: int(value) for key, value in given.items() if key in ("max_batch", "max_waiting")}
    options = Options(**{**given, **numbers})  # type: ignore[arg-type]
    if Accounts(accounts).is_empty:
        raise UsageError("nobody has access yet", accounts, "retro users add NAME, or retro keys add NAME")
    has_library = read_config(checkpoint.find_checkpoint(options.run)).retrieval

    def app() -> Any:
        state = make_state(Accounts(accounts), Limits(), Address())
        return make_app(state, partial(_open, options, has_library), hosts)

    server = serve.deployment(serve.ingress(app)(_Server), name=SERVER).options(
        num_replicas=replicas, max_ongoing_requests=WAITING
    )
    if not has_library:
        return server.bind(None)
    shelf = serve.deployment(Shelf, name=SHELF).options(
        max_ongoing_requests=WAITING, logging_config={"enable_access_log": False}
    )
    return server.bind(shelf.bind(options))


class _Server:
    """A replica; its application opens the model."""

    def __init__(self, shelf: Any):
        self.shelf = shelf


def _open(options: Options, has_library: bool) -> Service:
    if not has_library:
        return open_service(options)
    from ray import exceptions, serve

    shelf = serve.get_deployment_handle(SHELF, serve.get_replica_context().app_name)

    def ask(name: str, *arguments: Any, **named: Any) -> Any:
        try:
            return shelf.call.remote(name, *arguments, **named).result()
        except exceptions.RayError as error:  # its process is gone; Ray starts another, which loses nothing
            message = f"the library's process is gone: {type(error).__name__}"
            raise ApiError(503, message, code="loading", headers={"retry-after": "2"}) from error

    library = SharedLibrary(ask)
    return open_service(options, (library, SharedImporter(library)))
