"""`torchrun -m retro_engine.train` and `retro train`: settings in, a run's folder out."""

import argparse
import json
import os
import sys
from collections.abc import Sequence

from retro_engine.config import load_config, to_yaml
from retro_engine.errors import RetroError, UsageError
from retro_engine.progress import Reporter


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
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings: retro config keys lists them")


def run(args: argparse.Namespace) -> int:
    """Train as the parsed arguments say; the exit code (130, 143 after a signal)."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "torchrun started more than one process",
            "this version trains in one process",
            "torchrun --nproc-per-node 1",
        )
    settings = list(args.overrides)
    if args.out is not None:
        settings.append(f"exp_manager.exp_dir='{args.out}'")
    if args.seed is not None:
        settings.append(f"seed={args.seed}")
    if args.device is not None:
        settings.append(f"trainer.accelerator={args.device}")
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="retro_engine.train", description=__doc__)
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except RetroError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
