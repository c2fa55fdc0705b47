"""The bench's command: what it prints last, what it refuses, and that adding a bench is one entry."""

import json
from pathlib import Path

import pytest

from retro_engine.bench import __main__ as command
from retro_engine.bench import machine
from retro_engine.bench.frame import Measured, Options, Row, at_least


def test_the_last_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def bench(options: Options) -> Measured:
        row = Row(case="case", implementation="ours", median_s=1.0, low_s=1.0, high_s=1.0, ratios={"other": 2.0})
        return Measured([row], [at_least("times as fast", 2.0, 3.0)])

    monkeypatch.setitem(command.BENCHES, "mine", bench)
    monkeypatch.setattr(machine, "processors_taken", lambda: 1.5)
    assert command.main(["mine", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("BUSY: ") for line in lines)
    assert any(line.endswith("falls short (busy: measure again)") for line in lines)
    last = json.loads(lines[-1])
    assert last["busy"] is True
    assert last["mine"] == {"case": {"other": 2.0}}
    assert last["targets"] == {"times as fast": {"value": 2.0, "target": 3.0, "holds": False}}
    assert {"processor", "commit", "threads"} <= set(last)
    assert (tmp_path / "mine.json").exists()


def test_what_it_does_not_know_or_cannot_apply_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["kernel"]) == 2
    assert "kernel is no bench\n  did you mean kernels?" in capsys.readouterr().err
    assert command.main(["kernels", "--device", "cpu", "--dtype", "fp16"]) == 2
    assert "--dtype fp16 on a CPU" in capsys.readouterr().err
    assert command.main(["loader", "--sizes", "5M"]) == 2
    assert "--sizes says nothing to loader" in capsys.readouterr().err
    assert command.main(["loader", "--parts", "start"]) == 2
    assert "--parts says nothing to loader" in capsys.readouterr().err
    assert command.main(["loader", "--requests", "500"]) == 2
    assert "--requests says nothing to loader" in capsys.readouterr().err
    assert command.main(["service", "--requests", "0"]) == 2
    assert "--requests 0 cannot be used" in capsys.readouterr().err
    assert command.main(["startup"]) == 2
    assert "startup has no model" in capsys.readouterr().err
