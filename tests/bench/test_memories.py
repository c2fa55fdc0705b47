"""What a memory of tokens must reach, on a small text and on figures that are made up."""

from pathlib import Path

import pytest

from retro_engine.bench import memories
from retro_engine.bench.frame import Options
from retro_engine.errors import UsageError


def test_a_text_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memories, "FACTS", 40)
    monkeypatch.setattr(memories, "TOKENS", 300)
    measured = memories.run(Options())
    assert [row.implementation for row in measured.rows] == ["ours", "ours, some left out", "ours"]
    assert measured.facts["looked_up"] >= 300 and measured.facts["bytes_per_token"] > 6
    assert [target.value is not None for target in measured.targets] == [True, True]
    with pytest.raises(UsageError, match="--text with --run"):
        memories.run(Options(text="text", run="run"))


def test_targets_of_a_run() -> None:
    gains = {"model": {"gain": 0.05, "low": 0.01, "high": 0.09}, "memory": {"gain": 0.2, "low": 0.1, "high": 0.3}}
    facts = {"lookups_per_s": 2e5, "bytes_per_token": 6.0, "gains": gains}
    facts |= {"time": {"generate": 1.4, "evaluate": 1.1}, "flops": 1.01}
    assert [target.holds for target in memories.targets(facts)] == [True, True, True, False, True, True, False, True]
