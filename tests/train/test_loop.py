"""Training: it learns, it logs, and a run that is stopped goes on as the same run."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import Fork
from helpers import small_disk
from training_helpers import NEMO_INFERENCE, NEMO_TRAINING, PLAIN, SMALL, config, losses, settings

from retro_engine.cli import main
from retro_engine.config import load_config
from retro_engine.data.batches import Order
from retro_engine.data.store import Store
from retro_engine.errors import GateError, OutOfResourceError, RetroError, StoreError, UsageError
from retro_engine.progress import Reporter
from retro_engine.train import checkpoint
from retro_engine.train.loop import train
from retro_engine.train.run_data import open_data


def test_it_learns_and_writes_everything_down(whole: Path) -> None:
    found = losses(whole)
    assert sorted(found) == list(range(1, 13))
    assert found[12] < found[1] - 0.5
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert {"valid_bits_per_byte_on", "valid_bits_per_byte_off"} <= set().union(*rows)
    assert all(row["tokens_per_s"] > 0 and 0 < row["mfu"] <= 1 for row in rows if "mfu" in row)
    assert all(0 <= row["data_wait"] < 1 for row in rows if "mfu" in row)
    facts = json.loads((whole / "run.json").read_text())
    assert {"store", "tokenizer", "neighbors"} == set(facts["fingerprints"])
    assert list((whole / "tb").iterdir())
    saved = load_config(file=str(whole / "config.yaml"))
    assert saved.trainer.max_steps == 12
    assert saved.model.data.neighbors == "bm25"
    folder = checkpoint.find_checkpoint(whole)
    names = {path.name for path in folder.iterdir()}
    assert {"COMPLETE", "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
            "trainer.json", "optimizer"} == names  # fmt: skip
    checkpoint.verify(folder)


def test_accumulation_equals_one_large_batch(small_store: Store, tmp_path: Path) -> None:
    still = [
        "model.hidden_dropout=0",
        "model.attention_dropout=0",
        "trainer.max_steps=4",
        "model.data.neighbor_dropout=0",
    ]
    runs = {"one": ["model.micro_batch_size=4"], "two": ["model.micro_batch_size=2", "model.global_batch_size=4"],
            "four": ["model.micro_batch_size=1", "trainer.accumulate_grad_batches=4"]}  # fmt: skip
    for name, more in runs.items():
        train(config(small_store, tmp_path / name, *still, *more), Reporter("quiet"))
    for name in ("two", "four"):
        for step, loss in losses(tmp_path / "one").items():
            assert losses(tmp_path / name)[step] == pytest.approx(loss, rel=1e-4)


@pytest.mark.long
def test_compiled_step_has_the_eager_losses(small_store: Store, tmp_path: Path) -> None:
    still = [
        "model.hidden_dropout=0",
        "model.attention_dropout=0",
        "trainer.max_steps=3",
        "model.data.neighbor_dropout=0",
        "model.dec_num_layers=1",  # compiling takes longest
        "model.dec_cross_attention=[0]",
    ]
    for name in ("false", "true"):
        train(config(small_store, tmp_path / name, *still, f"trainer.compile={name}"), Reporter("quiet"))
    for step, loss in losses(tmp_path / "false").items():
        assert losses(tmp_path / "true")[step] == pytest.approx(loss, rel=1e-4)


def test_kill_9_during_checkpoints_leaves_one_that_loads(small_store: Store, tmp_path: Path) -> None:
    out = tmp_path / "run"
    often = ["trainer.max_steps=100000", "exp_manager.checkpoint_every_n_steps=1", "trainer.val_check_interval=100000"]
    rng = np.random.default_rng(0)
    last = 0
    for _ in range(1000 if os.environ.get("RETRO_CAMPAIGN") else 2):
        with Fork(main, ["train", *settings(small_store, out, *often)]) as process:
            deadline = time.monotonic() + 60
            while (
                len(checkpoint.complete_checkpoints(out)) == 0
                or int(checkpoint.complete_checkpoints(out)[-1].name[5:]) <= last
            ):
                assert time.monotonic() < deadline
                assert process.is_running()
                time.sleep(0.02)
            time.sleep(float(rng.random()) * 0.3)
        newest = checkpoint.find_checkpoint(out)
        checkpoint.verify(newest)
        last = int(newest.name[5:])


REFUSED = {
    "model.chunk_size=32 does not match": ["model.chunk_size=32"],
    "not whole chunks|whole chunks": ["model.encoder_seq_length=40"],
    "model.vocab_size=77 does not match": ["model.vocab_size=77"],
    "k=9 neighbors": ["model.num_neighbors=9"],
    "there is no GPU": ["trainer.accelerator=gpu"],
    "neighbor table other does not exist": ["model.data.neighbors=other"],
    "is not a store": ["model.data.store=/nowhere"],
    "exp_dir is not set": ["exp_manager.exp_dir=null"],
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_work_is_refused_before_the_first_step(small_store: Store, tmp_path: Path, message: str) -> None:
    if "GPU" in message and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RetroError, match=message) as raised:
        train(config(small_store, tmp_path / "r", *REFUSED[message]), Reporter("quiet"))
    assert raised.value.exit_code == (
        5 if "GPU" in message else 3 if "does not exist" in message or "is not a store" in message else 2
    )
    assert not (tmp_path / "r" / "checkpoints").exists()


def test_the_last_steps_of_a_single_pass_are_saved_and_logged(
    small_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    once = ["model.data.dataloader_type=single", "exp_manager.checkpoint_every_n_steps=4", "trainer.max_steps=1000",
            "trainer.log_every_n_steps=7", "model.micro_batch_size=4"]  # fmt: skip
    asked = config(small_store, tmp_path / "r", *once)
    left = open_data(asked).train.num_sequences(Order(asked.seed, is_cyclic=False)) or 0
    result = train(asked, Reporter())
    assert 4 < result.step < 1000
    assert left % 4, "else nothing is left over"
    assert f"the last {left % 4} sequences fill no step and are not read" in capsys.readouterr().err
    assert result.checkpoint == checkpoint.find_checkpoint(tmp_path / "r")
    assert max(losses(tmp_path / "r")) == result.step
    again = train(config(small_store, tmp_path / "r", *once), Reporter("quiet"))
    assert (again.step, again.checkpoint) == (result.step, result.checkpoint)


def test_steps_without_a_finite_loss_are_skipped_and_never_saved(small_store: Store, tmp_path: Path) -> None:
    """A learning rate that overflows: the steps are skipped, and ten in a row end the run with a typed error."""
    with pytest.raises(GateError, match="10 steps in a row"):
        train(
            config(small_store, tmp_path / "r", "model.optim.lr=1e38", "trainer.max_steps=40", "model.optim.clip=null"),
            Reporter("quiet"),
        )
    assert not checkpoint.complete_checkpoints(tmp_path / "r")
    assert all(json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines())


def test_nemos_documented_commands_run(
    small_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training at the small sizes of these tests for two steps, then generation from what it saved."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    paths = {"exp_manager.exp_dir=DIR": f"exp_manager.exp_dir='{run}'",
             "model.retro.retro_project_dir=STORE": f"model.retro.retro_project_dir='{small_store.folder}'",
             "checkpoint_dir=DIR": f"checkpoint_dir='{run}'", "checkpoint_name='NAME'": "checkpoint_name='step-000002'"}  # fmt: skip
    sizes = [part for part in SMALL if "_size=" in part or "layers" in part or "cross" in part or "heads" in part]
    sizes += ["model.encoder_seq_length=64", "model.retrieved_length=128", "model.data.neighbors=bm25"]
    command = [paths.get(part, part) for part in NEMO_TRAINING]
    assert main(["train", *command, *sizes, "trainer.max_steps=2", "--quiet"]) == 0
    assert sorted(losses(run)) == [2]
    generation = [paths.get(part, part) for part in NEMO_INFERENCE]
    assert main(["generate", *generation]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("Question: Who wrote it? Answer:")


def test_the_best_checkpoint_is_kept_beside_the_last(small_store: Store, tmp_path: Path) -> None:
    more = ["trainer.val_check_interval=2", "exp_manager.checkpoint_every_n_steps=2", "exp_manager.keep_last_n=1"]
    train(config(small_store, tmp_path / "r", *more), Reporter("quiet"))
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    measured = {row["step"]: row["valid_loss_on"] for row in rows if "valid_loss_on" in row}
    best = min(measured, key=lambda step: measured[step])
    kept = [int(path.name[5:]) for path in checkpoint.complete_checkpoints(tmp_path / "r")]
    assert kept == sorted({best, 12})


def test_a_run_is_not_written_into_a_checkpoint(small_store: Store, tmp_path: Path) -> None:
    """What it trained would not be found: the folder is the checkpoint that is there."""
    (tmp_path / checkpoint.COMPLETE).write_text("{}")
    with pytest.raises(UsageError, match="is a checkpoint"):
        train(config(small_store, tmp_path), Reporter("quiet"))
    assert not (tmp_path / "checkpoints").exists()


def test_a_validation_before_the_first_line_of_the_log_shows_its_loss(
    small_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["trainer.max_steps=2", "trainer.val_check_interval=1", "trainer.log_every_n_steps=10"]
    train(config(small_store, tmp_path / "r", *more), Reporter())
    said = capsys.readouterr().err
    assert re.search(r"step 1: loss \d\.\d{3}, validation", said) and "nan" not in said


def test_a_loss_that_leaps_is_skipped_and_logged(
    small_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a bound below the mean every step leaps, so the run stops after N in a row and names the last checkpoint."""
    run = tmp_path / "r"
    train(config(small_store, run, "trainer.max_steps=3", "model.optim.sched.max_steps=12"), Reporter("quiet"))
    more = ["model.optim.lr=100", "model.optim.clip=null", "trainer.loss_spike=1.0", "trainer.max_skipped_steps=3"]
    with pytest.raises(GateError, match="3 steps in a row were skipped") as error:
        train(config(small_store, run, "model.optim.sched.max_steps=12", *more), Reporter())
    assert "step-000003" in str(error.value)
    assert "times the mean" in capsys.readouterr().err


