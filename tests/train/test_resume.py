"""A run that is stopped goes on as the same run; with another model, other data or another order it does not."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from training_helpers import PLAIN, config, losses, state_of

from retro_engine.data.store import Store
from retro_engine.errors import StoreError, UsageError
from retro_engine.model import ops
from retro_engine.progress import Reporter
from retro_engine.train import checkpoint
from retro_engine.train.loop import train
from retro_engine.train.resume import find_start


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


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
def test_fp32_products_stay_those_that_the_run_began_with(
    small_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is faster when it goes on, also with recomputation; another one is said."""
    steps, kept = "model.optim.sched.max_steps=4", "model.activations_checkpoint_granularity=selective"
    more = ("trainer.precision=32", kept, steps)
    before = ops.product_library()
    try:
        ops.use_products("onednn")
        train(config(small_store, tmp_path / "whole", *more, "trainer.max_steps=4"), Reporter("quiet"))
        train(config(small_store, tmp_path / "r", *more, "trainer.max_steps=2"), Reporter("quiet"))
        ops.use_products("blas")
        train(config(small_store, tmp_path / "r", *more, "trainer.max_steps=4"), Reporter())
        assert "fp32 products" not in capsys.readouterr().err
        assert losses(tmp_path / "r") == losses(tmp_path / "whole")
        assert ops.product_library() == "onednn"
        monkeypatch.setenv("RETRO_PRODUCTS", "blas")
        train(config(small_store, tmp_path / "r", *more, "trainer.max_steps=5"), Reporter())
        assert "fp32 products by blas from step 5 on; before it was onednn" in capsys.readouterr().err
    finally:
        ops.use_products(before)
    assert checkpoint.read_trainer(checkpoint.find_checkpoint(tmp_path / "r"))["products"] == "blas"


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


def test_the_same_model_may_be_spelled_otherwise(small_store: Store, whole: Path) -> None:
    """None stands for a value that may be written out; another value is another model."""
    m = config(small_store, whole).model
    assert m.retrieved_length is m.num_query_groups is m.encoder_hidden_size is m.qk_bias is None
    size = f"model.vocab_size={small_store.vocab_size}"  # as training sets it
    same = [f"model.retrieved_length={2 * m.chunk_size}", f"model.num_query_groups={m.num_attention_heads}",
            f"model.encoder_hidden_size={m.hidden_size}", f"model.encoder_ffn_hidden_size={m.ffn_hidden_size}",
            "model.qk_bias=false", "model.embedding_scale=1"]  # fmt: skip
    start = checkpoint.find_checkpoint(whole)
    assert find_start(config(small_store, whole, size, *same), whole, "auto", None, print) == start
    for other in ("model.num_query_groups=1", f"model.retrieved_length={m.chunk_size}", "model.qk_bias=true"):
        with pytest.raises(UsageError, match="another model"):
            find_start(config(small_store, whole, size, other), whole, "auto", None, print)


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


def test_a_finished_run_says_so_and_is_left_as_it_is(
    small_store: Store, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    for steps in (12, 5):
        more = [f"trainer.max_steps={steps}", "model.optim.lr=2e-2"]  # what nothing goes on with is not said
        again = train(config(small_store, run, *more), Reporter())
        said = capsys.readouterr().err
        assert f"is finished: it has 12 of trainer.max_steps={steps}" in said
        assert "trainer.max_steps=24 goes on" in said
        assert "resuming" not in said and "from step" not in said
        assert (again.step, again.checkpoint) == (12, checkpoint.find_checkpoint(run))
    assert {path: path.read_bytes() for path in before} == before


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


def test_a_muon_run_goes_on_as_the_same_and_not_with_another_optimizer(small_store: Store, tmp_path: Path) -> None:
    muon = [*PLAIN, "model.optim.name=muon", "model.optim.sched.max_steps=6"]
    for name, stops in (("whole", [6]), ("parts", [2, 3, 6])):
        for stop in stops:
            train(config(small_store, tmp_path / name, *muon, f"trainer.max_steps={stop}"), Reporter("quiet"))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    mine, theirs = (state_of(checkpoint.find_checkpoint(tmp_path / name)) for name in ("parts", "whole"))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    with pytest.raises(UsageError, match="the checkpoint's state is muon's\n.*model.optim.name=muon"):
        train(config(small_store, tmp_path / "parts", *PLAIN, "trainer.max_steps=8"), Reporter("quiet"))
    train(config(small_store, tmp_path / "adamw", *PLAIN, "trainer.max_steps=2"), Reporter("quiet"))
    with pytest.raises(UsageError, match="the checkpoint's state is adamw's"):
        train(config(small_store, tmp_path / "adamw", *muon, "trainer.max_steps=8"), Reporter("quiet"))


def test_what_a_run_learns_otherwise_with_is_applied_and_said(
    small_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = [*PLAIN, "trainer.max_steps=2", "model.optim.sched.name=constant", "model.optim.sched.warmup_steps=0"]
    train(config(small_store, tmp_path / "r", *first), Reporter())
    assert "before it was" not in capsys.readouterr().err
    other = ["trainer.max_steps=4", "model.optim.lr=1e-4", "model.optim.betas=[0.8,0.99]", "model.optim.weight_decay=0",
             "model.optim.clip=0.5"]  # fmt: skip
    train(config(small_store, tmp_path / "r", *first, *other), Reporter())
    said = capsys.readouterr().err
    for change in ("trainer.max_steps=4; before it was 2", "model.optim.lr=0.0001; before it was 0.005",
                   "model.optim.betas=[0.8, 0.99]; before it was [0.9, 0.95]", "model.optim.clip=0.5; before it was 1.0",
                   "model.optim.weight_decay=0.0; before it was 0.1"):  # fmt: skip
        assert f"from step 3 on {change}" in said
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [row["lr"] for row in rows if "lr" in row] == [5e-3, 5e-3, 1e-4, 1e-4]
    (tmp_path / "r" / "config.yaml").unlink()
    train(config(small_store, tmp_path / "r", *first, "trainer.max_steps=5"), Reporter())
    assert "before it was" not in capsys.readouterr().err, "nothing is known of how it learned"
