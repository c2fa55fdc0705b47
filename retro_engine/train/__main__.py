"""`torchrun -m retro_engine.train` and `retro train`: settings in, a run's folder out."""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence

from retro_engine.config import load_config, to_yaml
from retro_engine.errors import MissingInputError, StoreError, UsageError, typed
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
    parser.add_argument(
        "--init-from", metavar="RUN", help="weights of a checkpoint, retro import's too (model.init_from)"
    )
    parser.add_argument("--freeze-decoder", action="store_true", default=None, help="model.freeze_decoder")
    parser.add_argument("--seed", type=int, help="seed of weights and order")
    parser.add_argument("--device", choices=["auto", "cpu", "gpu"], help="trainer.accelerator")
    parser.add_argument("--nproc", type=int, metavar="N", help="processes on this machine, started with torchrun")
    parser.add_argument("--dry-run", action="store_true", help="check settings and data, say what would run, and stop")
    parser.add_argument("--print-config", action="store_true", help="print the settings and stop")
    parser.add_argument("--json", action="store_true", help="events as JSON lines")
    parser.add_argument("--quiet", action="store_true")


def run(args: argparse.Namespace) -> int:
    """Train as the parsed arguments say; the exit code (130, 143 after a signal)."""
    if args.nproc is not None and "WORLD_SIZE" not in os.environ:
        return _start_processes(args.nproc)
    is_main = os.environ.get("RANK", "0") == "0"
    flags = {
        "exp_manager.exp_dir": args.out,
        "seed": args.seed,
        "trainer.accelerator": args.device,
        "model.init_from": args.init_from,
        "model.freeze_decoder": args.freeze_decoder,
    }
    settings = [*args.overrides, *((key, value) for key, value in flags.items() if value is not None)]
    if not is_main:
        config = load_config(settings, args.preset, args.config, say=lambda note: None)
    else:
        config = load_config(settings, args.preset, args.config)
    if args.print_config:
        if is_main:
            print(to_yaml(config), end="")
        return 0
    from retro_engine.train.loop import describe, open_data, train
    from retro_engine.train.retrofit import inherit

    if args.dry_run:
        inherit(config)
        print(describe(config, open_data(config)))
        return 0
    result = train(config, Reporter("json" if args.json else "quiet" if args.quiet else "text"), args.resume)
    if is_main:
        print(json.dumps({"checkpoint": str(result.checkpoint), "step": result.step, **result.metrics}))
    return result.exit_code


def _start_processes(count: int) -> int:
    """`--nproc N`: the same command under torchrun."""
    words = sys.argv[1:]
    words = words[words.index("train") + 1 :] if "train" in words else words
    place = words.index("--nproc") if "--nproc" in words else None
    if place is None:
        words = [word for word in words if not word.startswith("--nproc=")]
    else:
        del words[place : place + 2]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    os.execv(sys.executable, [sys.executable, *launcher, "-m", "retro_engine.train", *words])


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse flags anywhere and settings anywhere: `overrides` gets every key=value, +key=value, ++key=value, ~key
    that is not the value of a flag. After `--` nothing is a setting.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    takes_value = _flags_with_a_value(parser)
    overrides: list[str] = []
    rest: list[str] = []
    for place, word in enumerate(words):
        if word == "--":
            rest += words[place:]
            break
        is_value = place > 0 and words[place - 1] in takes_value
        (overrides if OVERRIDE.fullmatch(word) and not is_value else rest).append(word)
    args, extra = parser.parse_known_args(rest)
    extra = [word for word in extra if word != "--"]
    if extra and getattr(args, "prompt", "") is None:  # a prompt that stands behind a flag
        args.prompt = extra.pop(0)
    if extra:
        parser.error(f"{' '.join(extra)} is not known; settings are key=value")
    args.overrides = overrides
    return args


def _flags_with_a_value(parser: argparse.ArgumentParser) -> set[str]:
    """The flags of a parser and of its sub-commands whose next word is their value."""
    found: set[str] = set()
    for action in parser._actions:  # argparse has no public way to list them
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                found |= _flags_with_a_value(sub)
        elif action.nargs != 0:
            found |= set(action.option_strings)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="retro_engine.train", description=__doc__)
    add_arguments(parser)
    try:
        return run(parse(parser, argv))
    except Exception as error:
        known = typed(error)
        if known is None:
            raise
        is_everywhere = isinstance(known, UsageError | StoreError | MissingInputError)  # each process meets it
        if os.environ.get("RANK", "0") == "0" or not is_everywhere:
            print(f"error: {known}", file=sys.stderr)
        return known.exit_code


if __name__ == "__main__":
    sys.exit(main())
