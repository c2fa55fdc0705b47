"""Stages of building: the same bytes inline, in processes and on Ray, after kills, faults, damage and lost nodes."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from retro_engine.data import files
from retro_engine.errors import MissingExtraError, OutOfResourceError, RetroError, StoreError, UsageError
from retro_engine.progress import Reporter
from retro_engine.retrieval.executor import Executor, Piece, Stage, Stream, connect_ray, remove_shards, run_stage

QUIET = Reporter("quiet")
ROOT = Path(__file__).resolve().parents[2]
CAMPAIGN = bool(os.environ.get("RETRO_CAMPAIGN"))
FORK = multiprocessing.get_context("fork")  # what is killed need not import everything again


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers import `numbers` by this module's name."""
    monkeypatch.syspath_prepend(str(ROOT))


def numbers(stage: Stage, shard: int) -> Sequence[Piece] | Stream:
    """The work of the tests: `size` bytes that depend on spec and shard; slow, failing or deadly when told to be."""
    spec = json.loads(stage.spec)
    time.sleep(spec.get("sleep_s", 0))
    if shard in spec.get("bad", ()):
        raise StoreError(f"shard {shard} cannot be built", "the test says so", "nothing")
    lives = Path(stage.paths[0]) if stage.paths else None
    if lives is not None and shard == 1 and len(list(lives.iterdir())) < spec["deaths"]:
        (lives / f"{time.time_ns()}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    raw = random.Random(f"{spec['seed']}-{shard}").randbytes(spec["size"])
    return Stream(len(raw), (raw[i : i + 100] for i in range(0, len(raw), 100))) if shard % 2 else [raw]


def stage_in(folder: Path, shards: int = 6, paths: tuple[str, ...] = (), **spec: object) -> Stage:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"seed": 0, "size": 5000, **spec}, sort_keys=True)
    return Stage("numbers", numbers, text, folder, tuple(f"n-{i}.bin" for i in range(shards)), paths)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_processes_equal_inline_and_nothing_is_built_twice(tmp_path: Path) -> None:
    one = run_stage(stage_in(tmp_path / "a"), Executor(), QUIET)
    two = run_stage(stage_in(tmp_path / "b"), Executor("processes", 2), QUIET)
    assert one == two == {f"n-{i}.bin": files.sha256_file(tmp_path / "a" / f"n-{i}.bin") for i in range(6)}
    assert content(tmp_path / "a") == content(tmp_path / "b")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    assert run_stage(stage_in(tmp_path / "a"), Executor(), QUIET) == one
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    other = run_stage(stage_in(tmp_path / "a", seed=1), Executor(), QUIET)  # another spec: nothing of it may stay
    assert not set(other.values()) & set(one.values())
    remove_shards(stage_in(tmp_path / "a"))
    assert content(tmp_path / "a") == {}


def test_a_damaged_shard_is_built_again_and_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = stage_in(tmp_path)
    whole = run_stage(stage, Executor(), QUIET)
    for name, change in (("n-1.bin", lambda raw: raw[:-3]), ("n-2.bin", lambda raw: raw[:7] + b"\0\1" + raw[9:])):
        path = tmp_path / name
        raw = path.read_bytes()
        path.unlink()
        path.write_bytes(change(raw))
    (tmp_path / "n-3.bin.ok").unlink()
    (tmp_path / "n-3.bin.ok").write_bytes(b"\x93NUMPY{")
    assert run_stage(stage, Executor(), Reporter("text")) == whole
    said = capsys.readouterr().err
    assert [f"n-{i}.bin is damaged: it is built again" in said for i in range(4)] == [False, True, True, True]
    assert "3 of 6 shards are there already" in said


def test_every_bit_flip_of_file_or_marker_is_found(tmp_path: Path) -> None:
    stage = stage_in(tmp_path, shards=1, size=300)
    run_stage(stage, Executor(), QUIET)
    whole = content(tmp_path)
    rng = random.Random(0)
    for _ in range(20_000 if CAMPAIGN else 200):
        name = rng.choice(sorted(whole))
        raw = bytearray(whole[name])
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        (tmp_path / name).unlink()
        (tmp_path / name).write_bytes(raw)
        run_stage(stage, Executor(), QUIET)
        found = content(tmp_path)
        assert found["n-0.bin"] == whole["n-0.bin"]
        assert json.loads(found["n-0.bin.ok"])["sha256"] == json.loads(whole["n-0.bin.ok"])["sha256"]


@pytest.mark.parametrize("kind", ["inline", "processes"])
def test_the_stages_own_error_arrives(tmp_path: Path, kind: str) -> None:
    stage = stage_in(tmp_path, bad=[3])
    with pytest.raises(StoreError, match="shard 3 cannot be built"):
        run_stage(stage, Executor(kind, 1), QUIET)
    assert (tmp_path / "n-2.bin.ok").exists()
    assert not (tmp_path / "n-3.bin").exists()


def test_killed_workers_are_replaced_and_at_last_given_up(tmp_path: Path) -> None:
    (tmp_path / "lives").mkdir()
    paths = (str(tmp_path / "lives"),)
    whole = run_stage(stage_in(tmp_path / "a", deaths=0), Executor(), QUIET)
    again = run_stage(stage_in(tmp_path / "b", paths=paths, deaths=2), Executor("processes", 1), QUIET)
    assert list(again.values()) == list(whole.values())
    with pytest.raises(OutOfResourceError, match="died 3 times"):
        run_stage(stage_in(tmp_path / "c", paths=paths, deaths=99), Executor("processes", 1), QUIET)


