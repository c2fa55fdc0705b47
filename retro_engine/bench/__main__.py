"""`python -m retro_engine.bench NAME ...`: tables on the screen, JSON and CSV on disk, one JSON line last.

In a checkout of the repository also the benches in its benchmarks/, of whole parts: bench_NAME.py.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from retro_engine.bench import (
    checkout,
    decode,
    kernels,
    loader,
    memories,
    model,
    neighbors,
    pipeline,
    profile,
    results,
    startup,
)
from retro_engine.bench.contestants import DECODERS, NAMES, SHAPES
from retro_engine.bench.frame import Measured, Options, Target
from retro_engine.bench.machine import MAX_TAKEN, MIN_FREE, environment
from retro_engine.errors import RetroError, UsageError, nearest

BENCHES: dict[str, Callable[[Options], Measured]] = {
    "kernels": kernels.run,
    "loader": loader.run,
    "model": model.run,
    "decode": decode.run,
    "neighbors": neighbors.run,
    "memories": memories.run,
    "pipeline": pipeline.run,
    "profile": profile.run,
    "startup": startup.run,
}
DEFAULT = [name for name in BENCHES if name not in ("profile", "startup")]
TAKEN_BY = {  # what an option is for; with others it is refused
    "sizes": ["model", "decode", "neighbors", "profile"],
    "implementations": ["model", "decode"],
    "text": ["pipeline", "memories", "reader"],
    "run": ["startup", "memories", "reader"],
    "device": ["kernels"],
    "dtype": ["kernels"],
    "compile": ["kernels"],
    "weights": ["rivals"],
    "parts": ["kernels", "rivals", "reader"],
    "requests": ["service"],
}
MIN_REQUESTS = 100  # fewer say nothing of memory
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(argv: list[str] | None = None) -> int:
    try:
        return _run(argv)
    except RetroError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m retro_engine.bench", description=__doc__)
    of = {option: f"of {', '.join(names)}" for option, names in TAKEN_BY.items()}
    known = ", ".join([*BENCHES, *checkout.benches()])
    parser.add_argument("bench", nargs="*", metavar="NAME", help=f"of {known}; default {', '.join(DEFAULT)}")
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), help=f"{of['sizes']}; default 5M and 30M")
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=sorted({*NAMES, *DECODERS}),
        help=f"{of['implementations']}; default: all",
    )
    parser.add_argument("--text", metavar="FILE", help=f"{of['text']}; default: generated facts")
    parser.add_argument("--run", metavar="RUN", help=f"{of['run']}, which needs one")
    parser.add_argument("--out", "-o", default="runs/bench", metavar="DIR", help="where JSON, CSV and plots go")
    parser.add_argument("--device", help=f"{of['device']}; default cuda where it is, else cpu")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), help=f"{of['dtype']}; default fp32 and bf16")
    parser.add_argument("--weights", nargs="+", metavar="TYPE", help=f"{of['weights']}; default bf16, int8 and int4")
    parser.add_argument("--parts", nargs="+", metavar="PART", help=f"{of['parts']}; default: all")
    parser.add_argument("--requests", type=int, metavar="N", help=f"{of['requests']}; default 10,000, at least 100")
    parser.add_argument("--threads", type=int, help="of the processor; default torch's")
    parser.add_argument(
        "--compile", action="store_true", help=f"{of['compile']}: also what torch.compile makes (always on a GPU)"
    )
    parser.add_argument("--plot", action="store_true", help="also PNG (needs matplotlib: the extra `train`)")
    return parser


def _run(argv: list[str] | None) -> int:
    args = _parser().parse_args(argv)
    names, known = args.bench or DEFAULT, [*BENCHES, *checkout.benches()]
    if wrong := [name for name in names if name not in known]:
        raise UsageError(f"{wrong[0]} is no bench", nearest(wrong[0], known), f"one of {', '.join(known)}")
    for option, benches in TAKEN_BY.items():
        if getattr(args, option) and not set(benches) & set(names):
            raise UsageError(
                f"--{option} says nothing to {', '.join(names)}",
                f"it is of {', '.join(benches)}",
                f"leave --{option} out",
            )
    if args.requests is not None and args.requests < MIN_REQUESTS:
        raise UsageError(
            f"--requests {args.requests} cannot be used", "memory has to settle", f"{MIN_REQUESTS} or more"
        )
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options = Options(
        sizes=args.sizes or Options.sizes,
        implementations=args.implementations,
        text=args.text,
        run=args.run,
        device=device,
        dtypes=[DTYPES[name] for name in args.dtype] if args.dtype else Options.dtypes,
        weights=args.weights,
        parts=args.parts,
        requests=args.requests,
        compiles=args.compile or device.type == "cuda",
        out=Path(args.out),
    )
    print(json.dumps(measure(names, options, is_plotted=args.plot)))
    return 0


def measure(names: Sequence[str], options: Options, is_plotted: bool = False) -> dict[str, Any]:
    """Run benches one after the other, show and write what they found; the machine, ratios by case and all targets."""
    about = environment(options.device)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    if about["busy"]:
        print(
            f"BUSY: others take more than {MAX_TAKEN} of a processor, or less than {MIN_FREE >> 30} GiB are free: "
            "figures may be low"
        )
    last: dict[str, Any] = dict(about)
    targets: list[Target] = []
    for name in names:
        measured = (BENCHES[name] if name in BENCHES else checkout.load(f"bench_{name}").run)(options)
        if not measured.rows:
            continue
        print(results.table(measured.rows))
        if measured.targets:
            print(results.target_table(measured.targets, is_busy=about["busy"]))
        results.write(name, measured, options.out, about)
        if is_plotted:
            results.plot(measured.rows, options.out / f"{name}.png")
        last[name] = results.ratios_by_case(measured.rows)
        targets += measured.targets
    return last | {"targets": results.targets_by_row(targets)}


if __name__ == "__main__":
    sys.exit(main())
