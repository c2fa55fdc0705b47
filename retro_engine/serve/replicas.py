"""Replicas of the server on Ray Serve, over one library that a process of its own has open.

`serve run retro_engine.serve.replicas:build run=runs/mine accounts=accounts.sqlite replicas=2`. Every replica has the
model in its engine and answers all routes; what it asks of the library it asks the one `Shelf`, so a document that any
replica added is in the next search of all of them. Ray's proxy holds the connections: the limits on slow clients are Ray's, those on bodies,
prompts and times are ours. All processes are of one machine: accounts and library are SQLite files. Docs: docs/serving.md.
"""

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch

from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import MissingExtraError, UnavailableError, UsageError
from retro_engine.library.documents import Chunker, HashEmbedder
from retro_engine.library.importer import Importer, Job
from retro_engine.library.library import DEFAULT, Library
from retro_engine.library.search import check_mode
from retro_engine.model.weights import read_config
from retro_engine.serve.accounts import Accounts
from retro_engine.serve.app import make_app
from retro_engine.serve.bounds import Limits
from retro_engine.serve.service import (
    Service,
    ServiceOptions,
    library_folder,
    made_chunk_size,
    open_library,
    open_service,
    reads_documents,
)
from retro_engine.serve.start import Address, make_state
from retro_engine.train import checkpoint

FORWARDED = (
    "add",
    "delete",
    "get",
    "entries",
    "statistics",
    "reset",
    "find",
    "metadata",
    "why_nothing",
    "unknown_fields",
)  # methods of a library
CALLS = (*FORWARDED, "job", "start", "version", "settings")
ANSWER_S = 60.0  # that a replica waits for the Shelf
SHELF, SERVER = "Shelf", "Server"  # names of the deployments
WAITING = 256  # requests that Ray gives one replica at once: the engine's own queue answers 429 before


class Shelf:
    """The deployment that has the library open."""

    def __init__(self, options: ServiceOptions):
        folder = checkpoint.find_checkpoint(options.run)
        config, place = read_config(folder), library_folder(options, folder)
        known = None if config.retrieval else made_chunk_size(place)  # a plain decoder reads chunks of any
        self.library = open_library(
            place, Tokenizer.load(folder), known or config.chunk_size, embedder=options.embedder
        )
        self.importer = Importer(self.library)
        self.importer.recover()

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
        self._asks, self._known_version, self._versions = ask, 0, threading.Lock()
        folder, tokenizer_json, chunk_size, stride, embedder, width = self.ask("settings")
        self.folder = Path(folder)
        tokenizer = Tokenizer(tokenizer_json)
        known = HashEmbedder(tokenizer) if embedder == HashEmbedder.name else None
        self.chunker = Chunker(tokenizer, chunk_size, stride, known, width)
        self.file = SimpleNamespace(tokenizer=tokenizer, chunk_size=chunk_size, stride=stride)  # type: ignore[assignment]

    def ask(self, name: str, *arguments: Any, **named: Any) -> Any:
        """What the Shelf answers; its errors are raised here."""
        version, answer = self._asks(name, *arguments, **named)
        with self._versions:  # answers come in any order
            self._known_version = max(self._known_version, version)
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


for _name in FORWARDED:
    setattr(SharedLibrary, _name, _asks(_name))


