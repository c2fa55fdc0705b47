"""One part of `bench kernels` on the GPU, and what was predicted beside what was measured; steps of gpu_check.py.

`gpu_bench.py PART [TYPE ...]` writes PART-TYPE/kernels.json and .csv into $RETRO_GPU_OUT; `gpu_bench.py compare` reads all of
them, prints each case's share of the rate of copying with its prediction (kernels/traffic.py), and writes predictions.json.
It imports torch and this repository alone, so that a machine which has nothing else measures all the same.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from retro_kernels.traffic import PREDICTED

from retro_engine.bench import kernels, results
from retro_engine.bench.frame import Options
from retro_engine.bench.machine import environment

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def measure(part: str, types: Sequence[str], out: Path) -> None:
    device = torch.device("cuda")
    options = Options(
        device=device, dtypes=[TYPES[name] for name in types] or [torch.bfloat16], parts=[part], compiles=True, out=out
    )
    about = environment(device)
    measured = kernels.run(options)
    print(results.table(measured.rows))
    if measured.targets:
        print(results.target_table(measured.targets))
    results.write("kernels", measured, out / "-".join((part, *types)), about)


def compare(out: Path) -> list[dict[str, Any]]:
    """Predicted and measured share of the rate of copying, of every case of ours that has a prediction."""
    found = []
    for path in sorted(out.glob("*/kernels.json")):
        for row in json.loads(path.read_text())["rows"]:
            predicted = next((share for case, share in PREDICTED.items() if row["case"] == case), None)
            if predicted is not None and row["implementation"].startswith("ours"):
                measured = row["ratios"]["clone"] if row["case"].startswith("rope") else row["ceiling_share"]
                found.append({"case": row["case"], "predicted": predicted, "measured": round(measured, 3)})
    return found


def main(arguments: Sequence[str]) -> int:
    out = Path(os.environ["RETRO_GPU_OUT"])
    if list(arguments) != ["compare"]:
        measure(arguments[0], arguments[1:], out)
        return 0
    found = compare(out)
    for one in found:
        print(f"{one['case']:55} predicted {one['predicted']:.2f}  measured {one['measured']:.2f}")
    for case in PREDICTED.keys() - {one["case"] for one in found}:
        print(f"{case:55} predicted {PREDICTED[case]:.2f}  not measured")
    (out / "predictions.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
