"""What the time of some steps of a run goes to: torch's profiler over `trainer.profile_steps`, a trace and a table beside the run."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from retro_engine.data import files

FOLDER = "profile"
ROWS = 40  # of the table


class StepProfiler:
    """Profiles steps first ... last (1-based) of a process; the parts of a step are ranges by name, in NVTX too on a GPU."""

    def __init__(
        self, run: Path, steps: list[int] | None, *, rank: int, device: torch.device, say: Callable[[str], None]
    ):
        self.run, self.rank, self.say, self.is_cuda = run, rank, say, device.type == "cuda"
        self.first, self.last = steps or (0, 0)
        self.profile: profile | None = None
        self.had: int | None = None  # the first step that was seen

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around step `number`. A run that goes on behind `first` profiles what is left."""
        if self.profile is None and self.first <= number <= self.last:
            kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * self.is_cuda]
            self.profile, self.had = profile(activities=kinds), number
            self.profile.start()
        with named("step"):
            yield
        if self.profile is not None and number >= self.last:
            self.end(number)

    def end(self, number: int) -> None:
        """Write what was profiled up to step `number`; nothing where nothing was."""
        if self.profile is None:
            return
        found, self.profile = self.profile, None
        found.stop()
        name = f"steps-{self.had}-{number}" + (f"-process-{self.rank}" if self.rank else "")
        folder = self.run / FOLDER
        files.make_folder(folder)
        written = folder / f".{name}.json.tmp"
        found.export_chrome_trace(str(written))
        files.publish_file(written, folder / f"{name}.json")
        sort = "self_cuda_time_total" if self.is_cuda else "self_cpu_time_total"
        table = found.key_averages().table(sort_by=sort, row_limit=ROWS)
        files.publish(folder / f"{name}.txt", [table.encode()])
        self.say(
            f"profile: {folder / name}.txt; its trace, .json, opens in https://ui.perfetto.dev or chrome://tracing"
        )


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """A part of a step, by name in a profile; on a GPU an NVTX range for Nsight too."""
    with torch.profiler.record_function(name):
        if not torch.cuda.is_available():
            yield
            return
        with torch.cuda.nvtx.range(name):
            yield