def build(settings: dict[str, str]) -> Any:
    """The Ray Serve application: run=RUN and accounts=FILE, and if wanted replicas=N, cpus=N of each, allow_host=NAME,
    metrics_token=TOKEN and of `retro serve` library, mode, name, dtype, reading, neighbor_bytes, max_batch and max_waiting.

    Raises MissingExtraError without Ray Serve, UsageError for what cannot be set or while nobody has access.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise MissingExtraError(
            "Ray Serve is not installed", str(error), "pip install 'retro-engine[replicas]'"
        ) from error
    known = {field.name for field in fields(ServiceOptions)} - {
        "stores",
        "encodings",
        "weights",
        "shares_prefixes",
        "aliases",
    }
    others = {"accounts", "replicas", "cpus", "allow_host", "metrics_token"}
    if wrong := sorted(settings.keys() - known - others):
        raise UsageError(
            f"{', '.join(wrong)} cannot be set", f"known: {', '.join(sorted(known | others))}", "leave it out"
        )
    if not settings.get("run") or not settings.get("accounts"):
        raise UsageError("run or accounts is not set", "a replica needs both", "run=RUN accounts=FILE")
    given: dict[str, Any] = {key: value for key, value in settings.items() if key in known}
    given |= {key: _number(settings, key, 1) for key in ("max_batch", "max_waiting") if key in settings}
    if "neighbor_bytes" in settings:
        given["neighbor_bytes"] = _number(settings, "neighbor_bytes", 0, least=0)
    given |= {key: str(Path(given[key]).resolve()) for key in ("run", "library") if key in given}  # Ray works elsewhere
    options = ServiceOptions(**given)
    check_mode(options.mode, (1.0, 1.0))
    accounts = Path(settings["accounts"]).resolve()
    if Accounts(accounts).is_empty:
        raise UsageError("nobody has access yet", str(accounts), "retro users add NAME, or retro keys add NAME")
    replicas = _number(settings, "replicas", 2)
    cpus = _number(settings, "cpus", max(1, (os.cpu_count() or 1) // replicas))
    hosts = [settings["allow_host"]] if "allow_host" in settings else []
    folder = checkpoint.find_checkpoint(options.run)
    has_library = reads_documents(options, folder, read_config(folder))

    def app() -> Any:
        # to the application Ray's proxy is every client: a token opens the metrics, not an address
        address = Address(is_behind_proxy=True, metrics_token=settings.get("metrics_token"))
        state = make_state(Accounts(accounts), Limits(), address)
        return make_app(state, partial(_open, options, has_library, cpus), hosts, stop=_failed)

    server = serve.deployment(serve.ingress(app)(_Server), name=SERVER).options(
        num_replicas=replicas, max_ongoing_requests=WAITING, ray_actor_options={"num_cpus": cpus}
    )
    if not has_library:
        return server.bind(None)
    shelf = serve.deployment(Shelf, name=SHELF).options(
        max_ongoing_requests=WAITING,
        ray_actor_options={"num_cpus": 0},
        logging_config={"enable_access_log": False},
    )
    return server.bind(shelf.bind(options))


def _number(settings: dict[str, str], name: str, default: int, least: int = 1) -> int:
    text = settings.get(name, str(default))
    if not text.isascii() or not text.isdigit() or not least <= int(text) < 1 << 40:
        raise UsageError(f"{name}={text} cannot be used", f"a number from {least} on")
    return int(text)


_FAILURES: list[BaseException] = []  # of this replica's start


def _failed(error: BaseException) -> None:
    """Apart from `build`: what that hands to Ray is copied, and this list must be the one that `_Server` looks at."""
    logging.getLogger("retro").error("the model cannot be served", exc_info=error)
    _FAILURES.append(error)


class _Server:
    """A replica; its application opens the model. One that cannot is unhealthy, and Ray starts another."""

    def __init__(self, shelf: Any):
        self.shelf = shelf

    def check_health(self) -> None:
        if _FAILURES:
            raise _FAILURES[0]


def _open(options: ServiceOptions, has_library: bool, threads: int) -> Service:
    torch.set_num_threads(threads)
    if not has_library:
        return open_service(options)
    from ray import exceptions, serve
    from ray.serve.exceptions import RayServeException

    shelf = serve.get_deployment_handle(SHELF, serve.get_replica_context().app_name)

    def ask(name: str, *arguments: Any, **named: Any) -> Any:
        try:
            return shelf.call.remote(name, *arguments, **named).result(timeout_s=ANSWER_S)
        except exceptions.RayTaskError:  # a bug over there
            raise
        except (exceptions.RayError, RayServeException, TimeoutError) as error:
            why = f"its process does not answer ({type(error).__name__}); Ray starts another, which loses nothing"
            raise UnavailableError("the library cannot be asked", why) from error

    library = SharedLibrary(ask)
    return open_service(options, (library, SharedImporter(library)))
