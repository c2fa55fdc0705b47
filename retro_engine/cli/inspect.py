"""`retro inspect`: what a published thing is and whether it is whole; with --plan, what training would take."""

import argparse
import json

from retro_engine.cli import flags
from retro_engine.errors import UsageError


def add(commands: flags.Commands) -> None:
    about = "what a store, table, index, library or checkpoint is; --plan: what training would take"
    sub = flags.command(commands, "inspect", run, about)
    sub.add_argument("path", nargs="?")
    sub.add_argument("--plan", action="store_true", help="memory, FLOPs and communication of a step on H100s, on paper")
    sub.add_argument("--preset", help="--plan: tiny, small, base, mcore or nemo")
    sub.add_argument("--config", "-c", metavar="FILE", help="--plan: YAML settings")
    sub.add_argument("--processes", type=int, metavar="N", help="--plan: GPUs (default: one per shared matrix)")
    sub.add_argument("--verify", action="store_true", help="compare every file with its checksum")
    sub.add_argument("--samples", type=int, default=0, metavar="N", help="chunks to print, with their neighbors")


def run(args: argparse.Namespace) -> int:
    if args.plan:
        return _plan(args)
    given = [f"--{flag}" for flag in ("preset", "config", "processes") if getattr(args, flag) is not None]
    if given:
        raise UsageError(f"{given[0]} is a flag of --plan", "", "retro inspect --plan")
    if args.path is None:
        raise UsageError(
            "nothing to inspect was given", "", "retro inspect PATH, or retro inspect --plan key=value ..."
        )
    from retro_engine.cli.artefacts import Other, open_artefact, samples
    from retro_engine.data.neighbor_table import NeighborTable
    from retro_engine.library.library import Library
    from retro_engine.retrieval.quality import describe_quality, quality

    with open_artefact(args.path) as opened:
        if args.verify:
            opened.verify()
        summary = opened.statistics() if isinstance(opened, Library) else opened.summary()
        flags.print_result(args, {**summary, **({"verified": True} if args.verify else {})})
        if isinstance(opened, NeighborTable):
            report = quality(opened)
            flags.print_result(args, report) if args.json else print("\n".join(describe_quality(report)))
        if args.samples and not isinstance(opened, Other):
            print("\n".join(samples(opened, args.samples)))
    return 0


def _plan(args: argparse.Namespace) -> int:
    from retro_engine.config import load_config
    from retro_engine.train.plan import plan, table

    if args.path is not None:
        raise UsageError(f"{args.path}: --plan takes settings, no path", "", "retro inspect --plan key=value ...")
    config = load_config(args.overrides, args.preset, args.config)
    processes = args.processes if args.processes is not None else config.model.tensor_model_parallel_size
    figures = plan(config, processes)
    print(json.dumps(figures) if args.json else table(figures))
    return 0
