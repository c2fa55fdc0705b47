"""What a run writes down: run.json, config.yaml, metrics.jsonl, TensorBoard events, WandB.

metrics.jsonl has one JSON object a line, each with its step (record.py has the checksums), which sums up what happened
since the line before (`Window`); after a resume the lines past the resumed step are dropped, so that the file tells of
one run.
"""

import math
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retro_engine.config import Config, ModelConfig, flat_keys
from retro_engine.data import files
from retro_engine.data.batches import SequenceBatch
from retro_engine.errors import MissingExtraError, extra, writing
from retro_engine.model.flops import training_flops
from retro_engine.progress import Reporter
from retro_engine.train import record
from retro_engine.train.places import with_absolute_paths
from retro_engine.version import __version__

PERFORMANCE = ("tokens_per_s", "mfu", "data_wait", "peak_mib", "train_s")


@dataclass
class StepResult:
    """Mean loss of a step's labels, gradient norm, learning rate, and its tokens in all processes."""

    loss: float
    norm: float
    rate: float
    tokens: int


def tag(name: str) -> str:
    """What a tracker shows a figure under: a group of charts for how it learns, how good it is, and how fast."""
    if name.startswith("valid_"):
        return f"valid/{name.removeprefix('valid_')}"
    return f"perf/{name}" if name in PERFORMANCE else f"train/{name}"


def peak_mib() -> float:
    """Peak resident memory of this process so far."""
    with open("/proc/self/status") as file:
        return next((int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM")), 0.0)


class Window:
    """What happened since the last log line."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.rate, self.tokens, self.flops, self.seconds, self.waited = 0.0, 0, 0.0, 0.0, 0.0

    def add(
        self, result: StepResult, seconds: float, waited: float, config: ModelConfig, batches: list[SequenceBatch]
    ) -> None:
        """Count one step, of whose seconds so many were spent waiting for its batches."""
        self.waited += waited
        self.losses.append(result.loss)
        self.norms.append(result.norm)
        self.rate, self.seconds, self.tokens = result.rate, self.seconds + seconds, self.tokens + result.tokens
        for batch in batches:
            tokens = int((batch.document_ids >= 0).sum())
            neighbor_tokens = 0 if batch.lengths is None else int(batch.lengths.sum())
            self.flops += training_flops(config, tokens, neighbor_tokens)

    def figures(self) -> dict[str, float]:
        """What the line of progress shows; nothing before the first step."""
        if not self.losses:
            return {}
        return {"loss": float(np.mean(self.losses)), "tokens_per_s": self.tokens / max(1e-9, self.seconds)}

    def values(self, peak: float) -> dict[str, float]:
        """`peak`: FLOPs a second; measured as it is on a machine that others use, it may have been too low."""
        seconds = max(1e-9, self.seconds)
        return {
            **self.figures(),
            "grad_norm": float(np.mean(self.norms)),
            "lr": self.rate,
            "mfu": min(1.0, self.flops / seconds / peak),
            "data_wait": self.waited / seconds,
        }


class RunLog:
    def __init__(
        self,
        run: Path,
        config: Config,
        fingerprints: dict[str, str],
        step: int,
        reporter: Reporter,
        is_main: bool = True,
    ):
        """Raises MissingExtraError when a tracker is asked for and not installed. `is_main` False: writes nothing."""
        self.run, self.reporter, self.is_main = run, reporter, is_main
        self._trackers: list[_Tracker] = []
        if not is_main:
            return
        files.make_folder(run)
        facts = {
            "command": sys.argv,
            "step": step,  # after which this command went on
            "version": __version__,
            "git": _commit(),
            "seed": config.seed,
            "fingerprints": fingerprints,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
        }
        record.write_facts(run, facts, lambda text: reporter.say(f"note: {text}"))
        record.write_settings(run, with_absolute_paths(config))
        self._metrics = run / record.METRICS_FILE
        if self._metrics.exists():
            self._drop_after(step)
        self._file = open(self._metrics, "a")  # noqa: SIM115 (closed by close)
        self._trackers = [
            tracker for tracker in (self._tensorboard(config, step), self._wandb(config)) if tracker is not None
        ]

    def log(self, step: int, values: dict[str, Any]) -> None:
        if not self.is_main:
            return
        finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in values.items()}
        with writing(self._metrics):
            self._file.write(record.checked_line({"step": step, **finite}))
            self._file.flush()
        numbers = {tag(name): value for name, value in values.items() if isinstance(value, int | float)}
        self._tell(lambda tracker: tracker.log(numbers, step))

    def close(self) -> None:
        if self.is_main:
            with writing(self._metrics):
                self._file.close()
            self._tell(lambda tracker: tracker.close())

    def _tell(self, what: Callable[["_Tracker"], None]) -> None:
        """A tracker that fails is said once and left out: training goes on."""
        for tracker in list(self._trackers):
            try:
                what(tracker)
            except Exception as error:  # noqa: BLE001 (whatever a tracker raises)
                self.reporter.say(f"{tracker.name} failed and is left out: {type(error).__name__}: {error}")
                self._trackers.remove(tracker)

    def _drop_after(self, step: int) -> None:
        found = record.checked_lines(self._metrics, self.reporter.say)
        kept = [line for line, row in found if isinstance(row.get("step"), int) and row["step"] <= step]
        files.publish(self._metrics, ["".join(kept).encode()], is_read_only=False)

    def _tensorboard(self, config: Config, step: int) -> "_Tracker | None":
        is_wanted = config.exp_manager.create_tensorboard_logger
        if is_wanted is False:
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            if is_wanted:
                raise MissingExtraError(
                    "TensorBoard is not installed",
                    "exp_manager.create_tensorboard_logger=true needs it",
                    "pip install 'retro-engine[train]'",
                ) from error
            self.reporter.say("note: no TensorBoard log (pip install 'retro-engine[train]' brings it)")
            return None
        folder = self.run / "tb"  # of a run that was killed there are events, also where it had no checkpoint yet
        writer = SummaryWriter(str(folder), purge_step=step + 1 if folder.is_dir() else None)

        def add(values: dict[str, float], step: int) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        return _Tracker("TensorBoard", add, writer.close)

    def _wandb(self, config: Config) -> "_Tracker | None":
        if not config.exp_manager.create_wandb_logger:
            return None
        with extra("wandb", "wandb is not installed", "exp_manager.create_wandb_logger=true needs it"):
            import wandb
        chosen = {key: v for key, v in vars(config.exp_manager.wandb_logger_kwargs).items() if v is not None}
        arguments = {"name": self.run.name, "project": "retro-engine"} | chosen
        try:
            run = wandb.init(dir=str(self.run), config=flat_keys(config), **arguments)
        except Exception as error:  # noqa: BLE001 (no network, no key: training goes on)
            self.reporter.say(f"wandb failed and is left out: {type(error).__name__}: {error}")
            return None
        return _Tracker("wandb", lambda values, step: run.log(values, step=step), run.finish)


@dataclass
class _Tracker:
    name: str
    log: Callable[[dict[str, float], int], None]
    close: Callable[[], None]


def _commit() -> str | None:
    """The commit of the working tree the run was started in; None outside one."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
