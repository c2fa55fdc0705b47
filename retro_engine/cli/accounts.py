"""`retro users` and `retro keys`: who has access to a server."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retro_engine.cli import flags
from retro_engine.errors import UsageError

if TYPE_CHECKING:
    from retro_engine.serve.accounts import Accounts


def add(commands: flags.Commands) -> None:
    for kind, about in (("users", "who may sign in to the page"), ("keys", "keys of the API")):
        whats = flags.family(commands, kind, f"{about}: add, {'change, ' if kind == 'users' else ''}remove, list")
        is_user = kind == "users"
        sub = _what(whats, "add", _add_user if is_user else _add_key, f"add one of the {kind}")
        sub.add_argument("name", metavar="NAME")
        sub.add_argument("--scope", default="read", help="read, write or admin (default read)")
        if is_user:
            sub = _what(whats, "change", _change_user, "give a user a new password, and ask all his browsers for it")
            sub.add_argument("name", metavar="NAME")
            sub.add_argument("--scope", help="read, write or admin (default: as it is)")
        else:
            sub.add_argument("--days", type=float, metavar="N", help="valid for (default: for ever)")
        sub = _what(whats, "remove", _remove_user if is_user else _remove_key, f"remove one of the {kind}")
        sub.add_argument("name" if is_user else "id", metavar="NAME" if is_user else "ID")
        _what(whats, "list", _list_users if is_user else _list_keys, f"the {kind}")


def _what(
    whats: flags.Commands, name: str, run: Callable[[argparse.Namespace], int], about: str
) -> argparse.ArgumentParser:
    sub = flags.command(whats, name, run, about)
    sub.add_argument("--accounts", default=default_accounts(), metavar="FILE")
    return sub


def default_accounts() -> str:
    """Where users and keys are kept when nothing is said."""
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return os.environ.get("RETRO_SERVE_ACCOUNTS") or str(Path(state) / "retro-engine" / "accounts.sqlite")


def open_accounts(args: argparse.Namespace) -> "Accounts":
    from retro_engine.serve.accounts import Accounts

    return Accounts(args.accounts)


def _password() -> str:
    """From the terminal, or from standard input; never from an argument that others can see."""
    import getpass

    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\n")
    password = getpass.getpass("password: ")
    if getpass.getpass("again: ") != password:
        raise UsageError("the two passwords differ", "", "type the same one twice")
    return password


def _add_user(args: argparse.Namespace) -> int:
    open_accounts(args).add_user(args.name, _password(), args.scope)
    _print(args, {"name": args.name, "scope": args.scope})
    return 0


def _change_user(args: argparse.Namespace) -> int:
    scope = open_accounts(args).change_user(args.name, _password(), args.scope)
    _print(args, {"name": args.name, "scope": scope})
    return 0


def _add_key(args: argparse.Namespace) -> int:
    key = open_accounts(args).add_key(args.name, args.scope, args.days)
    print(json.dumps({"key": key, "scope": args.scope}) if args.json else key)
    return 0


def _remove_user(args: argparse.Namespace) -> int:
    open_accounts(args).remove_user(args.name)
    return 0


def _remove_key(args: argparse.Namespace) -> int:
    open_accounts(args).remove_key(args.id)
    return 0


def _list_users(args: argparse.Namespace) -> int:
    for name, scope in open_accounts(args).users():
        _print(args, {"name": name, "scope": scope})
    return 0


def _list_keys(args: argparse.Namespace) -> int:
    for row in open_accounts(args).list_keys():
        _print(args, row)
    return 0


def _print(args: argparse.Namespace, row: dict[str, Any]) -> None:
    print(json.dumps(row) if args.json else "  ".join(str(value) for value in row.values() if value is not None))
