"""The steps of gpu_check.sh: `python benchmarks/gpu_check.py OUT [1|2]`, with nothing but Python's own library.

Each step is one command (or several side by side) with a limit of time and a log OUT/STEP.log; what became of it stands in
OUT/check.json after every step, so that a run that is cut off leaves what it has. No step stops the others. The package
is used from this checkout: OUT/site has links by the names that it is imported by, also where pip cannot install it.
It is pytest's plugin for shards as well: SHARD=i/n keeps every n-th test.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PART_S = 570  # of the ten minutes that a part may take
LEAST_S = 1  # with less left, a step is not begun
SHARDS = min(12, os.cpu_count() or 1)
CUDA_SOURCE = ROOT / "csrc/cuda/kernels.cu"
PYTEST = ["-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-p", "gpu_check", "-rfE", "--tb=short"]


@dataclass(frozen=True)
class Step:
    """Commands that run side by side, together at most `limit_s`; `needs` is a program without which there is none."""

    part: int
    name: str
    commands: Sequence[Sequence[str]]
    limit_s: float
    needs: str = ""
    is_needed: Callable[[], bool] = field(default=lambda: True, compare=False)


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    shard, shards = map(int, os.environ.get("SHARD", "0/1").split("/"))
    items[:] = items[shard::shards]


def is_unbuilt() -> bool:
    """Whether there is no CUDA library as new as its source."""
    return not any(path.stat().st_mtime >= CUDA_SOURCE.stat().st_mtime for path in (ROOT / "kernels").glob("_cuda*.so"))


def sharded(*arguments: str) -> list[list[str]]:
    """pytest with these arguments, as processes of an n-th each."""
    python = [sys.executable, *PYTEST, *arguments]
    return [["env", f"SHARD={i}/{SHARDS}", *python] for i in range(SHARDS)]


def bench(part: str, *dtypes: str) -> Step:
    name = "-".join(("bench", part, *dtypes))
    command = [sys.executable, str(ROOT / "benchmarks/gpu_bench.py"), part, *dtypes]
    return Step(2, name, [command], 180)


def steps(capability: str) -> list[Step]:
    """In the order of their worth: what is cut off by the end of a part is the last."""
    python = sys.executable
    versions = "import sys, torch, triton; print(sys.version, torch.__version__, torch.version.cuda, triton.__version__, torch.cuda.get_device_properties(0))"
    query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,compute_cap,utilization.gpu"
    pip = [python, "-m", "pip", "install", "--no-index", "--no-build-isolation", "--no-deps", "-e", str(ROOT)]
    options = ["-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", f"-arch=sm_{capability}"]
    nvcc = ["nvcc", *options, "-o", str(ROOT / "kernels/_cuda.so"), str(CUDA_SOURCE)]
    sanitizer = [
        "compute-sanitizer",
        "--tool",
        "memcheck",
        "--error-exitcode",
        "9",
        python,
        *PYTEST,
        "tests/gpu/test_cuda.py",
    ]
    few = ["-k", "(test_gathering or test_rope) and not float32"]
    return [
        Step(1, "card", [["nvidia-smi", query, "--format=csv"]], 30, "nvidia-smi"),
        Step(1, "versions", [[python, "-c", versions]], 60),
        Step(1, "build", [nvcc], 120, "nvcc", is_needed=is_unbuilt),
        Step(1, "tests", sharded("tests/gpu/test_cuda.py"), 300),
        Step(1, "machine-code", sharded("tests/gates/test_compile.py", "-k", f"{capability}]"), 180),
        Step(1, "sanitizer", [[*sanitizer, *few]], 120, "compute-sanitizer"),
        Step(1, "install", [pip], 240),  # for the package's other extensions: what is above needs none
        bench("cross", "bf16"),
        bench("rope", "bf16"),
        bench("self", "bf16"),
        bench("gather"),
        bench("cross", "fp16"),
        bench("rope", "fp16"),
        Step(2, "predictions", [[python, str(ROOT / "benchmarks/gpu_bench.py"), "compare"]], 60),
    ]


def capability() -> str:
    """Of the first GPU, 90 for 9.0; 90 where the driver does not say."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        said = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.split()
        if said and said[0].replace(".", "").isdigit():
            return said[0].replace(".", "")
    return "90"


