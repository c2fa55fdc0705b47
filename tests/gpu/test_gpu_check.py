"""The steps of benchmarks/gpu_check.sh, on a machine without a GPU: each is recorded, none stops the others."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from retro_kernels.traffic import PREDICTED

from retro_engine.bench.checkout import ROOT, load

gpu_check = load("gpu_check")


def shell(part: int, name: str, *scripts: str, limit_s: float = 20, needs: str = "") -> object:
    return gpu_check.Step(part, name, [["sh", "-c", script] for script in scripts], limit_s, needs)


def test_every_step_is_recorded_and_none_stops_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [
        shell(1, "fails", "echo why; exit 3"),
        shell(1, "absent", "true", needs="a-program-that-nobody-has"),
        gpu_check.Step(1, "broken", [[str(tmp_path / "no-such-file")]], 20),
        shell(1, "half", "exit 0", "exit 1"),
        shell(1, "none-collected", "exit 0", "exit 5"),
        gpu_check.Step(1, "built", [["false"]], 20, is_needed=lambda: False),
        shell(2, "slow", "echo so far; sleep 60", limit_s=5.2),
        shell(2, "measures", "mkdir -p $RETRO_GPU_OUT/rope && echo {} > $RETRO_GPU_OUT/rope/kernels.json"),
    ]
    out = tmp_path / "results"
    gpu_check.check(out, [1], steps)
    first = json.loads((out / "check.json").read_text())["steps"]
    assert {step["name"]: step["status"] for step in first} == {
        "fails": "failed",
        "absent": "not there",
        "broken": "failed",
        "half": "failed",
        "none-collected": "passed",
        "built": "not needed",
    }
    gpu_check.check(out, [2], steps, part_s=1.5)
    both = json.loads((out / "check.json").read_text())["steps"]
    assert both[: len(first)] == first, "another part leaves what was found before"
    assert [step["status"] for step in both[len(first) :]] == ["timed out", "no time"]
    assert (out / "slow.log").read_text() == "so far\n"
    gpu_check.check(out, [2], steps[-1:])
    assert Counter(step["part"] for step in json.loads((out / "check.json").read_text())["steps"]) == {1: 6, 2: 1}
    assert (out / "rope" / "kernels.json").is_file()
    assert "    why" in capsys.readouterr().out


def test_a_part_fits_ten_minutes_and_the_command_is_refused_without_a_folder(
    capsys: pytest.CaptureFixture[str],
) -> None:
    steps = gpu_check.steps("90")
    assert gpu_check.PART_S < 600 and {step.part for step in steps} == {1, 2}
    assert len({step.name for step in steps}) == len(steps)
    for arguments in ([], ["out", "3"], ["out", "1", "2"]):
        assert gpu_check.main(arguments) == 2
        assert "gpu_check.sh results-gpu 1" in capsys.readouterr().err


def test_the_page_has_what_is_predicted() -> None:
    page = (ROOT / "docs" / "kernels.md").read_text()
    assert len(PREDICTED) == 10
    for case, share in PREDICTED.items():
        size = case.replace(" fwd+bwd", "").replace(" fwd", "").split()[-1]
        row = next(
            line
            for line in page.splitlines()
            if line.startswith("|") and size in line and case[:4].lower() in line.lower()
        )
        assert f"| .{round(100 * share)} |" in row, f"{case}: {share}"


def test_what_it_measures_with_needs_torch_alone(tmp_path: Path) -> None:
    """Every package but torch, triton and what these import is hidden."""
    script = """
import sys, torch
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HIDDEN}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
import gpu_bench
gpu_bench.compare(gpu_bench.Path("nowhere"))
""".replace("{HIDDEN}", repr({"numba", "zstandard", "yaml", "faiss", "bm25s", "apsw", "hydra", "omegaconf", "jinja2"}))
    environment = gpu_check.environment(tmp_path)
    run = subprocess.run([sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
