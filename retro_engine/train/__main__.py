"""`torchrun -m retro_engine.train` and `retro train`: settings in, a run's folder out."""

import argparse
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from retro_engine.config import Config, asked_accelerator, load_config, to_yaml
from retro_engine.errors import UsageError, nearest, typed, who_speaks
from retro_engine.progress import Reporter, note

if TYPE_CHECKING:
    from retro_engine.train.loop import TrainingResult

DEVICES = ("auto", "cpu", "gpu")
SETTINGS_HELP = """All else is settings, key=value (retro config keys lists them all). Three that every run needs:
  model.data.store=STORE   the store that retro prepare wrote and retro build gave neighbors
  --out RUN                the run's folder (exp_manager.exp_dir)
  --preset tiny            the model's size (or model.hidden_size=... and what else it is made of)
and mostly
  trainer.max_steps=N      optimizer steps (1,000)
  model.chunk_size=M       the store's, where that is not 64"""
OVERRIDE = re.compile(r"~[\w.]+|\+{0,2}[A-Za-z_][\w.]*=.*", re.S)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a training run; all else is settings."""
    parser.epilog, parser.formatter_class = SETTINGS_HELP, argparse.RawDescriptionHelpFormatter
    parser.usage = "%(prog)s [--preset NAME] --out RUN model.data.store=STORE [key=value ...] [flags]"
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
    parser.add_argument("--device", choices=DEVICES, help="trainer.accelerator")
    parser.add_argument("--nproc", type=int, metavar="N", help="processes on this machine (default: trainer.devices)")
    parser.add_argument("--dry-run", action="store_true", help="check settings and data, say what would run, and stop")
    parser.add_argument("--print-config", action="store_true", help="print the settings and stop")
    parser.add_argument("--json", action="store_true", help="events as JSON lines")
    parser.add_argument("--quiet", action="store_true")


def run(args: argparse.Namespace) -> int:
    """Train as the parsed arguments say; the exit code (130, 143 after a signal)."""
    is_main = os.environ.get("RANK", "0") == "0"
    flags = {
        "exp_manager.exp_dir": args.out,
        "seed": args.seed,
        "trainer.accelerator": args.device,
        "model.init_from": args.init_from,
        "model.freeze_decoder": args.freeze_decoder,
    }
    asked_accelerator(args.overrides, args.device)
    settings = [*args.overrides, *((key, value) for key, value in flags.items() if value is not None)]
    notes: list[str] = []
    config = load_config(settings, args.preset, args.config, say=notes.append)
    count = None if args.print_config or args.dry_run else _processes_to_start(args, config)
    if count is not None:
        return start_processes(count, [word for word in args.typed if word != "train"], "retro_engine.train")
    for text in notes if is_main else []:
        note(text)
    if args.print_config:
        if is_main:
            print(to_yaml(config), end="")
        return 0
    from retro_engine.train.describe import describe
    from retro_engine.train.loop import train
    from retro_engine.train.retrofit import inherit
    from retro_engine.train.run_data import open_data

    if args.dry_run:
        inherit(config)
        print(describe(config, open_data(config)))
        return 0
    result = train(config, Reporter("json" if args.json else "quiet" if args.quiet else "text"), args.resume)
    if is_main and args.json:
        print(json.dumps({"checkpoint": str(result.checkpoint), "step": result.step, **result.metrics}))
    elif is_main:
        print("\n".join(summary(result, has_next=not args.quiet)))
    return result.exit_code


def summary(result: "TrainingResult", has_next: bool = True) -> list[str]:
    """What a run came to, for people; and what one would type next."""
    from retro_engine.train.checkpoint import best_of, complete_checkpoints, valid_loss

    m = result.metrics
    parts = [f"{result.step:,} steps"]
    parts += [f"loss {m['loss']:.3f}"] if "loss" in m else []
    bits = {mode: m.get(f"valid_bits_per_byte_{mode}") for mode in ("on", "off")}
    shown = [f"{mode} {value:.3f}" for mode, value in bits.items() if value is not None]
    parts += [f"validation bits per byte {', '.join(shown)}"] if shown else []
    lines = [f"{result.run}: {'; '.join(parts)}"]
    found = complete_checkpoints(result.run, lambda flaw: None)
    best = best_of(found) if found else result.checkpoint
    if best != result.checkpoint and math.isfinite(valid_loss(best)):
        lines.append(
            f"commands read {best.name}, where the validation loss was lowest; {result.checkpoint} is the last"
        )
    if has_next:
        run = shlex.quote(str(result.run))
        again = [f"  the same command, which goes on from step {result.step}"] if result.exit_code else []
        lines += [
            "next:",
            *again,
            f"  retro eval {run}",
            f"  retro generate {run} 'The prompt'",
            f"  retro report {run}",
        ]
    return lines


def _processes_to_start(args: argparse.Namespace, config: Config) -> int | None:
    """`--nproc N`, or trainer.devices on one node, where nothing has started processes yet; None = train in this one."""
    from retro_engine.model.device import num_processes

    if "WORLD_SIZE" in os.environ:
        return None
    if args.nproc is not None:
        return int(args.nproc)
    count = num_processes(config.trainer.accelerator, config.trainer.devices)
    return count if count is not None and count > 1 and config.trainer.num_nodes == 1 else None


def start_processes(count: int, words: list[str], module: str) -> int:
    """`python -m module` with `words` but --nproc in `count` processes under torchrun, which runs here; the exit code of the
    first that failed, 128 + n after signal n.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    words = list(words)
    if "--nproc" in words:
        place = words.index("--nproc")
        del words[place : place + 2]
    words = [word for word in words if not word.startswith("--nproc=")]
    if count < 1:
        raise UsageError(f"--nproc {count} cannot be used", "it takes at least one process")
    try:
        torchrun(["--standalone", "--nproc-per-node", str(count), "-m", module, *words])
    except ChildFailedError as error:  # it has said why
        code = error.get_first_failure()[1].exitcode
        return 128 - code if code < 0 else code
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse flags anywhere and settings anywhere: `overrides` gets every key=value, +key=value, ++key=value, ~key
    that is not the value of a flag. After `--` nothing is a setting.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    takes_value, called = _flags_with_a_value(parser), _command(parser, words)
    has_settings = called.get_default("has_settings") is not False
    overrides: list[str] = []
    rest: list[str] = []
    for place, word in enumerate(words):
        if word == "--":
            rest += words[place:]
            break
        is_value = place > 0 and words[place - 1] in takes_value
        is_setting = has_settings and OVERRIDE.fullmatch(word) and not is_value
        (overrides if is_setting else rest).append(word)
    args, extra = parser.parse_known_args(rest)
    extra = [word for word in extra if word != "--"]
    if extra and getattr(args, "prompt", "") is None:  # a prompt that stands behind a flag
        args.prompt = extra.pop(0)
    if isinstance(getattr(args, "words", None), list):  # of `ask`: documents and a question around flags
        args.words += [word for word in extra if not word.startswith("-")]
        extra = [word for word in extra if word.startswith("-")]
    if extra:
        flags = sorted(called._option_string_actions)  # argparse has no public way to list them
        raise UsageError(
            f"{' '.join(extra)}: not known to {called.prog}",
            nearest(extra[0].partition("=")[0], flags) if extra[0].startswith("-") else "settings are key=value",
            f"{called.prog} --help",
        )
    args.overrides, args.typed = overrides, words
    return args


def _command(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of the command that is called, a family's too; `parser` where there is none."""
    for word in words:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction) and word in action.choices:
                return _command(action.choices[word], words[1:])
        if not word.startswith("-"):
            break
    return parser


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
        print(f"error: {who_speaks()}{known}", file=sys.stderr, flush=True)
        return known.exit_code


if __name__ == "__main__":
    from retro_engine.train.signals import leave

    exit_code = main()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        leave(exit_code)
    sys.exit(exit_code)
