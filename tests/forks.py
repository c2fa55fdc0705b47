"""Programs that begin where Python, torch and the training loop are imported already: forks of one process, which each worker
of a test run starts once. A new interpreter takes seconds to come as far.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "retro_engine.train.loop",
        "hydra.core.override_parser.overrides_parser",
        "torch._dynamo",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "torch.utils.tensorboard",
    ]
)


class Fork:
    """`act(*arguments)` in a process of its own, which ends with what that returns; `out` and `errors` get what it says. It is
    killed where the block ends before it.
    """

    def __init__(
        self, act: Callable[..., Any], *arguments: Any, out: Path = Path(os.devnull), errors: Path | None = None
    ):
        self.process = FORKS.Process(target=_run, args=(dict(os.environ), out, errors or out, act, arguments))
        self.process.start()

    def __enter__(self) -> "Fork":
        return self

    def __exit__(self, *_: object) -> None:
        self.send_signal(signal.SIGKILL)
        self.wait()

    def is_running(self) -> bool:
        return self.process.is_alive()

    def send_signal(self, number: int) -> None:
        if self.is_running():
            assert self.process.pid is not None
            os.kill(self.process.pid, number)

    def wait(self, timeout_s: float = 120) -> int:
        """Its exit code, or minus the signal that ended it."""
        self.process.join(timeout_s)
        assert self.process.exitcode is not None, "it does not end"
        return self.process.exitcode


def _run(
    environment: dict[str, str], out: Path, errors: Path, act: Callable[..., Any], arguments: Sequence[Any]
) -> None:
    os.environ |= environment
    for number, path in ((1, out), (2, errors)):
        with path.open("a") as file:
            os.dup2(file.fileno(), number)
    sys.exit(act(*arguments))
