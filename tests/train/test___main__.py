"""`retro train` starts the processes that trainer.devices asks for, and its words reach them unchanged."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from training_helpers import losses, settings

from retro_engine.cli import main
from retro_engine.data.store import Store
from retro_engine.train import __main__, checkpoint


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What torchrun was called with, instead of calling it."""
    calls: list[list[str]] = []
    monkeypatch.setattr("torch.distributed.run.main", calls.append)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return calls


@pytest.mark.parametrize("way", ["retro", "module"])
@pytest.mark.parametrize(
    ("words", "count"),
    [
        (["trainer.devices=8", "trainer.num_nodes=1"], 8),
        (["--nproc", "3"], 3),
        (["--nproc=3", "trainer.accelerator=cpu"], 3),
    ],
)
def test_plain_python_starts_them(started: list[list[str]], way: str, words: list[str], count: int) -> None:
    kept = ["--preset", "tiny", "--out", "runs/train", "model.data.store='a train'"]
    given = [*kept[:2], *words, *kept[2:]]
    assert main(["train", *given]) == 0 if way == "retro" else __main__.main(given) == 0
    expected = [word for word in given if word not in ("--nproc", "--nproc=3", "3")]
    launcher = ["--standalone", "--nproc-per-node", str(count), "-m", "retro_engine.train"]
    assert started == [[*launcher, *expected]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trainer.devices=8", "trainer.num_nodes=2"], "torchrun --nnodes 2 --nproc-per-node 8"),
        (["trainer.devices=-1"], "every GPU, and there is none"),
        (["--nproc", "0"], "at least one process"),
        (["--device", "cpu", "trainer.accelerator=gpu"], "say different things"),
    ],
)
def test_what_cannot_be_started_is_said(
    started: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["train", "--preset", "tiny", "--out", str(tmp_path / "r"), "model.data.store=s", *words]) == 2
    assert said in capsys.readouterr().err
    assert not started


def test_more_processes_than_gpus(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda place: None)
    command = ["train", "--preset", "tiny", "--out", "r", "model.data.store=s", "trainer.accelerator=gpu"]
    assert main([*command, "trainer.devices=8"]) == 5
    assert "there are 2" in capsys.readouterr().err
    assert main([*command, "trainer.devices=-1"]) == 0
    assert started[0][2] == "2"


def test_nothing_is_started_to_look(started: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--preset", "tiny", "trainer.devices=8", "--print-config"]) == 0
    assert "devices: 8" in capsys.readouterr().out
    assert not started


@pytest.mark.parametrize(("failure", "code"), [(2, 2), (5, 5), (-9, 137), ("SIGTERM", 143)])
def test_the_exit_code_is_that_of_the_process_that_failed(
    monkeypatch: pytest.MonkeyPatch, failure: Any, code: int
) -> None:
    def torchrun(words: list[str]) -> None:
        if failure == "SIGTERM":
            raise SignalException("Process got signal", sigval=15)
        failed = ProcessFailure(local_rank=1, pid=os.getpid(), exitcode=failure, error_file="none")
        raise ChildFailedError("train", {1: failed})

    monkeypatch.setattr("torch.distributed.run.main", torchrun)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main(["train", "--preset", "tiny", "--out", "r", "model.data.store=s", "--nproc", "2"]) == code


def test_two_processes_of_a_plain_command_train(small_store: Store, tmp_path: Path) -> None:
    out = tmp_path / "run"
    more = ["trainer.devices=2", "trainer.max_steps=2", "model.retrieval=false", "trainer.limit_val_batches=0"]
    assert main(["train", *settings(small_store, out, *more), "--quiet"]) == 0
    state = json.loads((checkpoint.find_checkpoint(out) / "trainer.json").read_text())
    assert state["processes"] == {"data": 2, "tensor": 1}
    assert sorted(losses(out)) == [1, 2]


def test_every_process_says_its_own_error_with_its_number(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What one meets on another node, a missing file say, nobody else could tell."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert __main__.main(["--config", "absent.yaml"]) == 3
    assert capsys.readouterr().err.startswith("error: process 3 of 4: config file absent.yaml does not exist")
