"""`python -m retro_engine.bench kernels|loader|model|decode|pipeline|profile`: a table on the screen, JSON and CSV on disk, one JSON line last."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from retro_engine.bench import frame
from retro_engine.bench.peers import DECODERS, NAMES, SHAPES
from retro_engine.errors import RetroError

BENCHES = ["kernels", "loader", "model", "decode", "pipeline"]


def main(argv: list[str] | None = None) -> int:
    try:
        return _run(argv)
    except RetroError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _run(argv: list[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="python -m retro_engine.bench", description=__doc__)
    parser.add_argument("bench", nargs="*", choices=[*BENCHES, "profile", []], help="default: all but profile")
    parser.add_argument(
        "--sizes", nargs="+", choices=list(SHAPES), default=["5M", "30M"], help="of model, decode and profile"
    )
    parser.add_argument(
        "--implementations", nargs="+", choices=sorted({*NAMES, *DECODERS}), help="of model and decode; default: all"
    )
    parser.add_argument("--text", metavar="FILE", help="of pipeline (default: generated facts)")
    parser.add_argument("--out", "-o", default="runs/bench", metavar="DIR", help="where JSON, CSV and plots go")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "bf16", "fp16"], help="default fp32 and bf16")
    parser.add_argument("--threads", type=int, help="of the processor (default torch's)")
    parser.add_argument("--compile", action="store_true", help="also compiled alternatives (always on a GPU)")
    parser.add_argument("--plot", action="store_true", help="also PNG (needs matplotlib: the extra `train`)")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    dtypes = [names[name] for name in args.dtype or ["fp32", "bf16"]]
    about = frame.environment(device)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    last: dict[str, object] = dict(about)
    for bench in args.bench or BENCHES:
        if bench == "profile":
            from retro_engine.bench import profile

            print(*profile.run(args.sizes, Path(args.out) / "profiles", about), sep="\n")
            continue
        if bench == "kernels":
            from retro_engine.bench import kernels

            ceilings = frame.measure_ceilings(device, dtypes)
            about["ceilings"] = asdict(ceilings)
            rates = ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in ceilings.matmul_gflop_s.items())
            print(f"ceilings: copy {ceilings.copy_gb_s:.1f} GB/s, matmul {rates}")
            rows = kernels.run(device, ceilings, dtypes, args.compile or device.type == "cuda")
        elif bench == "model":
            from retro_engine.bench import model

            rows = model.run(args.sizes, args.implementations)
        elif bench == "decode":
            from retro_engine.bench import decode

            rows = decode.run(args.sizes, names=args.implementations)
        elif bench == "pipeline":
            from retro_engine.bench import pipeline

            rows = pipeline.run(args.text)
        else:
            from retro_engine.bench import loader

            rows = loader.run()
        print(frame.table(rows))
        path = Path(args.out) / bench
        frame.write(rows, path, about)
        if args.plot:
            frame.plot(rows, path.with_suffix(".png"))
        last[bench] = {row.case: row.ratios for row in rows if row.ratios}
    print(json.dumps(last))
    return 0


if __name__ == "__main__":
    sys.exit(main())
