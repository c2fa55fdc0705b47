"""Training: it learns, it logs, and a run that is stopped goes on as the same run."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import small_disk, write_corpus
from retro_kernels.backend import backend
from training_helpers import NEMO_INFERENCE, NEMO_TRAINING, SMALL, config, losses, settings

from retro_engine.cli import main
from retro_engine.config import load_config, preset_model
from retro_engine.data.prepare import prepare
from retro_engine.data.store import Store
from retro_engine.errors import GateError, MissingExtraError, OutOfResourceError, RetroError, StoreError, UsageError
from retro_engine.model.weights import read_config
from retro_engine.progress import Reporter
from retro_engine.retrieval.neighbors import build_neighbors
from retro_engine.train import checkpoint, loop
from retro_engine.train.loop import kernels_in_use, open_data, open_evaluation, train


@pytest.fixture(scope="module")
def whole(small_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps without interruption."""
    out = tmp_path_factory.mktemp("run") / "whole"
    result = train(config(small_store, out), Reporter("quiet"))
    assert (result.step, result.exit_code) == (12, 0)
    return out


def test_it_learns_and_writes_everything_down(whole: Path) -> None:
    found = losses(whole)
    assert sorted(found) == list(range(1, 13))
    assert found[12] < found[1] - 0.5
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert {"valid_bits_per_byte_on", "valid_bits_per_byte_off"} <= set().union(*rows)
    assert all(row["tokens_per_s"] > 0 and 0 < row["mfu"] < 20 for row in rows if "mfu" in row)
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


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """Weights, optimizer and random state of a checkpoint of one process."""
    from safetensors.torch import load_file

    files = [folder / "model.safetensors", *(folder / "optimizer").iterdir()]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


# ten points of interruption here, a hundred in the campaign
@pytest.mark.parametrize(
    "stops",
    [[5], [1, 2, 11], [7, 8], [3, 4, 6, 9]] + [[n % 11 + 1] for n in range(90) if os.environ.get("RETRO_CAMPAIGN")],
)
def test_resume_is_the_same_run(small_store: Store, whole: Path, tmp_path: Path, stops: list[int]) -> None:
    """Losses, weights, optimizer and random state bit-identical, also after the second and third resume; the
    random state matters here: dropout is on."""
    for stop in [*stops, 12]:
        # the schedule is of the whole run
        train(
            config(small_store, tmp_path / "r", f"trainer.max_steps={stop}", "model.optim.sched.max_steps=12"),
            Reporter("quiet"),
        )
    assert losses(tmp_path / "r") == losses(whole)
    mine, theirs = (state_of(checkpoint.find_checkpoint(run)) for run in (tmp_path / "r", whole))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


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


def test_compiled_step_has_the_eager_losses(small_store: Store, tmp_path: Path) -> None:
    still = [
        "model.hidden_dropout=0",
        "model.attention_dropout=0",
        "trainer.max_steps=3",
        "model.data.neighbor_dropout=0",
    ]
    for name in ("false", "true"):
        train(config(small_store, tmp_path / name, *still, f"trainer.compile={name}"), Reporter("quiet"))
    for step, loss in losses(tmp_path / "false").items():
        assert losses(tmp_path / "true")[step] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_the_run_goes_on(
    small_store: Store, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "retro_engine.train",
        *settings(small_store, out, "trainer.max_steps=100000", "trainer.val_check_interval=100000"),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < 3:
            assert time.monotonic() < deadline
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.1)
        process.send_signal(number)
        start = time.monotonic()
        process.communicate()
        assert process.returncode == code
        assert time.monotonic() - start < 30
    step = json.loads((checkpoint.find_checkpoint(out) / "trainer.json").read_text())["step"]
    assert step >= 3
    result = train(config(small_store, out, f"trainer.max_steps={step + 2}"), Reporter("quiet"))
    assert result.step == step + 2
    assert sorted(losses(out)) == list(range(1, step + 3))


def test_kill_9_during_checkpoints_leaves_one_that_loads(small_store: Store, tmp_path: Path) -> None:
    out = tmp_path / "run"
    often = ["trainer.max_steps=100000", "exp_manager.checkpoint_every_n_steps=1", "trainer.val_check_interval=100000"]
    rng = np.random.default_rng(0)
    last = 0
    for _ in range(1000 if os.environ.get("RETRO_CAMPAIGN") else 3):
        command = [sys.executable, "-m", "retro_engine.train", *settings(small_store, out, *often)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 60
            while (
                len(checkpoint.complete_checkpoints(out)) == 0
                or int(checkpoint.complete_checkpoints(out)[-1].name[5:]) <= last
            ):
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.02)
            time.sleep(float(rng.random()) * 0.3)
            process.kill()
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


