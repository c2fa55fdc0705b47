"""What a bench has measured, as table, files and plot."""

import csv
import json
from pathlib import Path

import pytest

from retro_engine.bench import results
from retro_engine.bench.frame import Measured, Row, at_least, at_most


def measured() -> Measured:
    ours = Row(case="case", implementation="ours", median_s=0.5, low_s=0.4, high_s=0.6, gb_s=1.0, error=1e-7)
    ours.bound, ours.ceiling_share, ours.ratios = "copy", 0.25, {"other": 2.0}
    other = Row(case="case", implementation="other", median_s=1.0, low_s=0.9, high_s=1.1)
    targets = [at_least("speed", 2.0, 1.5), at_most("memory", 0.7, 0.5), at_least("rival", None, 1)]
    return Measured([ours, other], targets, {"ceilings": 1})


def test_files(tmp_path: Path) -> None:
    results.write("kernels", measured(), tmp_path / "out", {"device": "test", "busy": False})
    written = json.loads((tmp_path / "out" / "kernels.json").read_text())
    assert written["device"] == "test" and written["ceilings"] == 1
    assert written["rows"][0]["ratios"] == {"other": 2.0} and written["rows"][0]["bench"] == "kernels"
    assert written["targets"] == {
        "speed": {"value": 2.0, "target": 1.5, "holds": True},
        "memory": {"value": 0.7, "target": 0.5, "holds": False},
        "rival": {"value": None, "target": 1, "holds": False},
    }
    with (tmp_path / "out" / "kernels.csv").open() as file:
        assert [row["implementation"] for row in csv.DictReader(file)] == ["ours", "other"]


def test_tables() -> None:
    text = results.table(measured().rows)
    assert "other 2.00x" in text and "25%" in text
    lines = results.target_table(measured().targets).splitlines()[1:]
    assert [line.split()[-1] for line in lines] == ["holds", "short", "measured"]


def test_ours_comes_first_in_the_last_line() -> None:
    rows = measured().rows
    rows[1].ratios = {"ours": 0.5}
    assert results.ratios_by_case(rows) == {"case": {"other": 2.0}}


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results.plot(measured().rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
