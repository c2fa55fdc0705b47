"""A training in several processes that is killed at a step goes on in as many, or in fewer: as the run that never was killed.

On one layout losses and weights are equal to the bit, with dropout; across layouts to 1e-9, in float64. One kill of each
change of the layout here; every step, rank and place with RETRO_CAMPAIGN=1, which prints what is counted.
"""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from reliability.runs import CAMPAIGN, SEED, Runs, counted
from reliability.training import AT_SAVE, AT_STEP
from reliability.workloads import Place
from safetensors.torch import load_file
from training_helpers import losses, settings

from retro_engine.data.store import Store
from retro_engine.train import checkpoint

STEPS = 6 if CAMPAIGN else 3
COMMON = [
    "model.global_batch_size=4", "model.micro_batch_size=1", "model.num_attention_heads=4", f"trainer.max_steps={STEPS}",
    "exp_manager.checkpoint_every_n_steps=1", "exp_manager.create_tensorboard_logger=false", "trainer.limit_val_batches=0",
    "exp_manager.keep_last_n=2",
]  # fmt: skip
EXACT = ["trainer.precision=64", "model.hidden_dropout=0", "model.attention_dropout=0"]
TENSOR, SHARDED = "model.tensor_model_parallel_size=2", "model.optim.name=distributed_fused_adam"
CHANGES = {  # how many processes there are before and after the kill, each with its settings; how far losses may differ
    "2 -> 1": (2, [*EXACT, SHARDED], 1, EXACT, 1e-9),
    "4 -> 2": (4, [*EXACT, TENSOR], 2, [*EXACT, SHARDED], 1e-9),
    "2 -> 2": (2, [], 2, [], 0.0),
}


def trained(
    runs: Runs, place: Place, out: Path, world: int, more: list[str], kill: tuple[int, int, str] | None
) -> list[int]:
    """How each process of a run there ended."""
    words = settings(Store(place.store), out, *COMMON, *more)
    answer = runs.ask("checkpoint", replace(place, root=out), "train", world=world, settings=words, kill=kill)
    codes: list[int] = answer["codes"]
    return codes


def distance(run: Path, other: Path) -> float:
    """The largest difference of any loss, and of any weight after the last step."""
    found, wanted = losses(run), losses(other)
    assert sorted(found) == sorted(wanted) == list(range(1, STEPS + 1)), run
    parts = [abs(found[step] - wanted[step]) for step in wanted]
    mine, theirs = (load_file(checkpoint.folder_of(one, STEPS) / "model.safetensors") for one in (run, other))
    assert mine.keys() == theirs.keys()
    return max([*parts, *(float((mine[name].double() - theirs[name].double()).abs().max()) for name in theirs)])


@pytest.mark.parametrize("change", CHANGES if CAMPAIGN else list(CHANGES)[:2])
def test_a_killed_training_goes_on_as_if_it_had_not_been(
    runs: Runs,
    place: Place,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    change: str,
) -> None:
    before, first, after, then, most = CHANGES[change]
    if most:  # of one process, for all layouts
        whole = tmp_path_factory.getbasetemp() / "never killed"
        if not whole.exists():
            assert trained(runs, place, whole, 1, EXACT, None) == [0]
    else:
        whole = tmp_path / "whole"
        assert trained(runs, place, whole, after, then, None) == [0] * after
    kills = list(itertools.product(range(before), range(1, STEPS), (AT_STEP, AT_SAVE)))
    if not CAMPAIGN:
        kills = [kills[int(np.random.default_rng(SEED).integers(len(kills)))]]
    furthest = 0.0
    for number, kill in enumerate(kills):
        run = tmp_path / f"run-{number}"
        assert trained(runs, place, run, before, first, kill)[kill[0]] == -9, kill
        assert not (checkpoint.folder_of(run, STEPS) / checkpoint.COMPLETE).exists(), kill
        assert trained(runs, place, run, after, then, None) == [0] * after, kill
        for folder in checkpoint.complete_checkpoints(run, pytest.fail):
            checkpoint.verify(folder)
        far = distance(run, whole)
        assert far <= most, f"{change}, killed at {json.dumps(kill)}: {far}"
        furthest = max(furthest, far)
    with capsys.disabled():
        if CAMPAIGN:
            said = f"killed trainings, {change} processes: {len(kills)} kills, each then finished"
            print(counted(f"{said}, largest difference {furthest:.1e}"))
