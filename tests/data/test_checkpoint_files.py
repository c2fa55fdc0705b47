"""Whether a checkpoint is whole, asked beside other work; what is not read for generation is not asked for; which is read."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from retro_engine.data import files
from retro_engine.data.checkpoint_files import find_checkpoint, newest_checkpoint, opened, opening, verify
from retro_engine.errors import MissingInputError, StoreError, UsageError
from retro_engine.train.checkpoint import best_loss


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Files of a trained model; what is in them is not looked at."""
    names = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "optimizer/shard-0")
    (tmp_path / "optimizer").mkdir()
    for name in names:
        (tmp_path / name).write_text(name)
    (tmp_path / "trainer.json").write_text('{"step": 3}')
    hashes = {name: files.sha256_file(tmp_path / name) for name in (*names, "trainer.json")}
    (tmp_path / "COMPLETE").write_bytes(files.json_bytes(hashes))
    return tmp_path


def test_who_generates_does_not_read_the_optimizer(checkpoint: Path) -> None:
    assert opening(checkpoint).result() == checkpoint
    (checkpoint / "optimizer" / "shard-0").write_text("other")
    assert opened(checkpoint) == checkpoint
    with pytest.raises(StoreError, match="shard-0 is damaged"):
        verify(checkpoint)
    (checkpoint / "model.safetensors").write_text("other")
    with pytest.raises(StoreError, match="model.safetensors is damaged"):
        opening(checkpoint).result()


def test_what_is_not_there_is_said_where_it_is_waited_for(tmp_path: Path) -> None:
    waited = opening(tmp_path)
    with pytest.raises(MissingInputError, match="is not a trained run"):
        waited.result()


def run_of(folder: Path, losses: Sequence[float | None], marks: Sequence[str | None] = ()) -> Path:
    """A run whose checkpoints have these validation losses, measured on what these marks name."""
    for number, loss in enumerate(losses):
        step = folder / "checkpoints" / f"step-{number:06d}"
        step.mkdir(parents=True)
        state = {"step": number, "valid_loss": loss, **({"validated_on": marks[number]} if marks else {})}
        (step / "trainer.json").write_text(json.dumps(state))
        (step / "COMPLETE").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("losses", "best"),
    [([3.0, 1.0, 2.0], 1), ([3.0, 1.0, 1.0], 2), ([None, None], 1), ([2.0, None], 0), ([float("nan"), 2.0, None], 1)],
)
def test_the_best_is_read_and_the_newest_where_a_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], losses: list[float | None], best: int
) -> None:
    run = run_of(tmp_path / "run", losses)
    assert find_checkpoint(run).name == f"step-{best:06d}"
    is_last = best == len(losses) - 1
    said = capsys.readouterr().err
    assert ("is read, for its validation loss" in said) != is_last
    assert ("the newest, was not validated" in said) == (losses[-1] is None and not is_last)
    assert newest_checkpoint(run).name == f"step-{len(losses) - 1:06d}"
    assert find_checkpoint(run / "checkpoints" / "step-000000").name == "step-000000", "what is named"


A, B = "a" * 64, "b" * 64


@pytest.mark.parametrize(
    ("losses", "marks", "best"),
    [
        ([1.0, 3.0, 2.0, 2.5], [A, B, B, B], 2),
        ([1.0, 3.0, None], [A, B, B], 1),
        ([1.0, 2.0, 3.0, None], [None, None, None, A], 0),  # of an earlier version, gone on with and not validated yet
        ([1.0, 2.0], [None, A], 1),
        ([2.0, 1.0, 3.0], [A, B, A], 0),
        ([None, None], [None, A], 1),
    ],
)
def test_losses_on_other_data_are_not_compared(
    tmp_path: Path, losses: list[float | None], marks: list[str | None], best: int
) -> None:
    run = run_of(tmp_path / "run", losses, marks)
    assert find_checkpoint(run).name == f"step-{best:06d}"
    for mark in (A, B, None):
        known = [loss for loss, other in zip(losses, marks) if other == mark and loss is not None]
        assert best_loss(run, mark) == min(known, default=math.inf)


def test_the_one_run_in_a_folder_is_found_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path / "demo" / "run", [1.0])
    (tmp_path / "demo" / "store" / "checkpoints").mkdir(parents=True)
    assert find_checkpoint(tmp_path / "demo").parent.parent == run
    assert f"note: {run} is the run in {tmp_path / 'demo'}" in capsys.readouterr().err
    run_of(tmp_path / "demo" / "plain", [1.0])
    with pytest.raises(UsageError, match=r"demo holds 2 runs: plain, run\n.*\n.*demo/plain"):
        find_checkpoint(tmp_path / "demo")
