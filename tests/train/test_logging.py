"""Trackers: one that fails is left out, one that is not installed is named."""

import shutil
import sys
from pathlib import Path

import pytest
from training_helpers import config, losses

from retro_engine.data.store import Store
from retro_engine.errors import MissingExtraError
from retro_engine.progress import Reporter
from retro_engine.train.loop import train


def test_wandb_offline_and_a_tracker_that_fails(
    small_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [
        "exp_manager.create_wandb_logger=true",
        "trainer.max_steps=2",
        "exp_manager.wandb_logger_kwargs.mode=offline",
    ]
    pytest.importorskip("wandb")
    train(config(small_store, tmp_path / "r", *more), Reporter("quiet"))
    assert list((tmp_path / "r" / "wandb").glob("offline-run-*"))
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", lambda *_, **__: 1 / 0)
    train(config(small_store, tmp_path / "s", "trainer.max_steps=2"), Reporter())
    assert "TensorBoard failed and is left out: ZeroDivisionError" in capsys.readouterr().err
    assert sorted(losses(tmp_path / "s")) == [1, 2]


def test_an_extra_that_is_not_installed(small_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"retro-engine\[train\]") as raised:
        train(config(small_store, tmp_path / "a", "exp_manager.create_tensorboard_logger=true"), Reporter("quiet"))
    assert raised.value.exit_code == 4
    train(config(small_store, tmp_path / "b", "trainer.max_steps=1"), Reporter("quiet"))


@pytest.mark.parametrize("lost", ["step-000004", "."])
def test_what_a_killed_run_wrote_beyond_its_checkpoint_is_purged(small_store: Store, tmp_path: Path, lost: str) -> None:
    """As if it was killed in step 4, or before its first checkpoint."""
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run, steps = tmp_path / "r", ["model.retrieval=false", "exp_manager.checkpoint_every_n_steps=2"]
    train(config(small_store, run, *steps, "trainer.max_steps=4"), Reporter("quiet"))
    shutil.rmtree(run / "checkpoints" / lost)
    train(config(small_store, run, *steps, "trainer.max_steps=5"), Reporter("quiet"))
    events = loading.EventAccumulator(str(run / "tb"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5]
    groups = {tag.split("/")[0] for tag in events.Tags()["scalars"]}
    assert groups == {"train", "valid", "perf"}
    assert {"valid/bits_per_byte_off", "perf/tokens_per_s", "train/lr"} <= set(events.Tags()["scalars"])
