"""Many rows and a busy machine: which ratios become targets. Nothing is timed here."""

import pytest
from torch import Tensor

from retro_engine.bench import crowded


class Pretended:
    """A step of 17 rows takes as long as one of 34; two threads take as long as one."""

    def __init__(self, name: str, shape: object, threads: int):
        self.name = name

    def decode(self, prompts: Tensor, neighbors: Tensor, new: int) -> float:
        count = len(prompts)
        return new * (34.0 if count == 17 else count)

    def close(self) -> None:
        pass


def test_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crowded, "Contestant", Pretended)
    rows, targets = crowded.run("5M", 2)
    found = {target.row.partition(": ")[2]: (target.value, target.holds) for target in targets}
    assert found["tokens/s of 17 against 16"] == (0.5, False)
    assert found["tokens/s of 32 against 17"] == (2, True)
    assert [row.implementation for row in rows[:3]] == ["ours, 16 rows", "ours, 17 rows", "ours, 32 rows"]
    if len(targets) == 3:  # Linux, two cores
        assert found["times as fast as one thread alone"] == (1, True)
        assert rows[-1].median_s == 8
