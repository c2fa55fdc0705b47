"""`retro demo`: the whole pipeline on a small corpus."""

import argparse
import json
from pathlib import Path

from retro_engine.cli import flags
from retro_engine.errors import MissingInputError, UsageError


def add(commands: flags.Commands) -> None:
    about = "the whole pipeline on a small corpus, ends with what retrieval gives"
    sub = flags.command(commands, "demo", run, about, flags.EVERY_SETTING)
    what = "facts, python-docs, or files of yours"
    sub.add_argument("what", nargs="?", default="facts", metavar="facts|python-docs|PATH", help=what)
    sub.add_argument("--out", "-o", default="runs/demo", metavar="DIR")
    sub.add_argument("--steps", type=int, help="training steps (facts 1,500, text 800); fewer for a trial run")
    sub.add_argument("--init", default="retrieval_ready", choices=["retrieval_ready", "standard"], help="facts only")
    sub.add_argument("--preset", default="tiny", help="text: tiny, or small for a run of an hour")
    sub.add_argument("--seed", type=int, default=1234)
    sub.add_argument("--no-gate", action="store_true", help="facts: exit 0 also when the proof fails")


def run(args: argparse.Namespace) -> int:
    out, report = Path(args.out), flags.reporter(args)
    if args.steps is not None and args.steps < 1:
        raise UsageError(f"--steps {args.steps} cannot be used", "at least one step is trained")
    for text in args.overrides:
        key, _, value = text.lstrip("+").partition("=")
        if key in ("trainer.devices", "trainer.num_nodes") and value != "1":
            raise UsageError(f"{text} cannot be used", "the demo trains in one process", "retro train --nproc N")
    if args.what == "facts":
        from retro_engine.demo.facts import run_facts

        figures = run_facts(
            out,
            args.steps,
            init=args.init,
            seed=args.seed,
            is_gated=not args.no_gate,
            reporter=report,
            overrides=args.overrides,
        )
        trained, store, prompt = out / "run", out / "store" / "notes", "These lines are about"
    else:
        from retro_engine.data.inputs import nearest_path
        from retro_engine.demo.text import figures_verdict, run_text

        if args.what != "python-docs" and not Path(args.what).exists():
            raise MissingInputError(
                f"{args.what} does not exist", nearest_path(Path(args.what)), "retro demo facts, python-docs or PATH"
            )
        figures = run_text(
            args.what,
            out,
            steps=args.steps,
            seed=args.seed,
            overrides=args.overrides,
            reporter=report,
            preset=args.preset,
        )
        trained, store, prompt = out / "retro", out / "store", "The"
        report.say(f"\n{figures_verdict(figures)}")
    if args.json:
        print(json.dumps(figures))
    if trained.exists():
        report.say(
            f"\nnext:\n  retro generate {trained} '{prompt}' --stores {store} --show-neighbors\n  retro eval {trained}\n"
            "  retro prepare YOUR/FILES --out store/mine && retro build store/mine"
        )
    return 0
