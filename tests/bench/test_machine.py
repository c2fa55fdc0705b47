"""What the bench says of the machine: other work on it is never silent."""

import subprocess
import sys

import pytest
import torch

from retro_engine.bench import machine

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("taken", "free", "is_busy"), [(0.1, 8 << 30, False), (0.5, 8 << 30, True), (0.1, 1 << 30, True)]
)
def test_busy(monkeypatch: pytest.MonkeyPatch, taken: float, free: int, is_busy: bool) -> None:
    monkeypatch.setattr(machine, "processors_taken", lambda: taken)
    monkeypatch.setattr(machine, "free_memory", lambda: free)
    about = machine.environment(CPU)
    assert about["busy"] is is_busy
    assert about["processor"]
    assert about["taken"] == taken


def test_what_others_compute_is_seen() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        taken = machine.processors_taken(0.3)
        other.kill()
    assert taken is None or taken > 0.2  # a core that others compute on too is shared
