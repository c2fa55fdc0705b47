"""Runs of workloads.py with the calls of their folder recorded or made to fail."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from reliability.replay import Event, Tree, read_log, tree_of
from reliability.workloads import Place

TESTS = Path(__file__).parents[1]
CAMPAIGN = bool(os.environ.get("RETRO_CAMPAIGN"))
SEED = int(os.environ.get("RETRO_SEED", "0"))
WRITE, SYNC, OPEN, RENAME, LINK, MKDIR, ALLOCATE, MMAP, READ, UNLINK = (1 << place for place in range(10))
SHORT = -1
FAULTS = {  # what may fail, and how
    errno.ENOSPC: WRITE | OPEN | RENAME | LINK | MKDIR | ALLOCATE,
    errno.EIO: WRITE | SYNC | OPEN | RENAME | LINK | MKDIR | ALLOCATE | READ,
    errno.EDQUOT: WRITE | OPEN | MKDIR | ALLOCATE,
    errno.EINTR: WRITE | OPEN | READ,
    errno.ENOMEM: MMAP,
    errno.EMFILE: OPEN,
    SHORT: WRITE,
}


def counted(text: str) -> str:
    """A line of the campaign, with what it takes to have it again."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=TESTS)
    return f"\n{text}, seed {SEED}, commit {found.stdout.strip() or 'unknown'}"


class Runs:
    """A process in whose forks workloads run, with calls.c preloaded."""

    def __init__(self, folder: Path):
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None or not sys.platform.startswith("linux"):
            pytest.skip("calls are recorded by a library in C: there is no compiler, or no Linux")
        library = folder / "calls.so"
        source = Path(__file__).with_name("calls.c")
        done = subprocess.run([compiler, "-O1", "-fPIC", "-shared", "-o", library, source, "-ldl", "-lpthread"])
        assert done.returncode == 0
        path = os.pathsep.join([str(TESTS), *sys.path])
        environment = os.environ | {"PYTHONPATH": path, "LD_PRELOAD": str(library), "TOKENIZERS_PARALLELISM": "false"}
        environment["RETRO_PRODUCTS"] = "blas"  # else every run times both
        environment |= {
            "OMP_NUM_THREADS": "1",
            "NUMBA_THREADING_LAYER": "workqueue",
        }  # GNU OpenMP does not outlive a fork
        program = [sys.executable, str(Path(__file__).with_name("workloads.py")), str(library)]
        self._server = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()

    def ask(self, workload: str, place: Place, what: str, **more: Any) -> dict[str, Any]:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        parts = [str(part) for part in (place.root, place.store, place.encoder, place.decoder)]
        request = {"workload": workload, "place": parts, "what": what, **more}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer: dict[str, Any] = json.loads(self._server.stdout.readline())
        return answer

    def recorded(self, workload: str, place: Place) -> tuple[Tree, list[Event]]:
        """What was there at first, and what happened."""
        answer = self.ask(workload, place, "begin")
        assert not answer, answer["text"]
        before, log = tree_of(place.root), place.root.with_name(f"{workload}.log")
        answer = self.ask(workload, place, "act", log=str(log))
        assert "raised" not in answer, answer["trace"]
        return before, read_log(log)