def environment(out: Path) -> dict[str, str]:
    """Names that the package is imported by, as links to this checkout."""
    site = out / "site"
    site.mkdir(parents=True, exist_ok=True)
    for name, folder in (("retro_kernels", "kernels"), ("retro_engine", "retro_engine")):
        if not (site / name).is_symlink():
            (site / name).symlink_to(ROOT / folder)
    path = os.pathsep.join(map(str, (site, ROOT / "benchmarks", *filter(None, [os.environ.get("PYTHONPATH")]))))
    return os.environ | {"PYTHONPATH": path, "RETRO_GPU_OUT": str(out), "OMP_NUM_THREADS": "4", "PYTHONUNBUFFERED": "1"}


@dataclass
class Done:
    """What became of a step: passed, failed, timed out, not there (a program is missing), no time, not needed."""

    part: int
    name: str
    status: str
    seconds: float = 0.0
    codes: list[int | None] = field(default_factory=list)


def run(step: Step, out: Path, left_s: float) -> Done:
    if not step.is_needed():
        return Done(step.part, step.name, "not needed")
    if step.needs and not shutil.which(step.needs):
        return Done(step.part, step.name, "not there")
    limit_s = min(step.limit_s, left_s)
    if limit_s < LEAST_S:
        return Done(step.part, step.name, "no time")
    start = time.monotonic()
    logs = [out / f"{step.name}{f'-{i}' if len(step.commands) > 1 else ''}.log" for i in range(len(step.commands))]
    processes: list[subprocess.Popen[bytes] | None] = []
    for command, log in zip(step.commands, logs, strict=True):
        with log.open("wb") as file:
            try:
                processes.append(
                    subprocess.Popen(
                        command,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        cwd=ROOT,
                        env=environment(out),
                        start_new_session=True,
                    )
                )
            except OSError as error:
                file.write(f"error: {error}\n".encode())
                processes.append(None)
    codes = [None if process is None else _end(process, start + limit_s) for process in processes]
    is_late = time.monotonic() - start >= limit_s
    # pytest: 5 = this shard has no test; all skipped (no GPU) is no pass either
    passes = all(code in (0, 5) for code in codes) and 0 in codes and not _is_skipped(step, logs)
    status = "passed" if passes else "timed out" if is_late else "failed"
    return Done(step.part, step.name, status, round(time.monotonic() - start, 1), codes)


def _end(process: subprocess.Popen[bytes], deadline: float) -> int:
    try:
        return process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def _is_skipped(step: Step, logs: list[Path]) -> bool:
    if not any("pytest" in command for command in step.commands):
        return False
    said = "".join(log.read_text(errors="replace") for log in logs)
    return "skipped" in said and " passed" not in said


def check(out: Path, parts: Sequence[int], todo: Sequence[Step], part_s: float = PART_S) -> list[Done]:
    """Every step of these parts, whatever becomes of the others; those of another part that ran before stay recorded."""
    out.mkdir(parents=True, exist_ok=True)
    record = out / "check.json"
    old = json.loads(record.read_text())["steps"] if record.is_file() else []
    done = [Done(**step) for step in old if step["part"] not in parts]
    for part in parts:
        end = time.monotonic() + part_s
        for step in (step for step in todo if step.part == part):
            found = run(step, out, end - time.monotonic())
            done.append(found)
            whole = {"steps": [asdict(one) for one in sorted(done, key=lambda one: one.part)]}
            record.with_suffix(".new").write_text(json.dumps(whole, indent=1) + "\n")
            record.with_suffix(".new").replace(record)
            print(f"part {part}: {found.name:16} {found.status:10} {found.seconds:6.1f} s", flush=True)
            for log in sorted(out.glob(f"{step.name}*.log")) if found.status in ("failed", "timed out") else []:
                print(
                    "".join(f"    {line}\n" for line in log.read_text(errors="replace").splitlines()[-4:]),
                    end="",
                    flush=True,
                )
    return done


def main(arguments: Sequence[str]) -> int:
    if not arguments or len(arguments) > 2 or (len(arguments) == 2 and arguments[1] not in ("1", "2")):
        print("error: expected a folder and at most one part\n  a part is 1 (checks) or 2 (measures)", file=sys.stderr)
        print("  bash benchmarks/gpu_check.sh results-gpu 1", file=sys.stderr)
        return 2
    out = Path(arguments[0]).resolve()
    parts = [int(arguments[1])] if len(arguments) == 2 else [1, 2]
    done = check(out, parts, steps(capability()))
    print(f"written: {out}/check.json, a log for each step, and what was measured")
    return int(any(one.status in ("failed", "timed out", "no time") for one in done if one.part in parts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
