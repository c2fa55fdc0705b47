"""What a job in shards costs above its work: 60 s of 1 s shards and 1 MiB; inline, in processes, on Ray where it is.

The work is waiting, so that starting, hashing and publishing are measured and not the cores.
"""

import importlib.util
import json
import os
import tempfile
import time
from pathlib import Path

from retro_engine.bench.frame import Measured, Options, Spread, at_most, compared
from retro_engine.progress import Reporter
from retro_engine.retrieval.executor import Executor, Stage, run_stage

SHARDS = 60
WORKERS = {"inline": 1, "processes": 2, "ray": 2}
MOST = {"inline": 0.05, "ray": 0.3}


def run(options: Options) -> Measured:
    kinds = [kind for kind in WORKERS if kind != "ray" or importlib.util.find_spec("ray")]
    # where Ray's workers find this module
    os.environ["PYTHONPATH"] = os.pathsep.join((str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")))
    times, overhead = {}, {}
    with tempfile.TemporaryDirectory() as name:
        for kind in kinds:
            folder = Path(name) / kind
            folder.mkdir()
            names = tuple(f"{number}.bin" for number in range(SHARDS * WORKERS[kind]))
            stage = Stage("wait", wait_a_second, json.dumps({"bytes": 1 << 20}), folder, names)
            start = time.perf_counter()
            run_stage(stage, Executor(kind, WORKERS[kind]), Reporter("quiet"))
            times[kind] = Spread.of([time.perf_counter() - start])
            overhead[kind] = times[kind].median / SHARDS - 1
    rows = compared(f"{SHARDS} s in shards of 1 s", times)
    for row in rows:
        row.note = f"{overhead[row.implementation]:.1%} above the work itself"
    targets = [at_most(f"{kind}: share above the work itself", overhead.get(kind), most) for kind, most in MOST.items()]
    return Measured(rows, targets)


def wait_a_second(stage: Stage, shard: int) -> list[bytes]:
    """A second that any core can give, however many share it, and a file."""
    time.sleep(1)
    return [bytes(1 << 20)]
