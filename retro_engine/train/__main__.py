"""`torchrun -m retro_engine.train` and `retro train`: settings in, a run's folder out."""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence

from retro_engine.config import load_config, to_yaml
from retro_engine.errors import UsageError, typed
from retro_engine.progress import Reporter

OVERRIDE = re.compile(r"~[\w.]+|\+{0,2}[A-Za-z_][\w.]*=.*", re.S)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a training run; all else is settings."""
    parser.add_argument("--config", "-c", metavar="FILE", help="YAML settings")
    parser.add_argument("--preset", help="tiny, small, base, mcore or nemo")
    parser.add_argument("--out", "-o", metavar="DIR", help="the run's folder (exp_manager.exp_dir)")
    parser.add_argument(
        "--resume", default="auto", metavar="auto|never|PATH", help="go on where the run's folder is (auto)"
    )
    parser.add_argument("--seed", type=int, help="seed of weights and order")
    parser.add_argument("--device", choices=["auto", "cpu", "gpu"], help="trainer.accelerator")
    parser.add_argument("--dry-run", action="store_true", help="check settings and data, say what would run, and stop")
    parser.add_argument("--print-config", action="store_true", help="print the settings and stop")
    parser.add_argument("--json", action="store_true", help="events as JSON lines")
    parser.add_argument("--quiet", action="store_true")


def run(args: argparse.Namespace) -> int:
    """Train as the parsed arguments say; the exit code (130, 143 after a signal)."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "torchrun started more than one process",
            "this version trains in one process",
            "torchrun --nproc-per-node 1",
        )
    flags = {"exp_manager.exp_dir": args.out, "seed": args.seed, "trainer.accelerator": args.device}
    settings = [*args.overrides, *((key, value) for key, value in flags.items() if value is not None)]
    config = load_config(settings, args.preset, args.config)
    if args.print_config:
        print(to_yaml(config), end="")
        return 0
    from retro_engine.train.loop import describe, open_data, train

    if args.dry_run:
        print(describe(config, open_data(config)))
        return 0
    result = train(config, Reporter("json" if args.json else "quiet" if args.quiet else "text"), args.resume)
    print(json.dumps({"checkpoint": str(result.checkpoint), "step": result.step, **result.metrics}))
    return result.exit_code


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse flags anywhere and settings anywhere; `overrides` gets every key=value, +key=value, ++key=value, ~key."""
    args, extra = parser.parse_known_args(argv)
    args.overrides = [text for text in extra if OVERRIDE.fullmatch(text)]
    rest = [text for text in extra if not OVERRIDE.fullmatch(text)]
    if rest and getattr(args, "prompt", "") is None:  # a prompt that stands behind a flag
        args.prompt = rest.pop(0)
    if rest:
        parser.error(f"{' '.join(rest)} is not known; settings are key=value")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="retro_engine.train", description=__doc__)
    add_arguments(parser)
    try:
        return run(parse(parser, argv))
    except Exception as error:
        known = typed(error)
        if known is None:
            raise
        print(f"error: {known}", file=sys.stderr)
        return known.exit_code


if __name__ == "__main__":
    sys.exit(main())
