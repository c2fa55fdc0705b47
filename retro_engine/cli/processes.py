"""A command in several processes, that `--nproc` or torchrun starts: each computes its share, and the first one speaks."""

import argparse
import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from retro_engine.errors import UsageError

if TYPE_CHECKING:
    from retro_engine.train.parallel import Parallel


def add_flag(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--nproc", type=int, metavar="N", help="processes on this machine, which share the documents (default: one)"
    )


def are_started() -> bool:
    """Whether torchrun has started this process beside others."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def start(args: argparse.Namespace) -> int:
    """The same command in --nproc processes; their exit code."""
    from retro_engine.train.__main__ import start_processes

    return start_processes(args.nproc, args.typed, "retro_engine.cli")


def refuse_several(args: argparse.Namespace, what: str) -> None:
    """Raises UsageError where several processes are asked for, or are here, and one computes `what`."""
    if args.nproc is not None or are_started():
        how = "--nproc" if args.nproc is not None else "torchrun"
        raise UsageError(f"{what} and {how} cannot be together", "one process computes it", f"leave {how} out")


@contextlib.contextmanager
def joined(args: argparse.Namespace) -> Iterator["Parallel"]:
    """This process among the others; all but the first one print nothing but errors."""
    from retro_engine.config import Config
    from retro_engine.train.parallel import Parallel

    config = Config()
    config.trainer.accelerator = (args.device or "auto") if are_started() else "cpu"  # where sums are made
    parallel = Parallel(config)
    try:
        with contextlib.ExitStack() as stack:
            if not parallel.is_main:
                args.quiet, args.json = True, False
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            yield parallel
    finally:
        parallel.close()
