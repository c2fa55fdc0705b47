"""The commands `retro serve`, `retro users` and `retro keys`. Every flag of serve also reads RETRO_SERVE_FLAG."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retro_engine.errors import MissingExtraError, UsageError
from retro_engine.train.__main__ import DEVICES

if TYPE_CHECKING:
    from retro_engine.progress import Reporter
    from retro_engine.serve.accounts import Accounts

Run = Callable[[argparse.Namespace], int]


def default_accounts() -> str:
    """Where users and keys are kept when nothing is said."""
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return os.environ.get("RETRO_SERVE_ACCOUNTS") or str(Path(state) / "retro-engine" / "accounts.sqlite")


def add_serve(sub: argparse.ArgumentParser) -> None:
    """The flags of `retro serve`."""

    def flag(name: str, default: Any = None, **about: Any) -> None:
        found: Any = os.environ.get(f"RETRO_SERVE_{name.upper().replace('-', '_')}")
        if found is not None and "nargs" in about:
            found = found.split()
            found = [about["type"](part) for part in found] if "type" in about else found
        elif found is not None and about.get("action") == "store_true":
            found = found.lower() in ("1", "true", "yes")
        sub.add_argument(f"--{name}", default=default if found is None else found, **about)

    sub.set_defaults(run=_serve)
    sub.add_argument("path", metavar="RUN", help="a run's folder or a checkpoint")
    flag("library", metavar="FOLDER", help="live documents (default RUN/library; made when it is not there)")
    flag("index", nargs="*", metavar="STORE", help="published stores to read as well (default: the run's; none: no store)")  # fmt: skip
    flag("mode", "lexical", metavar="MODE", help="of the library: lexical, dense or hybrid")
    flag("weights", [1.0, 1.0], nargs=2, type=float, metavar="W", help="of the library, and of the stores")
    flag("host", "127.0.0.1", help="address to listen on; others than this machine's own need users or keys")
    flag("port", 8000, type=int, help="0 takes a free one")
    flag("name", help="of the model (default: the run's)")
    flag("accounts", default_accounts(), metavar="FILE", help="users and keys")
    flag("allow-host", [], nargs="+", metavar="NAME", help="host names that this server is reached by")
    flag("proxy", False, action="store_true", help="trust X-Forwarded-For and -Proto of a proxy on this machine")
    flag("metrics-token", metavar="TOKEN", help="GET /metrics from elsewhere takes it")
    flag("nemo-compat", False, action="store_true", help="also PUT /generate and PUT /knn, as NeMo's services")
    flag("max-batch", 8, type=int, metavar="N", help="sequences generated at once")
    flag("device", choices=DEVICES, help="a GPU where there is one (auto), or trainer.accelerator=")
    flag("dtype", metavar="TYPE", help="of the model's weights: fp32, bf16 or int8 (default: as saved)")
    flag("max-waiting", 64, type=int, metavar="N", help="requests in the queue; more get 429")
    flag("share-prefixes", False, action="store_true", help="callers use each other's remembered prompts: the time of an answer then tells what others have asked")  # fmt: skip


def add_accounts(sub: argparse.ArgumentParser, kind: str) -> None:
    """The flags of `retro users` and `retro keys`."""
    commands = sub.add_subparsers(dest="what", metavar="WHAT", required=True)

    def command(name: str, run: Run, about: str) -> argparse.ArgumentParser:
        what = commands.add_parser(name, help=about, description=about)
        what.set_defaults(run=run)
        what.add_argument("--accounts", default=default_accounts(), metavar="FILE")
        what.add_argument("--json", action="store_true")
        what.add_argument("--quiet", action="store_true")
        return what

    is_user = kind == "users"
    what = command("add", _add_user if is_user else _add_key, f"add one of the {kind}")
    what.add_argument("name", metavar="NAME")
    what.add_argument("--scope", default="admin" if is_user else "read", help="read, write or admin")
    if not is_user:
        what.add_argument("--days", type=float, metavar="N", help="valid for (default: for ever)")
    what = command("remove", _remove_user if is_user else _remove_key, f"remove one of the {kind}")
    what.add_argument("name" if is_user else "id", metavar="NAME" if is_user else "ID")
    command("list", _list_users if is_user else _list_keys, f"the {kind}")


def _accounts(args: argparse.Namespace) -> "Accounts":
    from retro_engine.serve.accounts import Accounts

    return Accounts(args.accounts)


def _add_user(args: argparse.Namespace) -> int:
    """The password comes from the terminal, or from standard input; never from an argument that others can see."""
    import getpass

    if sys.stdin.isatty():
        password = getpass.getpass("password: ")
        if getpass.getpass("again: ") != password:
            raise UsageError("the two passwords differ", "", "type the same one twice")
    else:
        password = sys.stdin.readline().rstrip("\n")
    _accounts(args).add_user(args.name, password, args.scope)
    _print(args, {"name": args.name, "scope": args.scope})
    return 0


def _add_key(args: argparse.Namespace) -> int:
    key = _accounts(args).add_key(args.name, args.scope, args.days)
    print(json.dumps({"key": key, "scope": args.scope}) if args.json else key)
    return 0


def _remove_user(args: argparse.Namespace) -> int:
    _accounts(args).remove_user(args.name)
    return 0


def _remove_key(args: argparse.Namespace) -> int:
    _accounts(args).remove_key(args.id)
    return 0


def _list_users(args: argparse.Namespace) -> int:
    for name, scope in _accounts(args).users():
        _print(args, {"name": name, "scope": scope})
    return 0


def _list_keys(args: argparse.Namespace) -> int:
    for row in _accounts(args).list_keys():
        _print(args, row)
    return 0


def _print(args: argparse.Namespace, row: dict[str, Any]) -> None:
    print(json.dumps(row) if args.json else "  ".join(str(value) for value in row.values() if value is not None))


def _serve(args: argparse.Namespace) -> int:
    try:
        import prometheus_client  # noqa: F401
        import pydantic  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(f"{error.name} is not installed", "serve needs it", "pip install 'retro-engine[serve]'") from error  # fmt: skip
    from retro_engine.serve.service import ServiceOptions
    from retro_engine.serve.start import Address, serve_until_signal

    for name in ("max_batch", "max_waiting"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)} cannot be used", "at least 1")
    options = ServiceOptions(
        run=args.path,
        library=args.library,
        stores=args.index,
        mode=args.mode,
        weights=args.weights,
        name=args.name,
        max_batch=args.max_batch,
        max_waiting=args.max_waiting,
        dtype=args.dtype,
        shares_prefixes=args.share_prefixes,
        device=args.device,
    )
    address = Address(
        host=args.host,
        port=args.port,
        allowed_hosts=args.allow_host,
        is_behind_proxy=args.proxy,
        metrics_token=args.metrics_token,
        has_nemo=args.nemo_compat,
    )
    serve_until_signal(options, address, _accounts(args), _reporter(args))
    return 0


def _reporter(args: argparse.Namespace) -> "Reporter":
    from retro_engine.progress import Reporter

    return Reporter("json" if args.json else "quiet" if args.quiet else "text")
