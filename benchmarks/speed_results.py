"""What README says of speed, and of `make demo`, for text_results.py (make results): every bench in a process of its own, one after
the other, on a machine that does nothing else. A bench that cannot run here (no `make peers`, no model) is named with its reason.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from retro_engine.bench.frame import Target
from retro_engine.data import files
from retro_engine.demo.facts import run_facts
from retro_engine.progress import Reporter

BENCHES = {
    "kernels": ["kernels"],
    "rivals, bf16": ["rivals", "--weights", "bf16"],
    "rivals, 8 bits": ["rivals", "--weights", "int8"],
    "rivals, 4 bits": ["rivals", "--weights", "int4"],
    "reader": ["reader", "--parts", "ask", "first token", "--text"],  # and the questions' file
    "service": ["service"],
}
Part = dict[str, Any]


def speed(squad: Path | None) -> Part:
    """`squad`: SQuAD's development file, whose passages `retro ask` searches; None = it is left out."""
    benches = {name: words for name, words in BENCHES.items() if name != "reader"}
    if squad is not None:
        benches["reader"] = [*BENCHES["reader"], str(squad)]
    return joined({name: measured(words) for name, words in benches.items()})


def measured(words: list[str]) -> Part:
    """The last line of a bench, or why there is none."""
    command = [sys.executable, "-m", "retro_engine.bench", *words]
    ended = subprocess.run(command, capture_output=True, text=True)
    print(ended.stdout, end="", flush=True)
    if ended.returncode:
        return {"error": " ".join(ended.stderr.split())[-300:]}
    found: Part = json.loads(ended.stdout.splitlines()[-1])
    return found


def joined(found: dict[str, Part]) -> Part:
    """Every row that was measured, by bench; the verdicts of a busy machine do not count and are not kept."""
    shown: dict[str, Any] = {}
    targets: dict[str, Any] = {}
    for name, part in found.items():
        if "error" in part:
            shown[name] = f"not measured: {part['error']}"
            continue
        rows = {row: of for row, of in part["targets"].items() if of["value"] is not None}
        is_busy = part.get("busy", False)
        shown |= {f"{name}: {row}": f"{of['value']:.3g}{' (busy)' * is_busy}" for row, of in rows.items()}
        if not is_busy:
            targets |= {f"{name}: {row}": of for row, of in rows.items()}
    return {"shown": shown, "targets": targets}


def demo(out: Path, reporter: Reporter) -> Part:
    """`make demo`'s proof and its figures; the same again where its folder is there."""
    folder = out / "demo"
    if not (folder / "demo.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        run_facts(folder, is_gated=False, reporter=reporter)
    made = files.read_object(folder / "demo.json")
    right = {f"{mode}: value tokens right": f"{of['value_accuracy']:.3f}" for mode, of in made.items() if _is_mode(of)}
    return {"shown": {**right, "seconds of training": f"{made['trained_s']:.0f}"}, "demo": made}


def _is_mode(of: Any) -> bool:
    return isinstance(of, dict) and "value_accuracy" in of


def targets_of(part: Part | None) -> list[Target]:
    """The benches' own, which their verdicts tell apart."""
    kept = {} if part is None else part["targets"]
    found = []
    for row, of in kept.items():
        is_at_most = (of["value"] <= of["target"]) == of["holds"]
        found.append(Target(row=row, value=of["value"], target=of["target"], is_at_most=is_at_most))
    return found
