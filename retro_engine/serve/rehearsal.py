"""The first requests of a server: it asks itself before it says that it is ready, by the routes that clients ask, so that what is
done once (schemas, templates, threads, code that runs for the first time) is done when one of them does.
"""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import ExceptionHandler, Message, Scope

from retro_engine.serve.accounts import Caller
from retro_engine.serve.kept import KeptAnswers
from retro_engine.serve.metrics import Metrics
from retro_engine.serve.request_context import ServerState
from retro_engine.serve.service import WARM_TOKENS, Service
from retro_engine.serve.tracing import Tracing

ROUNDS, ENOUGH_S = 10, 0.3  # Python makes what has run some times faster; a model that takes long runs once
CALLER = Caller("rehearsal", "read", "key")


def rehearse(
    service: Service, state: ServerState, routes: Sequence[Route], handlers: Mapping[Any, ExceptionHandler]
) -> None:
    """Ask `service`, a double of the one that is served (`Service.rehearsing`), in this thread; nothing is counted, kept or
    logged. What is refused (a prompt that has no room, a template that takes no such chat) is refused to clients too.
    """
    app = Starlette(routes=routes, exception_handlers=handlers)
    metrics = Metrics()
    metrics.name_model(service.name)
    app.state.retro = replace(state, service=service, metrics=metrics, kept=KeptAnswers(), tracing=Tracing())
    service.token_bytes  # noqa: B018 (made when it is read first)
    asyncio.run(_ask_all(app, asked_of(service), state))


def asked_of(service: Service) -> list[tuple[str, dict[str, Any]]]:
    """Paths and bodies: one for each way in which the model answers."""
    text, tokens = service.known_words(), 2 * WARM_TOKENS
    chat = {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "stream": True, "temperature": 0}
    if service.reader is not None:
        return [("/v1/ask", {"question": text}), ("/v1/chat/completions", chat)]
    more = {} if service.source is not None else service.given(text)
    plain = {"prompt": text, "max_tokens": tokens, "stream": True, "temperature": 0, **more}
    return [("/v1/completions", plain), ("/v1/chat/completions", {**chat, **more})]


async def _ask_all(app: Starlette, asked: Sequence[tuple[str, dict[str, Any]]], state: ServerState) -> None:
    begin = time.monotonic()
    for _ in range(ROUNDS):
        for path, body in asked:
            if state.is_closing:
                return
            await _ask(app, path, json.dumps(body).encode())
        if time.monotonic() - begin > ENOUGH_S:
            return


async def _ask(app: Starlette, path: str, raw: bytes) -> None:
    """One request from its head to the end of its answer, which nobody reads."""
    headers = {b"host": b"localhost", b"content-type": b"application/json", b"content-length": str(len(raw)).encode()}
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": list(headers.items()),
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 0),
        "state": {"caller": CALLER, "request_id": "rehearsal", "root_path": ""},
    }
    parts: list[Message] = [{"type": "http.request", "body": raw, "more_body": False}]

    async def receive() -> Message:
        return parts.pop() if parts else await asyncio.Future()  # who asks does not leave

    async def send(message: Message) -> None:
        pass

    await app(scope, receive, send)
