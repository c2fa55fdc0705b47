"""The demo in miniature: every stage runs, the figures are written down, the gate closes on a model that fails."""

import json
from pathlib import Path

import pytest

from retro_engine import cli


def test_the_gate_closes_on_a_model_that_has_not_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    small = ["model.hidden_size=48", "model.ffn_hidden_size=64", "model.num_attention_heads=2"]
    assert cli.main(["demo", "facts", "--out", str(out), "--steps", "8", *small]) == 6
    said = capsys.readouterr().err
    assert "error: value accuracy on 0.0" in said
    assert "one right, one wrong note" in said
    figures = json.loads((out / "demo.json").read_text())
    assert {"on", "off", "random", "one_right", "new_entity", "seed"} <= set(figures)
    assert figures["on"]["entities"] == 72
    assert len(figures["new_entity"]) == 6
    assert all(answer["sources"][0].startswith("news-") for answer in figures["new_entity"])
    assert cli.main(["demo", "--out", str(out)]) == 2, "a demo is not overwritten"


@pytest.mark.parametrize("setting", ["trainer.max_steps=3", "exp_manager.exp_dir=x", "model.data.store=x", "seed=1"])
def test_what_a_flag_says_or_the_demo_makes_is_refused(
    setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", "facts", "--out", str(tmp_path / "d"), setting]) == 2
    assert "is the demo's own" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


def test_several_processes_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    assert cli.main(["demo", "facts", "--out", str(tmp_path / "d"), "trainer.devices=2"]) == 2
    assert not (tmp_path / "d").exists()
