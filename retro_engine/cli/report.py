"""`retro report`: one HTML page on a run."""

import argparse
from pathlib import Path

from retro_engine.cli import flags


def add(commands: flags.Commands) -> None:
    about = "one HTML page on a run: what retrieval gave, how it trained, what it read"
    sub = flags.command(commands, "report", run, about)
    sub.add_argument("path", metavar="RUN")
    flags.add_device(sub)
    flags.add_share(sub)
    flags.add_against(sub)
    sub.add_argument("--limit", type=int, default=32, help="batches a mode")
    sub.add_argument("--all", action="store_true", help="every batch")


def run(args: argparse.Namespace) -> int:
    from retro_engine.report import write_report

    flags.check_limit(args.limit)
    decoders = {name: Path(path) for name, path in flags.named_runs(args).items()}
    limit = None if args.all else args.limit
    print(
        write_report(
            Path(args.path), decoders, share=args.share, limit=limit, reporter=flags.reporter(args), device=args.device
        )
    )
    return 0
