"""A training in several processes, of which one is killed (`kill -9`) at a step: in forks of workloads.py's server, with what
torchrun tells its processes in their environment. Where one has died, the others are killed as well.
"""

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from retro_engine.config import load_config
from retro_engine.progress import Reporter
from retro_engine.train import checkpoint, loop

AT_STEP, AT_SAVE = "step", "save"  # before a step is computed; when its checkpoint begins to be written


def train(request: dict[str, Any]) -> dict[str, Any]:
    """`settings` in `world` processes; `kill`: the rank, the step and the place of the one that is killed, or None.
    Returns how each ended: 0, or minus a signal.
    """
    import torch.distributed.fsdp  # once, not in each process
    import torch.distributed.tensor.parallel  # noqa: F401

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = {_start(request, rank, port): rank for rank in range(request["world"])}
    codes, running = [0] * len(ranks), set(ranks)
    while running:
        number, status = os.wait()
        running.discard(number)
        codes[ranks[number]] = os.waitstatus_to_exitcode(status)
        for other in running if codes[ranks[number]] else ():
            with suppress(ProcessLookupError):
                os.kill(other, signal.SIGKILL)
    return {"codes": codes}


def _start(request: dict[str, Any], rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ["WORLD_SIZE"] = str(request["world"])
    if request["kill"] is not None and request["kill"][0] == rank:
        _killed_at(*request["kill"][1:])
    try:
        loop.train(load_config(request["settings"]), Reporter("quiet"))
    except BaseException:
        traceback.print_exc(file=sys.stderr)
        os._exit(1)
    os._exit(0)


def _killed_at(step: int, place: str) -> None:
    """From now on this process dies there."""

    def dies(call: Callable[..., Any], is_there: Callable[..., bool]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            if is_there(*arguments):
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)

        return wrapped

    if place == AT_STEP:
        at = lambda run, batches: run.step == step  # noqa: E731
        loop._Training._train_step = dies(loop._Training._train_step, at)  # type: ignore[method-assign]
    else:
        last = checkpoint.Saver._write
        saves = lambda saver, shards, publishing, aside, final, *rest: final.name == f"step-{step:06d}"  # noqa: E731
        checkpoint.Saver._write = dies(last, saves)  # type: ignore[method-assign]
