"""The facts proof over seeds, initialisations and chunk lengths: python benchmarks/facts_seeds.py --seeds 10

Every run is `retro demo facts` with another seed of weights and order; the held-out people stay the same. Beside the
demo's conditions each run is asked in wordings that its training never had, and with 1, 2, 4 and 8 neighbors of which
only the first is right. Adds its rows to benchmarks/results/facts_seeds.json; a row that is there is not run again.
"""

import argparse
import itertools
import json
import platform
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from retro_engine.api import Retro
from retro_engine.data.builtin import write_facts
from retro_engine.data.prepare import prepare
from retro_engine.data.store import Store
from retro_engine.demo.facts import NUM_HELDOUT, STEPS, heldout_sequences, run_facts
from retro_engine.evaluate.facts import FactsResult, evaluate_facts
from retro_engine.progress import Reporter
from retro_engine.retrieval.neighbors import build_neighbors
from retro_engine.train.checkpoint import complete_checkpoints

RESULTS = Path(__file__).parent / "results" / "facts_seeds.json"
NEIGHBOR_COUNTS = (1, 2, 4, 8)


def run(init: str, seed: int, chunk_size: int, steps: int) -> dict[str, Any]:
    """One row: train, then every condition."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "demo"
        figures = run_facts(
            out, steps, init, seed=seed, is_gated=False, reporter=Reporter("quiet"), chunk_size=chunk_size
        )
        row: dict[str, Any] = {"init": init, "seed": seed, "chunk_size": chunk_size, "steps": steps}
        for mode in ("on", "off", "random"):
            keys = ("value_accuracy", "whole_values", "bits_per_byte")
            row |= {f"{key}_{mode}": round(figures[mode][key], 4) for key in keys}
        row["new_entity_right"] = sum(answer["is_right"] for answer in figures["new_entity"])
        row["trained_s"] = round(figures["trained_s"])
        retro = Retro.from_pretrained(complete_checkpoints(out / "run")[-1])
        heldout = Store(out / "store" / "heldout")
        for count in NEIGHBOR_COUNTS:
            sequences = heldout_sequences(retro, heldout, count)
            results = evaluate_facts(retro.model, sequences, out / "text" / "heldout.jsonl", ["one_right"])
            row[f"value_accuracy_one_right_of_{count}"] = round(results["one_right"].value_accuracy, 4)
        for mode, result in _unseen(retro, out, heldout).items():
            row[f"value_accuracy_unseen_{mode}"] = round(result.value_accuracy, 4)
        return row


def _unseen(retro: Retro, out: Path, heldout: Store) -> dict[str, FactsResult]:
    """The held-out people again, articles and notes in wordings that no training text has."""
    paths = write_facts(out / "unseen", 1, NUM_HELDOUT, 1, is_unseen=True)
    article, notes = (
        prepare([paths[name]], out / "unseen" / name, str(heldout.folder), chunk_size=heldout.chunk_size)
        for name in ("heldout", "notes")
    )
    build_neighbors(article, [notes], "bm25", num_neighbors=8, reporter=Reporter("quiet"))
    return evaluate_facts(retro.model, heldout_sequences(retro, article), paths["heldout"], ("on", "off", "random"))


def _one_thread(threads: int) -> None:
    torch.set_num_threads(threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--inits", nargs="+", default=["retrieval_ready"])
    parser.add_argument("--chunk-sizes", type=int, nargs="+", default=[32])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--workers", type=int, default=1, help="runs side by side; they share the processor's threads")
    args = parser.parse_args()
    rows = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []
    threads = max(1, torch.get_num_threads() // args.workers)
    wanted = itertools.product(args.inits, range(args.seeds), args.chunk_sizes, [args.steps])
    done = {(row["init"], row["seed"], row["chunk_size"], row["steps"]) for row in rows}
    with ProcessPoolExecutor(args.workers, get_context("spawn"), _one_thread, (threads,)) as pool:
        for future in as_completed([pool.submit(run, *key) for key in wanted if key not in done]):
            rows.append(future.result())
            print(json.dumps(rows[-1]), flush=True)
            RESULTS.parent.mkdir(exist_ok=True)
            machine = {
                "machine": platform.processor() or platform.machine(),
                "threads": threads,
                "torch": torch.__version__,
            }
            rows.sort(key=lambda row: (row["init"], row["chunk_size"], row["steps"], row["seed"]))
            RESULTS.write_text(json.dumps({**machine, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
