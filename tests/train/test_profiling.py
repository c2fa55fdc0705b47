"""What a profile of some steps holds, and that it changes no number of a run."""

import json
from pathlib import Path

import pytest
from training_helpers import PLAIN, config, losses

from retro_engine.data.store import Store
from retro_engine.errors import UsageError
from retro_engine.progress import Reporter
from retro_engine.train.loop import train


def test_named_steps_are_profiled_and_losses_stay_the_same(
    small_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*PLAIN, "trainer.max_steps=5", "trainer.accumulate_grad_batches=2"]
    train(config(small_store, tmp_path / "as it is", *settings), Reporter("quiet"))
    train(config(small_store, tmp_path / "profiled", *settings, "trainer.profile_steps=[2,3]"), Reporter())
    assert losses(tmp_path / "profiled") == losses(tmp_path / "as it is")
    folder = tmp_path / "profiled" / "profile"
    assert f"profile: {folder}/steps-2-3.txt" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == ["steps-2-3.json", "steps-2-3.txt"]
    named = [event.get("name") for event in json.loads((folder / "steps-2-3.json").read_text())["traceEvents"]]
    counts = {name: named.count(name) for name in ("step", "forward", "backward", "optimizer")}
    assert counts == {"step": 2, "forward": 4, "backward": 4, "optimizer": 2}
    assert "forward" in (folder / "steps-2-3.txt").read_text()


def test_what_is_left_of_the_steps_is_written_where_a_run_ends_or_goes_on(small_store: Store, tmp_path: Path) -> None:
    settings = [*PLAIN, "model.optim.sched.max_steps=9", "trainer.profile_steps=[2,5]"]
    for steps in (3, 4, 7):
        train(config(small_store, tmp_path / "r", *settings, f"trainer.max_steps={steps}"), Reporter("quiet"))
    names = sorted(path.name for path in (tmp_path / "r" / "profile").glob("*.json"))
    assert names == ["steps-2-3.json", "steps-4-4.json", "steps-5-5.json"]


@pytest.mark.parametrize("steps", ["[0,3]", "[5,4]", "[1]", "[1,101]"])
def test_steps_that_cannot_be_profiled(small_store: Store, tmp_path: Path, steps: str) -> None:
    with pytest.raises(UsageError, match="the first and the last step"):
        config(small_store, tmp_path / "r", f"trainer.profile_steps={steps}")
