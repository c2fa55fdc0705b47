"""`retro serve`: checks that nothing is open that should not be, listens, loads, answers until a signal."""

import gc
import logging
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from retro_engine.errors import UsageError, typed
from retro_engine.model.device import describe_device
from retro_engine.model.memory import share_one_heap
from retro_engine.progress import Reporter
from retro_engine.serve.accounts import Accounts
from retro_engine.serve.app import is_loopback, make_app
from retro_engine.serve.bounds import Limits, Throttle
from retro_engine.serve.connection import bind, make_server
from retro_engine.serve.metrics import Metrics
from retro_engine.serve.origins import check_origins, check_root_path
from retro_engine.serve.request_context import ServerState
from retro_engine.serve.request_log import LogMode, RequestLog
from retro_engine.serve.service import Service, ServiceOptions, open_service
from retro_engine.serve.tracing import Tracing, otlp_processor

SIGN_INS, SIGN_IN_WINDOW_S = 10, 300.0  # failures of an address, or of a known device
NAME_SIGN_INS = 100  # failures for a name, from all addresses together: one alone cannot shut it


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a server is reached, and by whom it may be."""

    host: str = "127.0.0.1"
    port: int = 8000
    allowed_hosts: Sequence[str] = ()
    is_behind_proxy: bool = False
    metrics_token: str | None = None
    has_nemo: bool = False
    allowed_origins: Sequence[str] = ()
    root_path: str = ""  # that a proxy puts before every path
    log: LogMode = "none"  # of requests
    otlp: str | None = None  # where spans are sent; None: there are none


def serve_until_signal(options: ServiceOptions, address: Address, accounts: Accounts, reporter: Reporter, limits: Limits | None = None) -> None:  # fmt: skip
    """Listen until a signal. Raises UsageError for an address that others reach while nobody has access, and what
    opening the model raises.
    """
    if not is_loopback(address.host) and accounts.is_empty:
        raise UsageError(
            f"--host {address.host} is reached from elsewhere",
            "there are no users and no keys yet",
            "retro users add NAME, or retro keys add NAME",
        )
    share_one_heap()
    state = make_state(accounts, limits or Limits(), address)
    listener = bind(address.host, address.port)
    port = listener.getsockname()[1]
    shown = f"[{address.host}]" if ":" in address.host else address.host
    failures: list[BaseException] = []

    def stop(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    app = make_app(state, partial(open_service, options), hosts=[address.host, *address.allowed_hosts], has_nemo=address.has_nemo, stop=stop, settle=settle, ready=partial(_say_ready, reporter, f"http://{shown}:{port}"))  # fmt: skip
    server = make_server(app, state.limits, address.is_behind_proxy, state.end_requests, reporter.say)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # traces of bugs, not every odd request
    reporter.say(f"listening on http://{shown}:{port}")
    reporter.say("opening the model: what is asked before it is ready gets 503")
    if (token := accounts.begin_setup()) is not None:
        reporter.say(f"nobody has access yet; make the first user, once, at http://{shown}:{port}/#setup={token}")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored
    server.run([listener])
    accounts.close()
    state.tracing.close()
    if failures:
        raise typed(failures[0]) or failures[0]


def make_state(accounts: Accounts, limits: Limits, address: Address) -> ServerState:
    return ServerState(
        accounts=accounts,
        limits=limits,
        metrics=Metrics(),
        throttle=Throttle(SIGN_INS, SIGN_IN_WINDOW_S),
        names=Throttle(NAME_SIGN_INS, SIGN_IN_WINDOW_S),
        metrics_token=address.metrics_token,
        is_behind_proxy=address.is_behind_proxy,
        origins=check_origins(address.allowed_origins),
        root_path=check_root_path(address.root_path),
        log=RequestLog(address.log),
        tracing=Tracing(None if address.otlp is None else otlp_processor(address.otlp)),
    )


def settle() -> None:
    """What is there when the server is ready stays there: the garbage collector need not look through it again (300,000 objects,
    a tenth of a second in which no stream gets a token).
    """
    gc.collect()
    gc.freeze()


def _say_ready(reporter: Reporter, address: str, service: Service) -> None:
    place = describe_device(service.generator.model.device)
    documents = "no documents" if service.library is None else service.library.folder
    beside = service.generator.beside
    memory = "" if beside is None else f", beside a memory of {beside.memory.num_tokens:,} tokens"
    reporter.say(f"ready: model {service.name} {place}, {documents}{memory}; open {address}")
