"""What the bench says of the machine: other work on it is never silent."""

import pytest
import torch

from retro_engine.bench import machine

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("load", "free", "is_busy"), [(0.1, 8 << 30, False), (0.5, 8 << 30, True), (0.1, 1 << 30, True)]
)
def test_busy(monkeypatch: pytest.MonkeyPatch, load: float, free: int, is_busy: bool) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(machine, "free_memory", lambda: free)
    about = machine.environment(CPU)
    assert about["busy"] is is_busy
    assert about["processor"]
    assert about["load_1min"] == load