def test_an_incomplete_or_damaged_checkpoint(whole: Path, tmp_path: Path) -> None:
    from retro_engine.api import Retro

    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for earlier in checkpoint.complete_checkpoints(run)[:-1]:
        shutil.rmtree(earlier)
    folder = checkpoint.find_checkpoint(run)
    weights = folder / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[len(raw) // 2] ^= 1
    weights.unlink()
    weights.write_bytes(raw)
    with pytest.raises(StoreError, match="model.safetensors is damaged"):
        Retro.from_pretrained(run)
    (folder / "COMPLETE").unlink()
    with pytest.raises(RetroError, match="no complete checkpoint"):
        Retro.from_pretrained(run)


def test_a_full_disk_keeps_earlier_checkpoints(small_store: Store, tmp_path: Path) -> None:
    with small_disk(tmp_path, "1m") as disk:
        out = disk / "run"
        every = [
            "exp_manager.checkpoint_every_n_steps=1", "exp_manager.keep_last_n=0", "exp_manager.create_tensorboard_logger=false",
        ]  # fmt: skip
        with pytest.raises(OutOfResourceError, match="no space left"):
            train(config(small_store, out, *every), Reporter("quiet"))
        found = checkpoint.complete_checkpoints(out)
        assert found
        for folder in found:
            checkpoint.verify(folder)
        assert not list((out / "checkpoints").glob(".*")), "nothing half-written is left"


def test_the_plain_decoder_trains_without_a_table(small_store: Store, tmp_path: Path) -> None:
    result = train(
        config(small_store, tmp_path / "r", "model.retrieval=false", "trainer.max_steps=6"), Reporter("quiet")
    )
    assert "valid_bits_per_byte_off" in result.metrics
    assert "valid_bits_per_byte_on" not in result.metrics


def test_validation_by_shares_and_none(small_store: Store, tmp_path: Path) -> None:
    """NeMo's spellings: a share of an epoch between validations, a share of the validation data, 0 = none."""
    none = [*PLAIN, "trainer.max_steps=4", "trainer.val_check_interval=1", "trainer.limit_val_batches=0"]
    assert "valid_loss_off" not in train(config(small_store, tmp_path / "none", *none), Reporter("quiet")).metrics
    shares = [*PLAIN, "trainer.max_steps=8", "trainer.val_check_interval=0.1", "trainer.limit_val_batches=0.25",
              "model.micro_batch_size=4"]  # fmt: skip
    asked = config(small_store, tmp_path / "shares", *shares)
    train(asked, Reporter("quiet"))
    every = int(0.1 * (len(open_data(asked).train.epoch(Order(asked.seed), 0)) // 4))
    assert 1 < every < 8
    rows = [json.loads(line) for line in (tmp_path / "shares" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "valid_loss_off" in row] == sorted({*range(every, 9, every), 8})


def test_settings_that_training_does_not_read_are_refused(small_store: Store, tmp_path: Path) -> None:
    for setting in ("inference.repetition_penalty=1.2", "inference.tokens_to_generate=7", "prompt=x", "neighbors=[x]"):
        with pytest.raises(UsageError, match="training does not read it"):
            train(config(small_store, tmp_path / "r", setting), Reporter("quiet"))
    more = ["model.data.dataloader_type=single", "model.global_batch_size=1000"]
    with pytest.raises(UsageError, match="gives .* sequences"):
        train(config(small_store, tmp_path / "r", *more), Reporter("quiet"))


def test_a_checkpoint_has_its_own_validation_loss_and_the_last_one_always(small_store: Store, tmp_path: Path) -> None:
    """That of an earlier step, or of the run before it was resumed, is not its own: it would be kept as the best."""
    more = [
        *PLAIN,
        "trainer.val_check_interval=4",
        "exp_manager.checkpoint_every_n_steps=3",
        "exp_manager.keep_last_n=0",
    ]
    train(config(small_store, tmp_path / "r", *more, "trainer.max_steps=3"), Reporter("quiet"))
    train(config(small_store, tmp_path / "r", *more, "trainer.max_steps=7"), Reporter("quiet"))
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    measured = {row["step"]: row["valid_loss_off"] for row in rows if "valid_loss_off" in row}
    assert sorted(measured) == [3, 4, 7]
    saved = {
        folder.name: checkpoint.read_trainer(folder)["valid_loss"]
        for folder in checkpoint.complete_checkpoints(tmp_path / "r")
    }
    assert measured[4] < measured[3], "so it is saved, though no checkpoint was due"
    expected = {3: measured[3], 4: measured[4], 6: None, 7: measured[7]}
    assert saved == {f"step-{step:06d}": loss for step, loss in expected.items()}


def test_a_run_that_is_out_of_time_is_validated(small_store: Store, tmp_path: Path) -> None:
    late = [*PLAIN, "trainer.max_time_s=0.001", "trainer.val_check_interval=100"]
    result = train(config(small_store, tmp_path / "r", *late), Reporter("quiet"))
    assert (result.step, result.exit_code) == (1, 0)
    assert checkpoint.read_trainer(result.checkpoint)["valid_loss"] == result.metrics["valid_loss_off"]
