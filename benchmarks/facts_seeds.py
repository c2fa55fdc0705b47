"""The facts proof over several seeds and both initialisations: python benchmarks/facts_seeds.py --seeds 10

Every run is `retro demo facts` with another seed of weights and order; the held-out people stay the same. Prints a
line a run and writes them to benchmarks/results/facts_seeds.json.
"""

import argparse
import json
import platform
import tempfile
from pathlib import Path

import torch

from retro_engine.demo.facts import run_facts
from retro_engine.progress import Reporter

RESULTS = Path(__file__).parent / "results" / "facts_seeds.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--inits", nargs="+", default=["retrieval_ready", "standard"])
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()
    rows = []
    for init in args.inits:
        for seed in range(args.seeds):
            with tempfile.TemporaryDirectory() as folder:
                figures = run_facts(Path(folder) / "demo", args.steps, init, seed, False, Reporter("quiet"))
            row = {"init": init, "seed": seed, "steps": figures["steps"], "trained_s": round(figures["trained_s"], 1)}
            for mode in ("on", "off", "random", "one_wrong"):
                row |= {
                    f"{key}_{mode}": round(figures[mode][key], 4)
                    for key in ("value_accuracy", "whole_values", "bits_per_byte")
                }
            row["new_entity_right"] = sum(answer["is_right"] for answer in figures["new_entity"])
            rows.append(row)
            print(json.dumps(row), flush=True)
            RESULTS.parent.mkdir(exist_ok=True)
            machine = {
                "machine": platform.processor() or platform.machine(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
            RESULTS.write_text(json.dumps({**machine, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
