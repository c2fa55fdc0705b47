"""Several processes train the same run as one: data parallel, sharded, tensor and sequence parallel, and their mixes."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from training_helpers import launch, losses, settings

from retro_engine.config import load_config
from retro_engine.data.store import Store
from retro_engine.errors import UsageError
from retro_engine.progress import Reporter
from retro_engine.train import checkpoint
from retro_engine.train.loop import open_data, steps_of_data, train
from retro_engine.train.parallel import Parallel

EXACT = [
    "trainer.precision=64", "trainer.max_steps=20", "model.hidden_dropout=0", "model.attention_dropout=0",
    "model.global_batch_size=4", "model.micro_batch_size=1", "model.data.neighbor_dropout=0.2",
    "model.num_attention_heads=4", "exp_manager.checkpoint_every_n_steps=10", "exp_manager.keep_last_n=4",
]  # fmt: skip
LAYOUTS: dict[int, dict[str, list[str]]] = {
    2: {
        "dp2": [],
        "fsdp2": ["model.optim.name=distributed_fused_adam"],
        "tp2": ["model.tensor_model_parallel_size=2"],
        "tp2 sequence": ["model.tensor_model_parallel_size=2", "model.sequence_parallel=true"],
    },
    4: {"tp2 x dp2": ["model.tensor_model_parallel_size=2", "model.activations_checkpoint_granularity=full"]},
}


def torchrun(processes: int, arguments: list[str], *flags: str, wait: bool = True) -> subprocess.Popen[str]:
    return launch(processes, [*flags, "-m", "retro_engine.train", *arguments, "--quiet"], wait)


@pytest.fixture(scope="module")
def single(small_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("single") / "run"
    train(load_config(settings(small_store, out, *EXACT)), Reporter("quiet"))
    return out


@pytest.mark.parametrize("processes", LAYOUTS)
def test_losses_are_those_of_one_process(processes: int, small_store: Store, single: Path, tmp_path: Path) -> None:
    layouts = LAYOUTS[processes]
    runs = [settings(small_store, tmp_path / name, *EXACT, *more) for name, more in layouts.items()]
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    run = launch(processes, [str(Path(__file__).with_name("several_runs.py")), str(tmp_path / "runs.json")])
    assert run.returncode == 0, run.output[-3000:]
    expected = losses(single)
    for name in layouts:
        found = losses(tmp_path / name)
        assert sorted(found) == list(range(1, 21)), name
        assert max(abs(found[step] - expected[step]) for step in expected) <= 1e-9, name


def test_a_checkpoint_of_two_processes_goes_on_in_one_and_in_four(
    small_store: Store, single: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    sharded = ["model.optim.name=distributed_fused_adam", "trainer.max_steps=8", "model.optim.sched.max_steps=20"]
    run = torchrun(2, settings(small_store, out, *EXACT, *sharded))
    assert run.returncode == 0, run.output[-3000:]
    alone = ["trainer.max_steps=16", "model.optim.sched.max_steps=20"]
    assert train(load_config(settings(small_store, out, *EXACT, *alone)), Reporter("quiet")).step == 16
    run = torchrun(4, settings(small_store, out, *EXACT, "model.tensor_model_parallel_size=2"))
    assert run.returncode == 0, run.output[-3000:]
    found, expected = losses(out), losses(single)
    assert sorted(found) == sorted(expected)
    assert max(abs(found[step] - expected[step]) for step in expected) <= 1e-9


def test_a_killed_process_is_restarted_and_the_run_goes_on(small_store: Store, single: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = settings(small_store, out, *EXACT, "exp_manager.checkpoint_every_n_steps=2")
    run = torchrun(2, arguments, "--max-restarts", "1", wait=False)
    assert run.stdout is not None
    wait_for(lambda: len(checkpoint.complete_checkpoints(out)) >= 2 or run.poll() is not None)
    os.kill(workers(run.pid)[1], signal.SIGKILL)
    output, _ = run.communicate(timeout=240)
    assert run.returncode == 0, output[-3000:]
    found, expected = losses(out), losses(single)
    assert sorted(found) == list(range(1, 21))
    assert max(abs(found[step] - expected[step]) for step in expected) <= 1e-9


def test_a_signal_to_one_process_stops_all_with_a_checkpoint(small_store: Store, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = settings(small_store, out, *EXACT, "trainer.max_steps=4000")
    run = torchrun(2, arguments, wait=False)
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(losses(out)) > 2 or run.poll() is not None)
    os.kill(workers(run.pid)[1], signal.SIGTERM)
    output, _ = run.communicate(timeout=120)
    saved = checkpoint.complete_checkpoints(out)
    assert saved, output[-3000:]
    assert checkpoint.read_trainer(saved[-1])["processes"] == {"data": 2, "tensor": 1}
    assert "exitcode  : 143" in output


def test_what_does_not_fit_is_said_once_and_not_by_every_process(small_store: Store, tmp_path: Path) -> None:
    run = torchrun(2, settings(small_store, tmp_path / "run", "model.global_batch_size=3", "model.micro_batch_size=1"))
    assert run.returncode != 0
    assert "use a multiple of 2" in run.output
    assert run.output.count("error: ") == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["model.tensor_model_parallel_size=3", "model.num_attention_heads=3", "model.hidden_size=48",
          "model.ffn_hidden_size=96"], "must divide the 2 processes"),
        (["trainer.devices=4"], "2 processes were started"),
    ],
)  # fmt: skip
def test_processes_that_do_not_fit(
    small_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], message: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=message):
        Parallel(load_config(settings(small_store, tmp_path / "run", *more)))


def wait_for(is_true, timeout_s: float = 120) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def workers(launcher: int) -> list[int]:
    """Process ids of what a launcher started, in order."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with_parent = status.read_text().rsplit(")", 1)[1].split()
        if int(with_parent[1]) == launcher:
            found.append(int(status.parent.name))
    return sorted(found)


