"""`retro report`: one HTML page on a run."""

import argparse
from pathlib import Path

from retro_engine.cli import flags
from retro_engine.errors import UsageError


def add(commands: flags.Commands) -> None:
    about = "one HTML page on a run: what retrieval gave, how it trained, what it read"
    sub = flags.command(commands, "report", run, about)
    sub.add_argument("path", metavar="RUN")
    flags.add_device(sub)
    flags.add_share(sub)
    against = "a plain decoder to compare with"
    sub.add_argument("--against", action="append", default=[], metavar="NAME=RUN", help=against)
    sub.add_argument("--limit", type=int, default=32, help="batches a mode")
    sub.add_argument("--all", action="store_true", help="every batch")


def run(args: argparse.Namespace) -> int:
    from retro_engine.report import write_report

    flags.check_limit(args.limit)
    decoders = {}
    for text in args.against:
        name, separator, path = text.partition("=")
        if not separator or not name or name in ("on", "off", "random"):
            raise UsageError(
                f"--against {text} cannot be read", "a name of your choice and a run", "--against plain=runs/plain"
            )
        decoders[name] = Path(path)
    limit = None if args.all else args.limit
    print(
        write_report(
            Path(args.path), decoders, share=args.share, limit=limit, reporter=flags.reporter(args), device=args.device
        )
    )
    return 0
