"""The HTTP server: uvicorn, with a connection that slow, idle and vanished clients cannot hold.

uvicorn by itself waits for ever for the rest of a request's headers, and for a client that does not read its answer;
hypercorn's read_timeout ends both, and with them every answer that takes longer (docs/decisions.md). Its parser, h11,
limits only headers that have not ended, and forgives what proxies read in another way: `check_head` does neither.
"""

import asyncio
import contextlib
import http
import json
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from retro_engine.errors import UsageError
from retro_engine.serve.api_error import ApiError
from retro_engine.serve.bounds import Limits
from retro_engine.serve.request_log import HEADER, request_id

BACKLOG = 512
ENDING_S = 5.0  # that answers which are ended have to be sent
REFUSED_S = 1.0  # that a refused client has to read why, before the connection ends
END = re.compile(rb"\r?\n\r?\n")
LONE_CR = re.compile(rb"\r(?!\n)")
FOLDED = re.compile(rb"\n[ \t]")


def check_head(raw: bytes, limits: Limits) -> None:
    """Raises h11.RemoteProtocolError with its status for a request line and headers, as far as they have come, that are
    too large, or that others on the way could read differently.
    """
    end = END.search(raw)
    head = raw if end is None else raw[: end.start()]
    line_end = head.find(b"\n")
    if (len(head) if line_end < 0 else line_end) > limits.path_bytes:
        raise h11.RemoteProtocolError(f"the path has more than {limits.path_bytes:,} bytes", 414)
    if len(head) > limits.header_bytes:
        raise h11.RemoteProtocolError(f"the headers have more than {limits.header_bytes:,} bytes", 431)
    if end is None:
        return
    if LONE_CR.search(head) or FOLDED.search(head):
        raise h11.RemoteProtocolError("a header goes on in another line")
    fields = [line.partition(b":") for line in head.split(b"\n")[1:]]
    named = [(name.strip().lower(), value) for name, _, value in fields]
    lengths = [value for name, value in named if name == b"content-length"]
    codings = [value for name, value in named if name == b"transfer-encoding"]
    if len(lengths) + len(codings) > 1 or any(b"," in value for value in lengths):
        raise h11.RemoteProtocolError("the length of the body is said more than once")


class Heads(h11.Connection):
    """A parser that looks at each request's head first."""

    def __init__(self, limits: Limits):
        super().__init__(h11.SERVER, limits.header_bytes + 2)
        self.limits = limits
        self.refusal: h11.RemoteProtocolError | None = None

    def next_event(self) -> Any:
        try:
            if self.their_state is h11.IDLE:
                check_head(self.trailing_data[0], self.limits)
            return super().next_event()
        except h11.RemoteProtocolError as error:
            self.refusal = error
            raise