def test_a_single_pass_ends_in_every_process_at_the_same_step(small_store: Store, tmp_path: Path) -> None:
    """Whatever is left over: the last batches are not enough for both, and neither waits for the other."""
    once = ["model.data.dataloader_type=single", "trainer.max_steps=1000", "model.retrieval=false",
            "model.micro_batch_size=5", "trainer.val_check_interval=2", "trainer.precision=32"]  # fmt: skip
    run = torchrun(2, settings(small_store, tmp_path / "run", *once))
    assert run.returncode == 0, run.output[-3000:]
    alone = load_config(settings(small_store, tmp_path / "alone", *once, "model.global_batch_size=10"))
    count = open_data(alone).train.num_sequences(alone.seed, False, False)
    assert count is not None
    assert count // 5 % 2 == 1, "else the test shows nothing"
    steps = count // 10
    assert sorted(losses(tmp_path / "run")) == list(range(1, steps + 1))
    assert checkpoint.find_checkpoint(tmp_path / "run").name == f"step-{steps:06d}"


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_the_number_of_steps_is_what_every_process_can_make(
    small_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    once = ["model.data.dataloader_type=single", "model.micro_batch_size=1", "trainer.accumulate_grad_batches=2"]
    config = load_config(settings(small_store, tmp_path / "run", *once))
    data = open_data(config)
    steps = steps_of_data(config, data)
    assert steps is not None
    for rank in range(world):
        last = (steps - 1) * 2 * world + rank + world
        data.train.training_batch(last, 1, config.seed, False, False)
    with pytest.raises(StopIteration):
        data.train.training_batch((steps + 1) * 2 * world - 1, 1, config.seed, False, False)


def test_processes_that_see_other_data_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Second(Parallel):
        rank = 1

        def __init__(self) -> None:
            pass

        def from_main(self, value: object) -> object:
            return {"data": "a", "number of steps": 7}

        def any(self, value: int) -> int:
            return value

    Second().agree({"data": "a", "number of steps": 7})
    with pytest.raises(UsageError, match="process 1 has another number of steps than the first"):
        Second().agree({"data": "a", "number of steps": 8})