SCRIPT = """
import sys; from pathlib import Path
sys.path[:0] = [{tests!r}]
from test_executor import *
run_stage(stage_in(Path(sys.argv[1]), shards=20, sleep_s=0.01), Executor(sys.argv[2], 2), QUIET)
"""


def test_kill_9_at_any_time_and_any_executor_goes_on(tmp_path: Path) -> None:
    """Killed when a random number of shards is there; another executor continues, and redoes none that is finished."""
    whole = run_stage(stage_in(tmp_path / "whole", shards=20, sleep_s=0.01), Executor(), QUIET)
    rng = random.Random(1)
    for number in range(1000 if CAMPAIGN else 10):
        folder = tmp_path / f"k{number}"
        executor = Executor("processes" if number % 10 == 0 else "inline", 2)
        stage = stage_in(folder, shards=20, sleep_s=0.01)
        process = FORK.Process(target=run_stage, args=(stage, executor, QUIET))
        process.start()
        target = rng.randrange(20)
        while process.is_alive() and len(list(folder.glob("n-*.ok"))) < target:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.02)
        process.kill()
        process.join()
        if executor.kind == "processes":
            time.sleep(0.3)  # its workers notice
        before = {path.name: path.stat().st_mtime_ns for path in folder.glob("n-*.ok")}
        found = run_stage(stage, Executor(), QUIET)
        assert found == whole, f"kill {number} at {target}"
        assert content(folder) == content(tmp_path / "whole"), f"kill {number} at {target}"
        assert all((folder / name).stat().st_mtime_ns == time_ns for name, time_ns in before.items())
        shutil.rmtree(folder)


def test_the_kth_io_call_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every call in turn: a typed error, finished shards untouched, and the same command then finishes."""
    whole = run_stage(stage_in(tmp_path / "whole", shards=3), Executor(), QUIET)
    for call in ("posix_fallocate", "fsync", "chmod", "replace"):
        for kind in (errno.ENOSPC, errno.EIO):
            for k in range(1000):
                folder = tmp_path / f"{call}-{kind}-{k}"
                real, count = getattr(os, call), 0
                with monkeypatch.context() as patch:

                    def failing(*given: object, real: object = real, k: int = k, kind: int = kind) -> object:
                        nonlocal count
                        count += 1
                        if count == k + 1:
                            raise OSError(kind, os.strerror(kind))
                        return real(*given)  # type: ignore[operator]

                    patch.setattr(os, call, failing)
                    error = None
                    try:
                        run_stage(stage_in(folder, shards=3), Executor(), QUIET)
                    except RetroError as found:
                        error = found
                if error is None:
                    assert k >= 6, "three files and three markers"
                    break
                assert str(folder) in str(error)
                assert not list(folder.glob(".*.tmp"))
                assert run_stage(stage_in(folder, shards=3), Executor(), QUIET) == whole
                assert content(folder) == content(tmp_path / "whole")


def test_an_executor_that_does_not_exist() -> None:
    with pytest.raises(UsageError, match="did you mean processes"):
        Executor("process")
    with pytest.raises(UsageError, match="--workers 0"):
        Executor("processes", 0)


def test_ray_that_is_missing_or_old(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ray", None)
        with pytest.raises(MissingExtraError, match=r"retro-engine\[ray\]"):
            connect_ray()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ray", type(sys)("ray"))
        sys.modules["ray"].__version__ = "2.3.1"
        with pytest.raises(UsageError, match=r"Ray 2.3.1 is too old"):
            connect_ray()


def test_ray_is_imported_only_when_asked_for(tmp_path: Path) -> None:
    code = (
        SCRIPT.format(tests=str(Path(__file__).parent)) + "import sys; assert 'ray' not in sys.modules, 'ray is loaded'"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x"), "inline"], env=environment, check=True)


def test_ray_with_a_node_killed_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes, one killed while it works, tasks and actors: byte-identical to inline."""
    pytest.importorskip("ray", reason="Ray is not installed")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{Path(__file__).parent}")
    code = """
from test_executor import *
import os, sys, threading, time; from dataclasses import replace; from pathlib import Path
from test_executor import *
from ray.cluster_utils import Cluster
quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 300, "health_check_failure_threshold": 3}
head = {"num_cpus": 1, "include_dashboard": False, "_system_config": quick}
cluster = Cluster(initialize_head=True, head_node_args=head)
os.environ["RAY_ADDRESS"] = cluster.address
ray = connect_ray()
for name in ("tasks", "actors"):
    node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    stage = replace(stage_in(Path(sys.argv[1]) / name, shards=8, sleep_s=0.15), is_stateful=name == "actors")
    def kill():
        while not list(stage.folder.glob("*.ok")):
            time.sleep(0.05)
        cluster.remove_node(node, allow_graceful=False)
    killer = threading.Thread(target=kill); killer.start()
    run_stage(stage, Executor("ray"), QUIET)
    killer.join()
ray.shutdown(); cluster.shutdown()
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr[-3000:]
    run_stage(stage_in(tmp_path / "whole", shards=8, sleep_s=0.15), Executor(), QUIET)
    assert content(tmp_path / "tasks") == content(tmp_path / "actors") == content(tmp_path / "whole")
