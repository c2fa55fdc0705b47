"""The application: its routes with the scope that each takes, the gate before them, errors in OpenAI's form."""

import asyncio
import contextlib
import hmac
import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from retro_engine.errors import RetroError, typed
from retro_engine.library.library import Library
from retro_engine.serve import (
    access,
    ask,
    documents,
    explain,
    messages,
    native,
    nemo,
    openai,
    props,
    rerank,
    responses,
    schema,
    sign_in,
    tokens,
    uploads,
    vector_stores,
)
from retro_engine.serve.api_error import ApiError, ClientLeft, api_error
from retro_engine.serve.gate import Gate
from retro_engine.serve.metrics import Metrics
from retro_engine.serve.rehearsal import Rehearsal
from retro_engine.serve.request_context import ServerState, client_of, state_of
from retro_engine.serve.service import Service

WEB = Path(__file__).parent / "web"
FILES = {  # of the page; gate.PUBLIC names them too
    "/": ("index.html", "text/html; charset=utf-8"),
    "/app.css": ("app.css", "text/css; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/ask.js": ("ask.js", "text/javascript; charset=utf-8"),
    "/api.js": ("api.js", "text/javascript; charset=utf-8"),
    "/chat.js": ("chat.js", "text/javascript; charset=utf-8"),
    "/status.js": ("status.js", "text/javascript; charset=utf-8"),
    "/playground.js": ("playground.js", "text/javascript; charset=utf-8"),
    "/library.js": ("library.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
Endpoint = Callable[[Request], Awaitable[Response]]


async def describe(request: Request) -> Response:
    """What every route takes, as an OpenAPI document."""
    known = {route.path for route in request.app.routes}
    return JSONResponse(schema.describe([route for route in [*ROUTES, *NEMO_ROUTES] if route[1] in known]))


ROUTES: list[tuple[str, str, Endpoint, str]] = [  # method, path, endpoint, the scope it takes
    ("GET", "/v1/models", openai.models, "read"),
    ("GET", "/v1/models/{id:path}", openai.model, "read"),
    ("POST", "/v1/completions", openai.completions, "read"),
    ("POST", "/completion", native.complete, "read"),
    ("POST", "/v1/chat/completions", openai.chat_completions, "read"),
    ("POST", "/v1/responses", responses.create_response, "read"),
    ("GET", "/v1/responses/{id:path}", responses.get_response, "read"),
    ("DELETE", "/v1/responses/{id:path}", responses.delete_response, "read"),
    ("POST", "/v1/messages", messages.create_message, "read"),
    ("POST", "/v1/messages/count_tokens", messages.count_message_tokens, "read"),
    ("POST", "/v1/embeddings", tokens.embeddings, "read"),
    ("POST", "/v1/rerank", rerank.rerank, "read"),
    ("POST", "/rerank", rerank.rerank, "read"),
    ("GET", "/props", props.props, "read"),
    ("POST", "/tokenize", tokens.tokenize, "read"),
    ("POST", "/detokenize", tokens.detokenize, "read"),
    ("POST", "/v1/retrieve", documents.retrieve, "read"),
    ("POST", "/v1/explain", explain.explain, "read"),
    ("POST", "/v1/ask", ask.ask, "read"),
    ("GET", "/v1/documents", documents.list_documents, "read"),
    ("POST", "/v1/documents", documents.add_documents, "write"),
    ("POST", "/v1/documents/import", documents.import_documents, "write"),
    ("POST", "/v1/documents/reset", documents.reset, "admin"),
    ("GET", "/v1/documents/{id:path}", documents.get_document, "read"),
    ("DELETE", "/v1/documents/{id:path}", documents.delete_document, "write"),
    ("GET", "/v1/jobs/{id:int}", documents.get_job, "write"),
    ("GET", "/v1/files", uploads.list_files, "read"),
    ("POST", "/v1/files", uploads.upload, "write"),
    ("GET", "/v1/files/{file:str}", uploads.get_file, "read"),
    ("GET", "/v1/files/{file:str}/content", uploads.file_content, "read"),
    ("DELETE", "/v1/files/{file:str}", uploads.delete_file, "write"),
    ("GET", "/v1/vector_stores", vector_stores.list_stores, "read"),
    ("POST", "/v1/vector_stores", vector_stores.create_store, "write"),
    ("GET", "/v1/vector_stores/{store:str}", vector_stores.get_store, "read"),
    ("DELETE", "/v1/vector_stores/{store:str}", vector_stores.delete_store, "write"),
    ("POST", "/v1/vector_stores/{store:str}/search", vector_stores.search_store, "read"),
    ("GET", "/v1/vector_stores/{store:str}/files", vector_stores.list_store_files, "read"),
    ("POST", "/v1/vector_stores/{store:str}/files", vector_stores.add_file, "write"),
    ("GET", "/v1/vector_stores/{store:str}/files/{file:str}", vector_stores.get_store_file, "read"),
    ("POST", "/v1/vector_stores/{store:str}/files/{file:str}", vector_stores.set_attributes, "write"),
    ("DELETE", "/v1/vector_stores/{store:str}/files/{file:str}", vector_stores.delete_store_file, "write"),
    ("GET", "/auth/users", access.list_users, "admin"),
    ("POST", "/auth/users", access.add_user, "admin"),
    ("POST", "/auth/users/{name:str}", access.change_user, "admin"),
    ("DELETE", "/auth/users/{name:str}", access.remove_user, "admin"),
    ("GET", "/auth/keys", access.list_keys, "admin"),
    ("POST", "/auth/keys", access.add_key, "admin"),
    ("DELETE", "/auth/keys/{key:str}", access.remove_key, "admin"),
    ("GET", "/openapi.json", describe, "read"),
]
NEMO_ROUTES: list[tuple[str, str, Endpoint, str]] = [
    ("PUT", "/generate", nemo.generate, "read"),
    ("PUT", "/knn", nemo.knn, "read"),  # adding takes write, reset takes admin: nemo.py asks again
]


async def health(request: Request) -> Response:
    state = state_of(request)
    if state.service is not None:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": "loading", "why": state.awaited}, 503, {"retry-after": "2"})


async def metrics(request: Request) -> Response:
    """For a client on this machine that no proxy stands for, or one that knows the token."""
    state = state_of(request)
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    is_known = state.metrics_token is not None and hmac.compare_digest(token.encode(), state.metrics_token.encode())
    if not (is_known and kind.lower() == "bearer") and (state.is_behind_proxy or not is_loopback(client_of(request))):
        raise ApiError(401, "metrics take their own token", headers={"www-authenticate": "Bearer"})
    return Response(state.metrics.text(), media_type="text/plain; version=0.0.4")


def is_loopback(host: str) -> bool:
    """Whether a name or an address is of this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def page_file(name: str, kind: str) -> Endpoint:
    """A file of the page, read once."""
    raw = (WEB / name).read_bytes()

    async def answer(request: Request) -> Response:
        return Response(raw, media_type=kind, headers={"cache-control": "no-cache"})

    return answer


def make_app(
    state: ServerState,
    load: Callable[[], Service],
    hosts: Sequence[str] = (),
    has_nemo: bool = False,
    stop: Callable[[BaseException], None] | None = None,
    settle: Callable[[], None] = lambda: None,
    ready: Callable[[Service], None] = lambda service: None,
) -> Gate:
    """`load` opens the service in a thread once the server listens; when it fails, `stop` is told why. `settle` is called when
    it is warm too, and `ready` once requests are answered.
    """
    guarded = [*ROUTES, *(NEMO_ROUTES if has_nemo else [])]
    routes = [Route(path, page_file(*file), methods=["GET"]) for path, file in FILES.items()]
    routes += [
        Route("/health", health, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/auth/login", sign_in.login, methods=["POST"]),
        Route("/auth/logout", sign_in.logout, methods=["POST"]),
        Route("/auth/me", sign_in.me, methods=["GET"]),
    ]
    routes += [Route(path, endpoint, methods=[method]) for method, path, endpoint, _ in guarded]

    handlers = {RetroError: _retro_error, OSError: _os_error, HTTPException: _http_error, ApiError: _api_error}

    scopes = {(method, path): scope for method, path, _, scope in guarded}
    rehearsal = Rehearsal(state, routes, scopes, handlers)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        loading = asyncio.create_task(_load(state, load, stop, settle, ready, rehearsal.run))
        try:
            yield
        finally:
            state.is_closing = True
            await loading
            service, state.service = state.service, None
            if service is not None:
                await asyncio.to_thread(service.close)

    more = {ClientLeft: _client_left, 500: _bug}
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={**handlers, **more})
    app.router.redirect_slashes = False
    app.state.retro = state
    return Gate(
        app,
        routes,
        scopes,
        hosts=hosts,
        accounts=state.accounts,
        limits=state.limits,
        metrics=state.metrics,
        origins=state.origins,
        root_path=state.root_path,
        log=state.log,
    )


async def _load(
    state: ServerState,
    load: Callable[[], Service],
    stop: Callable[[BaseException], None] | None,
    settle: Callable[[], None],
    ready: Callable[[Service], None],
    warm: Callable[[Service, Callable[[], None]], Awaitable[None]],
) -> None:
    """Open the service, and `warm` it with `settle`, unless the server ends meanwhile; then it is there for everybody."""
    service = None
    try:
        service = await asyncio.to_thread(load)
        if not state.is_closing:
            state.awaited = "the model is warming up: it generates its first tokens, so that no request waits for that"
            await warm(service, settle)
    except Exception as error:  # a bug too: else the server would say "loading" for ever
        if service is not None:
            await asyncio.to_thread(service.close)
        if stop is None:
            raise
        stop(error)
        return
    _watch(state.metrics, service)
    state.service = service
    if not state.is_closing:
        await asyncio.to_thread(ready, service)


def _watch(metrics: Metrics, service: Service) -> None:
    """What is read of a loaded service when somebody asks."""
    stats = service.engine.stats
    metrics.name_model(service.name)
    metrics.watch("retro_engine_running", "Sequences being generated", lambda: stats()["running"])
    metrics.watch("retro_engine_waiting", "Requests in the queue", lambda: stats()["waiting"])
    metrics.watch("retro_neighbors_kept", "Neighbors read from what is kept", lambda: stats()["neighbors_kept"])
    metrics.watch("retro_neighbors_encoded", "Neighbors encoded", lambda: stats()["neighbors_encoded"])
    metrics.watch("retro_neighbor_bytes", "Of encoded neighbors that are kept", lambda: stats()["neighbor_bytes"])
    metrics.watch(
        "retro_beside_engine_waiting", "Work beside the engine that waits", lambda: service.work.stats()["waiting"]
    )
    metrics.watch("retro_index_version", "Changes of the documents", lambda: service.index_version)
    metrics.watch_model("num_requests_running", "Sequences being generated", lambda: stats()["running"])
    metrics.watch_model("num_requests_waiting", "Requests in the queue", lambda: stats()["waiting"])
    asked, found = "Tokens of prompts that were looked up", "Tokens of prompts that were remembered"
    metrics.watch_count("vllm:prefix_cache_queries", asked, lambda: stats()["prefix_tokens_asked"])
    metrics.watch_count("vllm:prefix_cache_hits", found, lambda: stats()["prefix_tokens_reused"])
    asked, found = "Neighbors that were read", "Neighbors that were encoded before"
    metrics.watch_count(
        "retro_neighbor_cache_queries", asked, lambda: stats()["neighbors_kept"] + stats()["neighbors_encoded"]
    )
    metrics.watch_count("retro_neighbor_cache_hits", found, lambda: stats()["neighbors_kept"])
    if (beside := service.generator.beside) is not None:
        metrics.watch("retro_memory_tokens", "Of the memory beside the model", lambda: beside.memory.num_tokens)
        metrics.watch_count("retro_memory_lookups", "Tokens that it was asked about", lambda: beside.lookups)
    library = service.library
    if type(library) is Library:  # that of replicas is merged elsewhere
        metrics.watch("retro_library_merging", "0: its merging thread died", lambda: library.is_merging)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response(request.url.path)


async def _client_left(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # for the counts: nobody reads it


async def _retro_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RetroError)
    return api_error(error).response(request.url.path)


async def _os_error(request: Request, error: Exception) -> Response:
    known = typed(error)
    if known is None:
        raise error
    return api_error(known).response(request.url.path)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "route_not_found", 405: "method_not_allowed"}.get(error.status_code)
    return ApiError(error.status_code, str(error.detail), code=code, headers=dict(error.headers or {})).response()


async def _bug(request: Request, error: Exception) -> Response:
    return ApiError(500, "this is a bug in retro-engine; the server's log has its trace").response()
