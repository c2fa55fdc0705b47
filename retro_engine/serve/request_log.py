"""A line for every request (`--log`), and the id that it has in its answer and in every line about it.

A line says who asked for which route, with what status, how long it took and how many tokens there were; never a prompt, an
answer, a document or a path that somebody wrote. It goes to standard error, text or JSON.
"""

import json
import logging
import re
import secrets
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from retro_engine.errors import UsageError

HEADER = "x-request-id"
SANE = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")  # nothing that could end a line or a field of a log
LogMode = Literal["none", "text", "json"]
current_id: ContextVar[str] = ContextVar("request_id", default="")


def request_id(sent: str | None) -> str:
    """The id that a client sent, where it can be written anywhere, else a new one."""
    return sent if sent is not None and SANE.fullmatch(sent) else f"req_{secrets.token_hex(12)}"


class RequestLog:
    """Writes the lines."""

    def __init__(self, mode: LogMode = "none"):
        """Raises UsageError for a mode that is none."""
        if mode not in get_args(LogMode):
            raise UsageError(f"--log {mode!r} cannot be used", "", f"one of {', '.join(get_args(LogMode))}")
        self.mode = mode

    def write(self, about: Mapping[str, Any]) -> None:
        """`about`: id, method, route, status, seconds, caller, client, and tokens where there were some."""
        if self.mode == "none":
            return
        row = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **about}
        if self.mode == "json":
            line = json.dumps({"event": "request", **row})
        else:
            line = " ".join(f"{name}={value}" for name, value in row.items() if value is not None)
        print(line, file=sys.stderr, flush=True)


def log_failure(what: str, error: BaseException | None = None) -> None:
    """A bug with the id of the request that met it, and the trace of `error`."""
    logging.getLogger("retro").error("request %s: %s", current_id.get() or "unknown", what, exc_info=error)
