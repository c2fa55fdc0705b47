"""The bench's frame: what is timed in turns, written down and drawn; and both benches on tiny inputs."""

import csv
import json
import time
from pathlib import Path

import pytest
import torch

from retro_engine.bench import frame
from retro_engine.bench.__main__ import main

CPU = torch.device("cpu")


def test_alternatives_are_timed_in_turns() -> None:
    calls: list[str] = []

    def work(name: str, seconds: float) -> frame.Work:
        return lambda: (calls.append(name), time.sleep(seconds))

    times = frame.time_in_turns({"fast": work("fast", 0.001), "slow": work("slow", 0.01)}, CPU, 5)
    assert calls == ["fast", "slow"] * 6, "one round more than is counted"
    assert times["fast"][0] < times["slow"][0]
    for median, low, high in times.values():
        assert low <= median <= high


def test_ceilings_and_files(tmp_path: Path) -> None:
    ceilings = frame.measure_ceilings(CPU, [torch.float32])
    assert ceilings.copy_gb_s > 0.1 and ceilings.matmul_gflop_s["fp32"] > 0.1
    rows = [
        frame.Row("kernels", "case", "ours", 0.5, 0.4, 0.6, 1.0, None, "copy", 0.25, {"other": 2.0}, 1e-7),
        frame.Row("kernels", "case", "other", 1.0, 0.9, 1.1),
    ]
    frame.write(rows, tmp_path / "out" / "kernels", {"device": "test"})
    written = json.loads((tmp_path / "out" / "kernels.json").read_text())
    assert written["device"] == "test" and written["rows"][0]["ratios"] == {"other": 2.0}
    with (tmp_path / "out" / "kernels.csv").open() as file:
        assert [row["implementation"] for row in csv.DictReader(file)] == ["ours", "other"]
    text = frame.table(rows)
    assert "other 2.00x" in text and "25%" in text
    pytest.importorskip("matplotlib")
    frame.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["nothing"])
    assert stopped.value.code == 2
    assert "invalid choice: 'nothing'" in capsys.readouterr().err
