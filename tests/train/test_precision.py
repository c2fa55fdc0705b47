"""Every precision learns and resumes, and another one is applied on resume."""

from pathlib import Path

import pytest
import torch
from training_helpers import PLAIN, config, losses, state_of

from retro_engine.data.store import Store
from retro_engine.progress import Reporter
from retro_engine.train import checkpoint
from retro_engine.train.loop import train


@pytest.mark.parametrize(
    "more",
    [
        ["trainer.precision=16-mixed", "model.activations_checkpoint_granularity=selective"],
        ["trainer.precision=bf16-mixed"],
        ["trainer.precision=bf16", "model.megatron_amp_O2=true", "model.activations_checkpoint_granularity=full"],
        ["model.mup=true", "model.mup_base_hidden_size=16"],
    ],
)
def test_precisions_recomputation_and_mup_learn_and_resume(
    small_store: Store, whole: Path, tmp_path: Path, more: list[str]
) -> None:
    for stop in (7, 12):
        arguments = [*more, f"trainer.max_steps={stop}", "model.optim.sched.max_steps=12"]
        train(config(small_store, tmp_path / "stopped", *arguments), Reporter("quiet"))
    train(config(small_store, tmp_path / "whole", *more), Reporter("quiet"))
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    found, plain = losses(tmp_path / "whole"), losses(whole)
    assert found[12] < found[1] - 0.5
    if "mup" not in more[0]:
        assert found[12] == pytest.approx(plain[12], abs=0.02)
    weights = state_of(checkpoint.find_checkpoint(tmp_path / "whole"))
    expected = torch.bfloat16 if "model.megatron_amp_O2=true" in more else torch.float32
    assert weights["embedding.weight"].dtype == expected


@pytest.mark.parametrize(("first", "then"), [("32", "64"), ("64", "16-mixed"), ("16-mixed", "bf16-mixed")])
def test_another_precision_is_applied_on_resume_and_said(
    small_store: Store,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    first: str,
    then: str,
) -> None:
    run, sched = tmp_path / "run", "model.optim.sched.max_steps=12"
    for precision, steps in ((first, 2), (then, 4), ("auto", 6)):
        more = [*PLAIN, sched, f"trainer.precision={precision}", f"trainer.max_steps={steps}"]
        train(config(small_store, run, *more), Reporter())
    said = capsys.readouterr().err
    assert f"trainer.precision={then} from step 3 on; before it was {first}" in said
    assert said.count("trainer.precision=") == 1, "auto goes on with what was"
    state = checkpoint.read_trainer(checkpoint.find_checkpoint(run))
    assert state["precision"] == then
    assert state["loss_scale"] == (2.0**16 if then == "16-mixed" else 1.0)
    weights = state_of(checkpoint.find_checkpoint(run))
    expected = torch.float64 if then == "64" else torch.float32
    assert {value.dtype for name, value in weights.items() if "random" not in name and "step" not in name} == {expected}
    found = losses(run)
    assert found[6] < found[1]
