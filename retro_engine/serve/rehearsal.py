"""The first requests of a server: it asks itself before it says that it is ready, over a connection, through the gate and by the
routes that clients ask, so that what is done once (schemas, templates, threads, code that runs for the first time) is done when
one of them does. The last of them come after everything else that a start does: what looks through all memory, as the
garbage collector does, leaves a processor's caches with nothing of what an answer takes.
"""

import asyncio
import json
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import ExceptionHandler

from retro_engine.serve.accounts import Accounts, Caller
from retro_engine.serve.connection import private_connections
from retro_engine.serve.gate import Gate
from retro_engine.serve.kept import KeptAnswers
from retro_engine.serve.metrics import Metrics
from retro_engine.serve.request_context import ServerState
from retro_engine.serve.service import WARM_TOKENS, Service
from retro_engine.serve.tracing import Tracing

ROUNDS, ENOUGH_S = 10, 0.3  # Python makes what has run some times faster
BRIEF_S = 2.0  # that the first round takes at most where one more is worth its time
CALLER = Caller("rehearsal", "read", "key")
Connect = Callable[[], Awaitable[socket.socket]]


class KnownCaller(Accounts):
    """Whoever asks is known, once the file has been asked as for anybody."""

    def __init__(self, accounts: Accounts):
        self._asked = accounts

    def of_key(self, key: str) -> Caller | None:
        self._asked.of_key(key)
        return CALLER


class Rehearsal:
    """Of one server: how its own requests get to the routes that clients ask."""

    def __init__(
        self,
        state: ServerState,
        routes: Sequence[Route],
        scopes: dict[tuple[str, str], str],
        handlers: Mapping[Any, ExceptionHandler],
    ):
        self.state, self.routes, self.scopes, self.handlers = state, routes, scopes, handlers

    async def run(self, service: Service, settle: Callable[[], None]) -> None:
        """Ask, call `settle`, and where answers take little, ask again. Ends early once the server closes."""
        await asyncio.to_thread(service.warm_up)
        took_s = await self.ask(service, 1)
        await asyncio.to_thread(service.forget)
        if self.state.is_closing:
            return
        await asyncio.to_thread(settle)
        if took_s < BRIEF_S:
            await self.ask(service, ROUNDS)
            await asyncio.to_thread(service.engine.forget)

    async def ask(self, service: Service, rounds: int) -> float:
        """Seconds that it took. Nothing is logged, or counted of what is not the engine's. What is refused (a prompt that has no
        room, a template that takes no such chat) is refused to clients too.
        """
        begin = time.monotonic()
        async with private_connections(self._app(service), self.state.limits) as connect:
            for number in range(rounds):
                for path, body in asked_of(service, number):
                    if self.state.is_closing:
                        return time.monotonic() - begin
                    await _ask(connect, path, json.dumps(body).encode())
                if time.monotonic() - begin > ENOUGH_S:
                    break
        return time.monotonic() - begin

    def _app(self, service: Service) -> Gate:
        metrics = Metrics()
        metrics.name_model(service.name)
        app = Starlette(routes=self.routes, exception_handlers=self.handlers)
        app.state.retro = replace(self.state, service=service, metrics=metrics, kept=KeptAnswers(), tracing=Tracing())
        accounts = KnownCaller(self.state.accounts)
        return Gate(app, self.routes, self.scopes, accounts, self.state.limits, hosts=[], metrics=metrics)


def asked_of(service: Service, number: int) -> list[tuple[str, dict[str, Any]]]:
    """Paths and bodies: one for each way in which the model answers; `number` makes them others than those before."""
    text, tokens = f"{number} {service.known_words()}", 2 * WARM_TOKENS
    chat = {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "stream": True, "temperature": 0}
    if service.reader is not None:
        return [("/v1/chat/completions", chat), ("/v1/ask", {"question": text})]
    more = {} if service.source is not None else service.given(text)
    plain = {"prompt": text, "max_tokens": tokens, "stream": True, "temperature": 0, **more}
    return [("/v1/chat/completions", {**chat, **more}), ("/v1/completions", plain)]


async def _ask(connect: Connect, path: str, raw: bytes) -> None:
    """One request, with a connection of its own, to the end of its answer, which nobody reads."""
    reader, writer = await asyncio.open_connection(sock=await connect())
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer rehearsal\r\nconnection: close\r\n"
    writer.write(f"{head}content-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n".encode() + raw)
    try:
        while await reader.read(1 << 16):
            pass
    finally:
        writer.close()
