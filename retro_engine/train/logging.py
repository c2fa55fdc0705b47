"""What a run writes down: run.json, config.yaml, metrics.jsonl, TensorBoard events.

metrics.jsonl has one JSON object a line, each with its step; after a resume the lines past the resumed step
are dropped, so that the file tells of one run.
"""

import contextlib
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from retro_engine import __version__
from retro_engine.config import Config, to_yaml
from retro_engine.data import files
from retro_engine.errors import MissingExtraError
from retro_engine.progress import Reporter


class RunLog:
    def __init__(self, run: Path, config: Config, fingerprints: dict[str, str], step: int, reporter: Reporter):
        """Raises MissingExtraError when TensorBoard is asked for and not installed."""
        self.run, self.reporter = run, reporter
        files.make_folder(run)
        facts = {
            "command": sys.argv,
            "version": __version__,
            "git": _commit(),
            "seed": config.seed,
            "fingerprints": fingerprints,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
        }
        for name, text in (("run.json", json.dumps(facts, indent=1) + "\n"), ("config.yaml", to_yaml(config))):
            files.publish(run / name, [text.encode()])
        self._metrics = run / "metrics.jsonl"
        if self._metrics.exists():
            self._drop_after(step)
        self._file = open(self._metrics, "a")  # noqa: SIM115 (closed by close)
        self._writer = self._tensorboard(config.exp_manager.create_tensorboard_logger)

    def log(self, step: int, values: dict[str, Any]) -> None:
        finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def _drop_after(self, step: int) -> None:
        kept = []
        for line in self._metrics.read_text().splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line cut short by a kill
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
        temporary = self._metrics.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, self._metrics)

    def _tensorboard(self, is_wanted: bool | None) -> Any:
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
        return SummaryWriter(str(self.run / "tb"))


def _commit() -> str | None:
    """The commit of the working tree the run was started in; None outside one."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
