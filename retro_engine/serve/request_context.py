"""What routes know of the server they run in."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request

from retro_engine.serve.accounts import Accounts, Caller
from retro_engine.serve.api_error import ApiError
from retro_engine.serve.bounds import Limits, Throttle
from retro_engine.serve.kept import KeptAnswers
from retro_engine.serve.metrics import Metrics
from retro_engine.serve.request_log import RequestLog
from retro_engine.serve.service import Service
from retro_engine.serve.tracing import Tracing

T = TypeVar("T")


@dataclass(kw_only=True)
class ServerState:
    """One server's; `service` is None until the model is loaded and warm."""

    accounts: Accounts
    limits: Limits
    metrics: Metrics
    throttle: Throttle  # of addresses, and of known devices
    names: Throttle  # of a name, from all addresses together
    metrics_token: str | None = None
    origins: frozenset[str] = frozenset()  # of other pages that may ask
    root_path: str = ""
    log: RequestLog = field(default_factory=RequestLog)
    tracing: Tracing = field(default_factory=Tracing)
    kept: KeptAnswers = field(default_factory=KeptAnswers)  # responses that may be gone on with
    is_behind_proxy: bool = False
    service: Service | None = None
    awaited: str = "the model is loading"  # what `service` waits for
    is_closing: bool = False
    hashing: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))  # passwords at once

    def end_requests(self) -> None:
        """End what the engine and the threads beside it are at: whoever waits is told that the server stops."""
        service = self.service
        if service is not None:
            service.engine.close()
            service.work.close()


def state_of(request: Request) -> ServerState:
    state = request.app.state.retro
    assert isinstance(state, ServerState)
    return state


def service_of(request: Request) -> Service:
    """Raises ApiError 503 until there is one."""
    service = state_of(request).service
    if service is None:
        raise ApiError(503, state_of(request).awaited, code="loading", headers={"retry-after": "2"})
    return service


def limits_of(request: Request) -> Limits:
    return state_of(request).limits


def caller_of(request: Request) -> Caller | None:
    found = request.scope["state"]["caller"]
    assert found is None or isinstance(found, Caller)
    return found


def caller_id(request: Request) -> str:
    """Whose share of the work a request takes."""
    caller = caller_of(request)
    return "nobody" if caller is None else caller.id


async def brief(request: Request, work: Callable[..., T], *arguments: Any) -> T:
    """`Work.brief` in the share of who asks."""
    return await service_of(request).work.brief(caller_id(request), work, *arguments)


async def write(request: Request, work: Callable[..., T], *arguments: Any) -> T:
    """`Work.write` in the share of who asks."""
    return await service_of(request).work.write(caller_id(request), work, *arguments)


async def long(request: Request, work: Callable[..., T], *arguments: Any) -> T:
    """`Work.long` in the share of who asks: `work(*arguments, check)`."""
    return await service_of(request).work.long(caller_id(request), request.receive, work, *arguments)


def client_of(request: Request) -> str:
    """The address that asks."""
    return request.client.host if request.client else "unknown"


def count_tokens(request: Request, prompt: int, completion: int) -> None:
    """What an answer took, for the metrics and the request's line in the log."""
    state_of(request).metrics.tokens(prompt, completion)
    request.scope["state"]["tokens"] = {"prompt_tokens": prompt, "completion_tokens": completion}


def audit(request: Request, action: str, **about: Any) -> None:
    caller = caller_of(request)
    state_of(request).accounts.audit(action, caller.name if caller else "", client_of(request), **about)
