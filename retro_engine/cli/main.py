"""The command `retro`: one sub-command a stage. Flags are about the run; all else is settings (key=value).

Exit codes: 0 ok, 1 bug (trace saved), 2 usage or settings, 3 input missing, corrupt or incompatible,
4 optional dependency missing, 5 out of disk, memory or device, 6 quality gate failed, 130/143 interrupted.

Every heavy import is inside the command that needs it: `retro --help` answers at once.
"""

import argparse
import atexit
import io
import json
import os
import re
import sys
import threading
from collections.abc import Sequence
from typing import NoReturn

from retro_engine.cli import (
    accounts,
    ask,
    build,
    config,
    demo,
    docs,
    doctor,
    explain,
    fetch,
    generate,
    inspect,
    memory,
    models,
    mup,
    prepare,
    report,
    serve,
    train,
)
from retro_engine.cli import eval as evaluation
from retro_engine.cli.renamed import with_new_names
from retro_engine.config import asked_accelerator, named_keys
from retro_engine.errors import RetroError, StoppedError, UsageError, nearest, typed, who_speaks
from retro_engine.train.__main__ import parse
from retro_engine.version import __version__

COMMANDS = (
    demo, prepare, build, memory, train, mup, evaluation, generate, ask, fetch, docs, models, explain, serve, accounts, report, inspect,
    config, doctor,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names that are not UTF-8 go out as the bytes that they are
    words = list(sys.argv[1:] if argv is None else argv)
    is_json = "--json" in words
    try:
        args = read(words)
        if args.command is None:
            make_parser().print_help()
            return 2
        return int(args.run(args))
    except KeyboardInterrupt:
        return _fail(is_json, StoppedError(130, "what was published before is whole", "run the same command again"))
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except Exception as error:
        known = typed(error)
        return _bug(error) if known is None else _fail(is_json, known)


def command() -> int:
    """The process `retro`: `main`, and then its end without the interpreter's teardown, which takes a third of a second where PyTorch is.

    Threads that still write and what is registered for the end come first. What cannot be said any more is left to the teardown.
    """
    code = main()
    threading._shutdown()  # type: ignore[attr-defined]  # there is no public way to either
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):  # nobody reads, or the disk is full
        return code
    os._exit(code)


def read(words: Sequence[str]) -> argparse.Namespace:
    """What `words` ask for; raises UsageError for a flag or a setting that the command does not take."""
    args = parse(make_parser(), with_new_names(docs.with_url(list(words))))
    if args.command is not None:
        _check_settings(args)
    return args


class _Parser(argparse.ArgumentParser):
    """Raises UsageError for what it cannot read, with the nearest name."""

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        hint = nearest(wrong[1], re.findall(r"[\w-]+", wrong[2])) if wrong is not None else ""
        raise UsageError(message, hint, f"{self.prog} --help")


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="retro", description="Text in, a retrieval-enhanced language model out.")
    parser.add_argument("--version", action="version", version=f"retro-engine {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for module in COMMANDS:
        module.add(commands)
    return parser


def _check_settings(args: argparse.Namespace) -> None:
    """Raise UsageError for a setting that the command does not read: nothing that is typed is ignored."""
    if args.reads is None or getattr(args, "plan", False):
        return
    reads = (*args.reads, *(("trainer.accelerator",) if hasattr(args, "device") else ()))
    for text in args.overrides:
        (key,) = named_keys([text], with_environment=False) or (text,)
        if not any(key == name or name.endswith(".") and key.startswith(name) for name in reads):
            what = f"it reads {', '.join(name + '...' * name.endswith('.') for name in reads)}" if reads else ""
            raise UsageError(
                f"{text}: retro {args.command} takes no {'such setting' if reads else 'settings'}",
                what,
                f"retro {args.command} --help",
            )
    if hasattr(args, "device"):
        args.device = asked_accelerator(args.overrides, args.device)


def _fail(is_json: bool, error: RetroError) -> int:
    event = {"event": "error", "what": error.what, "why": error.why, "do": error.do, "exit_code": error.exit_code}
    if who := who_speaks():
        event["who"] = who.removesuffix(": ")
    print(json.dumps(event) if is_json else f"error: {who_speaks()}{error}", file=sys.stderr)
    return error.exit_code


def _bug(error: Exception) -> int:
    """The last resort: keep the trace, name the file."""
    import tempfile
    import traceback

    with tempfile.NamedTemporaryFile("w", prefix="retro-trace-", suffix=".txt", delete=False) as file:
        file.write("".join(traceback.format_exception(error)))
    print(
        f"error: {type(error).__name__}: {error}\n  this is a bug in retro-engine\n  the trace is in {file.name}",
        file=sys.stderr,
    )
    return 1