class Connection(H11Protocol):
    """A connection that is cut when headers do not end, when an answer is not read, and when closing takes long."""

    limits = Limits()  # replaced by a subclass of each server
    _cut: asyncio.TimerHandle | None = None
    _is_refused = False
    conn: "Heads"

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self.conn = Heads(self.limits)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._cut_in(self.limits.header_s)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        super().data_received(data)
        if self._is_refused:
            return
        if self.flow.write_paused or self.transport.is_closing():
            return
        if self.conn.their_state is h11.IDLE:  # inside the headers of a request
            if self._cut is None:
                self._cut_in(self.limits.header_s)
        elif self.cycle is not None and not self.cycle.response_complete:
            self._keep()  # from here on the application's own limits hold

    def send_400_response(self, msg: str) -> None:
        """What is wrong and with which status, as an error of the API; then the client has a moment to read it."""
        self._is_refused = True
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer has begun
            self.transport.close()
            return
        refusal = self.conn.refusal or h11.RemoteProtocolError(msg)
        status = refusal.error_status_hint if refusal.error_status_hint in (414, 431) else 400
        body = json.dumps(ApiError(status, f"this is not a request: {str(refusal)[:200]}").body()).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        headers.append((HEADER, request_id(None)))
        reason = http.HTTPStatus(status).phrase.encode()
        answer = h11.Response(status_code=status, headers=headers, reason=reason)
        for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.write_eof()
        self._cut_in(REFUSED_S)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._cut_in(self.limits.progress_s)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._keep()
        if self.conn.their_state is h11.IDLE:
            self._cut_in(self.limits.header_s)

    def on_response_complete(self) -> None:
        is_unread = self.conn.their_state is h11.SEND_BODY  # answered before its body had come
        super().on_response_complete()
        if is_unread or self.transport.is_closing():
            self._cut_in(self.limits.progress_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._keep()
        super().connection_lost(exc)

    def _cut_in(self, seconds: float) -> None:
        self._keep()
        self._cut = self.loop.call_later(seconds, self.transport.abort)

    def _keep(self) -> None:
        if self._cut is not None:
            self._cut.cancel()
            self._cut = None


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises UsageError where there is none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off (40 ms an answer) only where the protocol is named
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        why = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{host}:{port} cannot be listened on", why, "--host and --port name another") from error
    return listener


class Server(uvicorn.Server):
    """A server that says what it waits for when it is told to stop, and ends what takes longer as an answer ends."""

    def __init__(self, config: uvicorn.Config, wait_s: float, end: Callable[[], None], say: Callable[[str], None]):
        """`end` ends the requests that run, within a moment; it may be called more than once."""
        super().__init__(config)
        self.wait_s, self._end, self._say = wait_s, end, say
        self._told_again = asyncio.Event()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A second signal ends what runs, a third the process."""
        self._captured_signals.append(sig)
        if self._told_again.is_set():
            self.force_exit = True
        elif self.should_exit:
            self._told_again.set()
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._end_late())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_late(self) -> None:
        running = len(self.server_state.tasks)
        if running:
            answers = "an answer" if running == 1 else f"{running} answers"
            self._say(f"stopping: waiting for {answers}, {self.wait_s:g} s at most; Ctrl-C again ends them")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._told_again.wait(), self.wait_s)
        if running:
            self._say("stopping: what still runs ends now")
        await asyncio.to_thread(self._end)


def make_config(app: Any, limits: Limits, is_behind_proxy: bool = False, has_lifespan: bool = True) -> uvicorn.Config:
    """`is_behind_proxy`: a proxy on this machine says who the client is (X-Forwarded-For and -Proto)."""
    connection = type("LimitedConnection", (Connection,), {"limits": limits})
    return uvicorn.Config(
        app,
        http=connection,
        ws="none",
        lifespan="on" if has_lifespan else "off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=is_behind_proxy,
        backlog=BACKLOG,
        limit_concurrency=limits.connections,
        timeout_keep_alive=max(1, round(limits.idle_s)),
        timeout_graceful_shutdown=max(1, round(limits.shutdown_s + ENDING_S)),
        h11_max_incomplete_event_size=limits.header_bytes,
    )


def make_server(
    app: Any,
    limits: Limits,
    is_behind_proxy: bool,
    end: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda line: None,
) -> Server:
    """`is_behind_proxy`: of `make_config`; `end` and `say`: of `Server`."""
    return Server(make_config(app, limits, is_behind_proxy), limits.shutdown_s, end, say)


@contextlib.asynccontextmanager
async def private_connections(app: Any, limits: Limits) -> AsyncIterator[Callable[[], Awaitable[socket.socket]]]:
    """Connects to an app in this event loop, as a server has connections, over sockets that no other process can reach."""
    config, state = make_config(app, limits, has_lifespan=False), ServerState()
    config.load()
    loop = asyncio.get_running_loop()
    protocol: Any = config.http_protocol_class
    make = partial(protocol, config=config, server_state=state, app_state={}, _loop=loop)

    async def connect() -> socket.socket:
        mine, served = socket.socketpair()
        mine.setblocking(False)
        await loop.connect_accepted_socket(make, served)
        return mine

    try:
        yield connect
    finally:
        for connection in list(state.connections):
            connection.shutdown()
