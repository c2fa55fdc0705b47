"""`retro train`, and torchrun."""

import json
from pathlib import Path

import pytest
from cli_helpers import TINY, run


def test_a_dry_run_writes_nothing(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [f"model.data.store={work}/store", "model.data.neighbors=bm25", *TINY]
    assert run("train", "--preset", "tiny", "--dry-run", "--out", tmp_path / "r", *settings) == 0
    assert "4 steps; 21 documents" in capsys.readouterr().out
    assert run("train", "--print-config", "--device", "cpu", "--seed", 7, *settings) == 0
    shown = capsys.readouterr().out
    assert "accelerator: cpu" in shown
    assert "seed: 7" in shown
    assert not list(tmp_path.iterdir())


def test_torchrun_of_one_process(work: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from torch.distributed.run import main

    main(["--nproc-per-node", "1", "-m", "retro_engine.train", "--preset", "tiny", "--out", str(tmp_path / "run"), "--json",
          f"model.data.store='{work}/store'", "model.data.neighbors=bm25", *TINY])  # fmt: skip
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["step"] == 4
