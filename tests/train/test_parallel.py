"""Several processes train the same run as one: data parallel, sharded, tensor and sequence parallel, and their mixes."""

import os
import signal
import time
from pathlib import Path

import pytest
from training_helpers import launch, launch_several, losses, settings

from retro_engine.config import load_config
from retro_engine.data.store import Store
from retro_engine.errors import UsageError
from retro_engine.progress import Reporter
from retro_engine.train import checkpoint
from retro_engine.train.loop import train
from retro_engine.train.parallel import Parallel
from retro_engine.train.run_data import open_data, order_of

EXACT = [
    "trainer.precision=64", "trainer.max_steps=20", "model.hidden_dropout=0", "model.attention_dropout=0",
    "model.global_batch_size=4", "model.micro_batch_size=1", "model.data.neighbor_dropout=0.2",
    "model.num_attention_heads=4", "exp_manager.checkpoint_every_n_steps=10", "exp_manager.keep_last_n=4",
]  # fmt: skip
PART = [
    "trainer.max_steps=5",
    "model.optim.sched.max_steps=20",
    "exp_manager.checkpoint_every_n_steps=2",
    "trainer.limit_val_batches=1",
]  # of 20 steps
TENSOR = ["model.tensor_model_parallel_size=2"]
LAYOUTS: dict[int, dict[str, list[str]]] = {
    2: {
        "dp2": [],
        "fsdp2": ["model.optim.name=distributed_fused_adam"],
        "tp2": [*TENSOR, "model.micro_batch_size=2"],  # what distributes a tensor takes its time at each pass
        "tp2 sequence": [*TENSOR, "model.micro_batch_size=2", "model.sequence_parallel=true"],
    },
    4: {"tp2 x dp2": [*TENSOR, "model.activations_checkpoint_granularity=full"]},
}


@pytest.fixture(scope="module")
def single(small_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("single") / "run"
    train(load_config(settings(small_store, out, *EXACT)), Reporter("quiet"))
    return out


def assert_as_one(run: Path, single: Path, steps: int) -> None:
    """The losses of the first `steps` are those of one process."""
    found, expected = losses(run), losses(single)
    assert sorted(found) == list(range(1, len(found) + 1)), run.name
    assert max(abs(found[step] - expected[step]) for step in range(1, steps + 1)) <= 1e-9, run.name


@pytest.mark.long
def test_two_and_four_processes_train_as_one(small_store: Store, single: Path, tmp_path: Path) -> None:
    """Every layout; a checkpoint of two goes on in one and in four; a single pass ends in every process at the same step;
    what does not fit is said by each of them, with its number.
    """
    runs = {name: settings(small_store, tmp_path / name, *EXACT, *PART, *more) for name, more in LAYOUTS[2].items()}
    passed_on = tmp_path / "passed on"
    sharded = ["model.optim.name=distributed_fused_adam", "trainer.max_steps=2"]
    runs["passed on"] = settings(small_store, passed_on, *EXACT, *PART, *sharded)
    # whatever is left over: the last batches are not enough for both, and neither waits for the other
    once = ["model.data.dataloader_type=single", "trainer.max_steps=1000", "model.retrieval=false",
            "model.micro_batch_size=5", "trainer.val_check_interval=2", "trainer.precision=32"]  # fmt: skip
    runs["once"] = settings(small_store, tmp_path / "once", *once)
    refused = ["model.global_batch_size=3", "model.micro_batch_size=1"]
    runs["refused"] = settings(small_store, tmp_path / "refused", *refused)
    codes, said = launch_several(2, runs, tmp_path)
    assert codes == dict.fromkeys(runs, 0) | {"refused": 2}, said[-3000:]
    assert "use a multiple of 2" in said
    assert [said.count(f"error: process {rank} of 2: ") for rank in (0, 1)] == [1, 1]
    for name in LAYOUTS[2]:
        assert len(losses(tmp_path / name)) == 5
        assert_as_one(tmp_path / name, single, 5)

    alone = load_config(settings(small_store, tmp_path / "alone", *once, "model.global_batch_size=10"))
    count = open_data(alone).train.num_sequences(order_of(alone))
    assert count is not None
    assert count // 5 % 2 == 1, "else the test shows nothing"
    assert sorted(losses(tmp_path / "once")) == list(range(1, count // 10 + 1))
    assert checkpoint.find_checkpoint(tmp_path / "once").name == f"step-{count // 10:06d}"

    in_one = settings(small_store, passed_on, *EXACT, *PART, "trainer.max_steps=4")
    assert train(load_config(in_one), Reporter("quiet")).step == 4
    runs = {name: settings(small_store, tmp_path / name, *EXACT, *PART, *more) for name, more in LAYOUTS[4].items()}
    runs["passed on"] = settings(small_store, passed_on, *EXACT, *PART, *TENSOR)
    codes, said = launch_several(4, runs, tmp_path)
    assert codes == dict.fromkeys(runs, 0), said[-3000:]
    for name in runs:
        assert len(losses(tmp_path / name)) == 5
        assert_as_one(tmp_path / name, single, 5)


@pytest.mark.long
def test_a_killed_process_is_restarted_and_a_signal_to_one_stops_all_with_a_checkpoint(
    small_store: Store, single: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    more = ["exp_manager.checkpoint_every_n_steps=2", "trainer.max_steps=100000", "model.optim.sched.max_steps=20"]
    command = ["-m", "retro_engine.train", *settings(small_store, out, *EXACT, *more), "--quiet"]
    run = launch(2, ["--max-restarts", "1", *command])
    wait_for(lambda: len(checkpoint.complete_checkpoints(out)) >= 2 or run.poll() is not None)
    first = workers(run.pid)
    os.kill(first[1], signal.SIGKILL)
    wait_for(lambda: len(set(workers(run.pid)) - set(first)) == 2 or run.poll() is not None)
    before = max(losses(out))
    wait_for(lambda: max(losses(out)) > max(20, before) or run.poll() is not None)
    os.kill(workers(run.pid)[1], signal.SIGTERM)
    output, _ = run.communicate(timeout=120)
    saved = checkpoint.complete_checkpoints(out)
    assert saved, output[-3000:]
    assert checkpoint.read_trainer(saved[-1])["processes"] == {"data": 2, "tensor": 1}
    assert "exitcode  : 143" in output
    assert_as_one(out, single, 20)


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
