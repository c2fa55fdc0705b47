"""The HTTP server: uvicorn, with a connection that slow, idle and vanished clients cannot hold.

uvicorn by itself waits for ever for the rest of a request's headers, and for a client that does not read its answer;
hypercorn's read_timeout ends both, and with them every answer that takes longer (docs/decisions.md).
"""

import asyncio
import socket
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from retro_engine.errors import UsageError
from retro_engine.serve.limits import Limits

BACKLOG = 512


class Connection(H11Protocol):
    """A connection that is cut when headers do not end, when an answer is not read, and when closing takes long."""

    limits = Limits()  # replaced by a subclass of each server
    _cut: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._cut_in(self.limits.header_s)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.flow.write_paused or self.transport.is_closing():
            return
        if self.conn.their_state is h11.IDLE:  # inside the headers of a request
            if self._cut is None:
                self._cut_in(self.limits.header_s)
        elif self.cycle is not None and not self.cycle.response_complete:
            self._keep()  # from here on the application's own limits hold

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


def make_server(app: Any, limits: Limits, is_behind_proxy: bool) -> uvicorn.Server:
    """`is_behind_proxy`: a proxy on this machine says who the client is (X-Forwarded-For and -Proto)."""
    connection = type("LimitedConnection", (Connection,), {"limits": limits})
    config = uvicorn.Config(
        app,
        http=connection,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=is_behind_proxy,
        backlog=BACKLOG,
        limit_concurrency=limits.connections,
        timeout_keep_alive=max(1, round(limits.idle_s)),
        timeout_graceful_shutdown=max(1, round(limits.shutdown_s)),
        h11_max_incomplete_event_size=limits.header_bytes,
    )
    return uvicorn.Server(config)
