"""Runs the shards of a building stage here, in processes, or on Ray; any of them resumes any other's work.

A stage is a pure function (stage, shard) -> the bytes of one file. Every file is published with its completion
marker FILE.ok: JSON with the stage's fingerprint, the SHA-256 and the size. A shard is finished when its marker
says this stage and its file has that hash; all others are built, so after any interruption at most the shards
that were being built are lost (inline: one), and a damaged one is built again. Nothing else holds state.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retro_engine.data import files
from retro_engine.data.processes import end_with_parent, threads_each
from retro_engine.errors import OutOfResourceError, UsageError, extra, nearest, read_error
from retro_engine.progress import Reporter

EXECUTORS = ("inline", "processes", "ray")
MARKER = ".ok"
MAX_DEATHS = 3  # of worker processes, one after another without a finished shard between
RAY_DEATHS = 20  # of workers and nodes, in one stage
RAY_OLDEST = (2, 10)

Piece = bytes | memoryview


@dataclass(frozen=True)
class Stream:
    """A file made piece by piece: `parts` add up to `size` bytes, and are never held together."""

    size: int
    parts: Iterable[Piece]


@dataclass(frozen=True)
class Stage:
    """One kind of file to build. `spec` is JSON with all that decides the bytes; `paths` is where the inputs lie here."""

    name: str
    work: "Callable[[Stage, int], Sequence[Piece] | Stream]"  # a function of a module, so that other processes find it
    spec: str
    folder: Path
    outputs: tuple[str, ...]  # the file of each shard
    paths: tuple[str, ...] = ()
    is_stateful: bool = False  # holds a model: on Ray an actor
    gpus: float = 0.0  # of a GPU, on Ray

    @property
    def mark(self) -> str:
        return files.fingerprint([self.name, self.spec])


@dataclass(frozen=True)
class Executor:
    """Where shards are built. `workers`: processes or Ray tasks at once (None = one a core)."""

    kind: str = "inline"
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in EXECUTORS:
            close = nearest(self.kind, list(EXECUTORS))
            raise UsageError(f"executor {self.kind!r} does not exist", close, f"one of {', '.join(EXECUTORS)}")
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"--workers {self.workers} cannot be used", "at least one worker builds")

    @property
    def num_workers(self) -> int:
        return self.workers or len(os.sched_getaffinity(0))


def run_stage(stage: Stage, executor: Executor, reporter: Reporter) -> dict[str, str]:
    """Build what is not finished; return the SHA-256 of every file. The caller holds the folder's lock.

    Raises what the stage raises, and OutOfResourceError when its workers keep dying.
    """
    _remove_temporaries(stage)
    hashes: dict[str, str] = {}
    waiting: list[int] = []
    for shard, name in enumerate(stage.outputs):
        found, is_damaged = _finished(stage, name)
        if found is not None:
            hashes[name] = found
        else:
            waiting.append(shard)
            if is_damaged:
                reporter.say(f"{stage.folder / name} is damaged: it is built again")
    if hashes and waiting:
        reporter.say(f"{stage.name}: {len(hashes)} of {len(stage.outputs)} shards are there already")
    run = {"inline": _run_inline, "processes": _run_processes, "ray": _run_ray}[executor.kind]
    with reporter.progress(stage.name, len(waiting), "shards") as meter:
        for shard, digest in run(stage, waiting, executor) if waiting else ():
            hashes[stage.outputs[shard]] = digest
            meter.advance(1)
    return {name: hashes[name] for name in stage.outputs}


def build_shard(stage: Stage, shard: int) -> str:
    """Build and publish one shard and its marker, in whatever process this is; return its SHA-256."""
    made = stage.work(stage, shard)
    stream = made if isinstance(made, Stream) else Stream(sum(memoryview(part).nbytes for part in made), made)
    digest = hashlib.sha256()

    def hashed() -> Iterator[Piece]:
        for part in stream.parts:
            digest.update(part)
            yield part

    path = stage.folder / stage.outputs[shard]
    files.publish(path, hashed(), stream.size)
    marker = {"stage": stage.mark, "sha256": digest.hexdigest(), "bytes": stream.size}
    files.publish(path.with_name(path.name + MARKER), [json.dumps(marker, sort_keys=True).encode() + b"\n"])
    return digest.hexdigest()


def is_finished(stage: Stage) -> bool:
    """Whether every shard is there and whole."""
    return all(_finished(stage, name)[0] is not None for name in stage.outputs)


def remove_shards(stage: Stage) -> None:
    """Remove the files of a stage that nothing needs any more, each before its marker."""
    for name in stage.outputs:
        (stage.folder / name).unlink(missing_ok=True)
        (stage.folder / (name + MARKER)).unlink(missing_ok=True)


def _finished(stage: Stage, name: str) -> tuple[str | None, bool]:
    """The SHA-256 of a finished shard, else None; and whether it was finished by this stage and is damaged."""
    path = stage.folder / name
    try:
        marker = files.read_json(path.with_name(name + MARKER))
        is_own = marker["stage"] == stage.mark
        if is_own and path.stat().st_size == marker["bytes"] and files.sha256_file(path) == marker["sha256"]:
            return str(marker["sha256"]), False
        return None, is_own
    except FileNotFoundError:
        return None, False
    except OSError as error:
        raise read_error(error, path) from error
    except (ValueError, KeyError, TypeError):
        return None, True


def _remove_temporaries(stage: Stage) -> None:
    """Remove what writers that were killed left behind."""
    names = {f"{name}{end}" for name in stage.outputs for end in ("", MARKER)}
    for path in stage.folder.glob(".*.tmp"):
        found = re.fullmatch(r"\.(.+)\.\d+\.tmp", path.name)
        if found and found[1] in names:
            path.unlink(missing_ok=True)


def _run_inline(stage: Stage, shards: Sequence[int], executor: Executor) -> Iterator[tuple[int, str]]:
    for shard in shards:
        yield shard, build_shard(stage, shard)


def _run_processes(stage: Stage, shards: Sequence[int], executor: Executor) -> Iterator[tuple[int, str]]:
    """A pool of new processes; shards of workers that died are given to others."""
    from multiprocessing import get_context

    waiting, deaths = set(shards), 0
    workers = min(executor.num_workers, len(waiting))
    while waiting:
        with threads_each(max(1, len(os.sched_getaffinity(0)) // workers)):
            pool = ProcessPoolExecutor(workers, get_context("spawn"), end_with_parent)
            try:
                futures = {pool.submit(build_shard, stage, shard): shard for shard in sorted(waiting)}
                for future in as_completed(futures):
                    digest = future.result()
                    waiting.remove(futures[future])
                    deaths = 0
                    yield futures[future], digest
            except BrokenProcessPool as error:
                deaths += 1
                if deaths == MAX_DEATHS:
                    raise OutOfResourceError(
                        f"{stage.name}: a worker process died {deaths} times",
                        "something killed it; usually there was no memory left",
                        "the same command goes on where this ended; --workers 1 needs the least memory",
                    ) from error
            finally:
                pool.shutdown(cancel_futures=True)


def _run_ray(stage: Stage, shards: Sequence[int], executor: Executor) -> Iterator[tuple[int, str]]:
    """Ray tasks, or for stages that hold a model actors; shards of workers and nodes that died are built elsewhere."""
    ray = connect_ray(executor.workers)
    share = {"num_cpus": 1, "num_gpus": stage.gpus}
    workers = min(len(shards), executor.workers or max(1, int(ray.cluster_resources().get("CPU", 1))))
    task = ray.remote(build_shard).options(**share, max_retries=0)  # what is lost is given out again below
    builder = ray.remote(_Builder).options(**share)
    actors: dict[int, Any] = {}
    waiting = list(reversed(shards))
    free = [] if stage.is_stateful else list(range(workers))
    running: dict[Any, tuple[int | None, int]] = {}  # shard and slot; None: an actor that is being started
    missing, deaths = set(shards), 0

    def start(slot: int) -> None:  # an actor gets its first shard when it is there: a lost node may leave no room
        actors[slot] = builder.remote(stage)
        running[actors[slot].ready.remote()] = None, slot

    try:
        for slot in range(workers) if stage.is_stateful else ():
            start(slot)
        while missing:
            while waiting and free:
                shard, slot = waiting.pop(), free.pop()
                job = actors[slot].build.remote(shard) if stage.is_stateful else task.remote(stage, shard)
                running[job] = shard, slot
            for job in ray.wait(list(running), num_returns=1)[0]:
                done, slot = running.pop(job)
                try:
                    digest = ray.get(job)
                except ray.exceptions.RayTaskError as error:
                    raise (error.cause if isinstance(error.cause, Exception) else error) from error
                except ray.exceptions.RayError as error:  # its process, actor or node is gone
                    deaths += 1
                    if deaths > RAY_DEATHS:
                        raise _ray_lost(stage, error) from error
                    waiting += [done] if done is not None else []
                    if stage.is_stateful:
                        start(slot)
                        continue
                else:
                    if done is not None:
                        missing.remove(done)
                        yield done, digest
                free.append(slot)
    finally:
        for job in running if not stage.is_stateful else ():
            ray.cancel(job, force=True)
        for actor in actors.values():
            ray.kill(actor)


def _ray_lost(stage: Stage, error: Exception) -> OutOfResourceError:
    return OutOfResourceError(
        f"{stage.name}: Ray lost {RAY_DEATHS + 1} workers",
        f"the last: {type(error).__name__}",
        "the same command goes on where this ended",
    )


class _Builder:
    """A Ray actor: what the stage keeps open (a model) stays open between its shards."""

    def __init__(self, stage: Stage):
        self.stage = stage

    def ready(self) -> None:
        pass

    def build(self, shard: int) -> str:
        return build_shard(self.stage, shard)


def connect_ray(workers: int | None = None) -> Any:
    """The module ray, connected: to RAY_ADDRESS where that is set, else to a local cluster of its own.

    Raises MissingExtraError, or UsageError for a version or a cluster that cannot be used.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    with extra("ray", "--executor ray needs Ray"):
        import ray
    version = tuple(int(part) for part in ray.__version__.split(".")[:2])
    if version < RAY_OLDEST:
        raise UsageError(
            f"Ray {ray.__version__} is too old", f"{RAY_OLDEST[0]}.{RAY_OLDEST[1]} or newer", "pip install -U ray"
        )
    if ray.is_initialized():
        return ray
    address = os.environ.get("RAY_ADDRESS")
    local: dict[str, Any] = {} if address else {"num_cpus": workers, "include_dashboard": False}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
    except (RuntimeError, ConnectionError, ValueError) as error:  # also another version of Ray or Python over there
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"Ray cannot be used at {address or 'this machine'}", first, "RAY_ADDRESS names a cluster"
        ) from error
    return ray
