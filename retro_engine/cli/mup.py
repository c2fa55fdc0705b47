"""`retro mup`: width scaling."""

import argparse
import json
from pathlib import Path

from retro_engine.cli import flags
from retro_engine.errors import UsageError


def add(commands: flags.Commands) -> None:
    about = "width scaling: write base widths, check activations, sweep learning rates"
    sub = flags.command(commands, "mup", run, about, ("model.", "seed", "trainer.accelerator"))
    sub.add_argument("what", choices=["base", "check", "sweep"])
    sub.add_argument("store", nargs="?", help="sweep: trained on; check: instead of random tokens")
    sub.add_argument("--out", "-o", help="base: the YAML file; check, sweep: a folder (default runs/mup)")
    sub.add_argument("--preset", help="a model instead of the small one that check and sweep scale")
    sub.add_argument("--widths", default="64,128,256,512", help="values of model.hidden_size; all else in proportion")
    sub.add_argument("--keep-head-width", action="store_true", help="more heads with the width, not wider ones")
    sub.add_argument("--rates", help="sweep: learning rates (default 2^-13 ... 2^-5)")
    sub.add_argument("--seeds", type=int, default=3)
    sub.add_argument("--steps", type=int, help="check: 5, sweep: 300")


def run(args: argparse.Namespace) -> int:
    return _base(args) if args.what == "base" else _scale(args)


def _base(args: argparse.Namespace) -> int:
    from retro_engine.config import load_config
    from retro_engine.train import mup

    if args.out is None:
        raise UsageError("retro mup base has no file to write", "", "--out FILE.yaml")
    model = load_config(args.overrides, args.preset).model
    flags.print_result(args, {"shape_file": args.out, **mup.write_base(model, Path(args.out))})
    return 0


def _scale(args: argparse.Namespace) -> int:
    from retro_engine.config import named_keys
    from retro_engine.model.ops import check_environment
    from retro_engine.train import mup

    check_environment()
    widths = [int(width) for width in _numbers("--widths", args.widths)]
    for flag, value in (("--seeds", args.seeds), ("--steps", args.steps)):
        if value is not None and value < 1:
            raise UsageError(f"{flag} {value} cannot be used", "at least 1")
    if len(widths) < 2 and args.what == "check":
        raise UsageError(f"--widths {args.widths} cannot be used", "a slope takes two widths", "--widths 64,128,256")
    if args.what == "sweep" and args.store is None:
        raise UsageError("retro mup sweep has nothing to train on", "", "retro mup sweep STORE")
    if args.what == "sweep" and "model.optim.lr" in named_keys(args.overrides, with_environment=False):
        raise UsageError("model.optim.lr cannot be used", "a sweep trains at many rates", "--rates 1e-3,2e-3")
    out, report = Path(args.out or "runs/mup"), flags.reporter(args)
    config = mup.open_config(args.overrides, args.preset, args.store)
    if args.what == "check":
        steps = args.steps or 5
        check = mup.coordinate_check(
            config, widths, steps=steps, seeds=args.seeds, keeps_head_width=args.keep_head_width, reporter=report
        )
        mup.save_check(check, config, steps, out)
        slopes = {"slopes": check.slopes(True), "without": check.slopes(False)}
        print(json.dumps(slopes) if args.json else check.table())
        check.gate()
        return 0
    rates = _numbers("--rates", args.rates) if args.rates else [2.0**power for power in range(-13, -4)]
    result = mup.sweep(
        config,
        widths,
        rates=rates,
        seeds=args.seeds,
        steps=args.steps or 300,
        out=out,
        keeps_head_width=args.keep_head_width,
        reporter=report,
    )
    print(json.dumps(result.summary()) if args.json else result.table())
    return 0


def _numbers(flag: str, text: str) -> list[float]:
    """'64,128' -> different numbers above 0."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < float("inf") for number in numbers) or len(set(numbers)) < len(numbers):
        raise UsageError(f"{flag} {text} cannot be used", "different numbers above 0, with commas between them")
    return numbers