def test_another_model_other_data_or_a_used_folder(small_store: Store, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    with pytest.raises(UsageError, match="ffn_hidden_size 64 -> 128"):
        train(config(small_store, run, "model.ffn_hidden_size=128"), Reporter("quiet"))
    with pytest.raises(UsageError, match="holds a run"):
        train(config(small_store, run), Reporter("quiet"), resume="never")
    state = checkpoint.find_checkpoint(run) / "trainer.json"
    changed = state.read_text().replace(small_store.fingerprint, "0" * 64)
    state.unlink()
    state.write_text(changed)
    with pytest.raises(StoreError, match="damaged"):
        train(config(small_store, run, "trainer.max_steps=13"), Reporter("quiet"))
    complete = state.with_name("COMPLETE")
    hashes = json.loads(complete.read_text()) | {"trainer.json": hashlib.sha256(changed.encode()).hexdigest()}
    complete.unlink()
    complete.write_text(json.dumps(hashes))
    with pytest.raises(StoreError, match="was trained with store 0000"):
        train(config(small_store, run, "trainer.max_steps=13"), Reporter("quiet"))


def test_other_order_or_splits_are_refused(small_store: Store, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for change, named in (("model.data.splits_string='50,50,0'", "splits_string 80,20,0 -> 50,50,0"), ("seed=5", "seed 1234 -> 5"),
                          ("model.micro_batch_size=4", "sequences_per_step 2 -> 4")):  # fmt: skip
        with pytest.raises(StoreError, match=named):
            train(config(small_store, run, "trainer.max_steps=13", change), Reporter("quiet"))


def test_going_on_from_an_older_checkpoint(small_store: Store, tmp_path: Path) -> None:
    """In the same folder it is refused, because two histories would mix; in another folder it works."""
    run = tmp_path / "run"
    train(config(small_store, run, "trainer.max_steps=4", "exp_manager.checkpoint_every_n_steps=2"), Reporter("quiet"))
    older = run / "checkpoints" / "step-000002"
    with pytest.raises(UsageError, match="two histories"):
        train(config(small_store, run), Reporter("quiet"), resume=str(older))
    result = train(config(small_store, tmp_path / "other", "trainer.max_steps=3"), Reporter("quiet"), resume=str(older))
    assert result.step == 3
    assert result.checkpoint.is_dir()


def test_the_last_steps_of_a_single_pass_are_saved_and_logged(small_store: Store, tmp_path: Path) -> None:
    once = ["model.data.dataloader_type=single", "exp_manager.checkpoint_every_n_steps=4", "trainer.max_steps=1000",
            "trainer.log_every_n_steps=7", "model.micro_batch_size=4"]  # fmt: skip
    result = train(config(small_store, tmp_path / "r", *once), Reporter("quiet"))
    assert 4 < result.step < 1000
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


def test_a_signal_during_validation(small_store: Store, tmp_path: Path) -> None:
    out = tmp_path / "run"
    slow = [
        "trainer.max_steps=100000",
        "trainer.val_check_interval=2",
        "trainer.limit_val_batches=null",
        "trainer.log_every_n_steps=1",
    ]
    command = [sys.executable, "-m", "retro_engine.train", *settings(small_store, out, *slow)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (out / "metrics.jsonl").exists() or '"step": 2' not in (out / "metrics.jsonl").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate()
    assert process.returncode == 143
    step = int(checkpoint.find_checkpoint(out).name[5:])
    assert f"at step {step}, checkpoint saved" in said


def test_a_checkpoint_of_a_gpu_resumes_without_one(small_store: Store, tmp_path: Path) -> None:
    """It holds the GPU's random state as well, which a CPU has no use for."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    train(config(small_store, tmp_path / "r", "trainer.max_steps=2"), Reporter("quiet"))
    folder = checkpoint.find_checkpoint(tmp_path / "r")
    (path,) = (folder / "optimizer").iterdir()
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    where = json.loads(metadata["DCP_SHARDING_INFO"])
    where["cuda_random_state.0"] = {"saved_offsets": [0]}
    tensors = load_file(path) | {"cuda_random_state.0": torch.zeros(16, dtype=torch.uint8)}
    path.unlink()
    save_file(tensors, path, metadata | {"DCP_SHARDING_INFO": json.dumps(where)})
    name = f"optimizer/{path.name}"
    hashes = json.loads((folder / "COMPLETE").read_text()) | {name: hashlib.sha256(path.read_bytes()).hexdigest()}
    (folder / "COMPLETE").unlink()
    (folder / "COMPLETE").write_text(json.dumps(hashes))
    assert train(config(small_store, tmp_path / "r", "trainer.max_steps=3"), Reporter("quiet")).step == 3


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


def test_an_incomplete_or_damaged_checkpoint(whole: Path, tmp_path: Path) -> None:
    from retro_engine.api import Retro

    run = tmp_path / "run"
    shutil.copytree(whole, run)
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


def test_an_extra_that_is_not_installed(small_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"retro-engine\[train\]") as raised:
        train(config(small_store, tmp_path / "a", "exp_manager.create_tensorboard_logger=true"), Reporter("quiet"))
    assert raised.value.exit_code == 4
    train(config(small_store, tmp_path / "b", "trainer.max_steps=1"), Reporter("quiet"))


def test_the_plain_decoder_trains_without_a_table(small_store: Store, tmp_path: Path) -> None:
    result = train(
        config(small_store, tmp_path / "r", "model.retrieval=false", "trainer.max_steps=6"), Reporter("quiet")
    )
    assert "valid_bits_per_byte_off" in result.metrics
    assert "valid_bits_per_byte_on" not in result.metrics


def test_evaluation_on_a_store_of_another_tokenizer_is_refused(small_store: Store, whole: Path, tmp_path: Path) -> None:
    """`retro eval RUN model.data.store=OTHER`: its ids are not the model's, whatever their range."""
    source = write_corpus(tmp_path / "c.jsonl", 12, seed=3)
    other = prepare([source], tmp_path / "s", vocab_size=300, chunk_size=16)
    build_neighbors(other, [other], "hash", 4)
    folder = checkpoint.find_checkpoint(whole)
    given = [f"model.data.store={other.folder}", "model.data.neighbors=hash"]
    with pytest.raises(StoreError, match=f"{folder} has tokenizer .*\n.*{other.folder} has .*\n.*retro prepare"):
        open_evaluation(folder, read_config(folder), given, "valid")
    found = open_evaluation(folder, read_config(folder), [], "valid")
    assert found.store.fingerprint == small_store.fingerprint


def test_copies_of_held_out_documents_are_named(small_store: Store, tmp_path: Path) -> None:
    """In one store, and where a validation store repeats what is trained on."""
    source = write_corpus(tmp_path / "c.jsonl", 12, seed=5)
    tokenizer = str(small_store.folder)
    one = prepare([source], tmp_path / "one", tokenizer, chunk_size=16)
    source.write_text(source.read_text() * 2)
    twice = prepare([source], tmp_path / "twice", tokenizer, chunk_size=16)
    plain = ["model.retrieval=false", "model.data.splits_string='50,50,0'"]
    for store, more, count in (
        (one, [], 0),
        (twice, [], 1),
        (one, [f"model.data.valid_store={twice.folder}"], 24),
        (one, [f"model.data.valid_store={small_store.folder}"], 0),
    ):
        data = open_data(load_config([*settings(store, tmp_path / "run", *plain), *more]))
        assert (data.warning is not None) == (count > 0)
        assert count == 0 or (data.warning or "").startswith("WARNING: ")
        assert count < 2 or f"{count} of 24 held-out documents" in (data.warning or "")


PLAIN = ["model.retrieval=false", "exp_manager.create_tensorboard_logger=false"]


def test_a_finished_run_says_so_and_is_left_as_it_is(
    small_store: Store, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    for steps in (12, 5):
        again = train(config(small_store, run, f"trainer.max_steps={steps}"), Reporter())
        said = capsys.readouterr().err
        assert f"is finished: it has 12 of trainer.max_steps={steps}" in said
        assert "trainer.max_steps=24 goes on" in said
        assert (again.step, again.checkpoint) == (12, checkpoint.find_checkpoint(run))
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(("first", "then"), [("32", "64"), ("64", "16-mixed"), ("16-mixed", "bf16-mixed")])
def test_another_precision_is_applied_on_resume_and_said(
    small_store: Store,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    first: str,
    then: str,
) -> None:
    monkeypatch.setattr(loop, "peak_flops", lambda device: 1e12)  # it takes a second to measure
    run, sched = tmp_path / "run", "model.optim.sched.max_steps=12"
    for precision, steps in ((first, 2), (then, 4), ("auto", 6)):
        more = [*PLAIN, sched, f"trainer.precision={precision}", f"trainer.max_steps={steps}"]
        train(config(small_store, run, *more), Reporter())
    said = capsys.readouterr().err
    assert f"trainer.precision={then} from step 3 on; before it was {first}" in said
    assert said.count("from step") == 1, "auto goes on with what was"
    state = checkpoint.read_trainer(checkpoint.find_checkpoint(run))
    assert state["precision"] == then
    assert state["loss_scale"] == (2.0**16 if then == "16-mixed" else 1.0)
    weights = state_of(checkpoint.find_checkpoint(run))
    expected = torch.float64 if then == "64" else torch.float32
    assert {value.dtype for name, value in weights.items() if "random" not in name and "step" not in name} == {expected}
    found = losses(run)
    assert found[6] < found[1]


def test_validation_by_shares_and_none(small_store: Store, tmp_path: Path) -> None:
    """NeMo's spellings: a share of an epoch between validations, a share of the validation data, 0 = none."""
    none = [*PLAIN, "trainer.max_steps=4", "trainer.val_check_interval=1", "trainer.limit_val_batches=0"]
    assert "valid_loss_off" not in train(config(small_store, tmp_path / "none", *none), Reporter("quiet")).metrics
    shares = [*PLAIN, "trainer.max_steps=8", "trainer.val_check_interval=0.1", "trainer.limit_val_batches=0.25",
              "model.micro_batch_size=4"]  # fmt: skip
    asked = config(small_store, tmp_path / "shares", *shares)
    train(asked, Reporter("quiet"))
    every = int(0.1 * (len(open_data(asked).train.epoch(asked.seed, 0)) // 4))
    assert 1 < every < 8
    rows = [json.loads(line) for line in (tmp_path / "shares" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "valid_loss_off" in row] == list(range(every, 9, every))


def test_runs_of_another_order_are_not_gone_on_with(small_store: Store, tmp_path: Path) -> None:
    """Earlier versions ordered unshuffled data by length, and did not shuffle its sequences."""
    run, more = tmp_path / "run", [*PLAIN, "model.data.shuffle_documents=false"]
    train(config(small_store, run, *more, "trainer.max_steps=2"), Reporter("quiet"))
    folder = checkpoint.find_checkpoint(run)
    state = json.loads((folder / "trainer.json").read_text())
    assert state["stream"].pop("order") == "sequences shuffled"
    content = json.dumps(state).encode()
    hashes = json.loads((folder / "COMPLETE").read_text()) | {"trainer.json": hashlib.sha256(content).hexdigest()}
    for path, raw in ((folder / "trainer.json", content), (folder / "COMPLETE", json.dumps(hashes).encode())):
        path.unlink()
        path.write_bytes(raw)
    with pytest.raises(StoreError, match="order None -> sequences"):
        train(config(small_store, run, *more, "trainer.max_steps=3"), Reporter("quiet"))


def test_settings_that_training_does_not_read_are_refused(small_store: Store, tmp_path: Path) -> None:
    for setting in ("inference.repetition_penalty=1.2", "inference.tokens_to_generate=7", "prompt=x", "neighbors=[x]"):
        with pytest.raises(UsageError, match="training does not read it"):
            train(config(small_store, tmp_path / "r", setting), Reporter("quiet"))
    more = ["model.data.dataloader_type=single", "model.global_batch_size=1000"]
    with pytest.raises(UsageError, match="gives .* sequences"):
        train(config(small_store, tmp_path / "r", *more), Reporter("quiet"))


def test_what_attention_runs_on_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """By type, and what a preset's masks leave to PyTorch; dropout of attention weights leaves nothing."""
    monkeypatch.delenv("RETRO_BACKEND", raising=False)
    fast = backend("cpu")
    base, mcore = (preset_model(name, vocab_size=9) for name in ("base", "mcore"))
    assert base.attention_dropout > 0
    assert kernels_in_use(base, "cpu", "32") == kernels_in_use(base, "cpu", "bf16-mixed") == fast
    assert kernels_in_use(base, "cpu", "64") == "reference"
    if fast == "cpp":
        assert kernels_in_use(mcore, "cpu", "32") == "cpp (PyTorch: self-attention (model.reset_attention=false))"
        assert "encoder's cross-attention" in kernels_in_use(preset_model("nemo", vocab_size=9), "cpu", "32")
