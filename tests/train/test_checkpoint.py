"""Checkpoints that a kill, a full folder or a damaged file left: what is whole is used, the rest is named."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from training_helpers import config

from retro_engine.data.store import Store
from retro_engine.errors import MissingInputError, OutOfResourceError, StoreError
from retro_engine.progress import Reporter
from retro_engine.train import checkpoint
from retro_engine.train.adapters import load_model
from retro_engine.train.loop import train

PLAIN = ["model.retrieval=false", "trainer.val_check_interval=2", "trainer.limit_val_batches=1",
         "exp_manager.checkpoint_every_n_steps=2", "exp_manager.create_tensorboard_logger=false"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(small_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 2, 4 and 6."""
    run = tmp_path_factory.mktemp("trained") / "run"
    train(config(small_store, run, *PLAIN, "trainer.max_steps=6", "exp_manager.keep_last_n=0"), Reporter("quiet"))
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def steps(run: Path) -> list[int]:
    return [int(path.name[5:]) for path in checkpoint.complete_checkpoints(run, lambda text: None)]


def rewrite(folder: Path, name: str, content: bytes) -> None:
    """Replace a file and repair its checksum."""
    hashes = json.loads((folder / "COMPLETE").read_text()) | {name: hashlib.sha256(content).hexdigest()}
    for path, raw in ((folder / name, content), (folder / "COMPLETE", json.dumps(hashes).encode())):
        path.unlink()
        path.write_bytes(raw)


@pytest.mark.parametrize("lost", ["trainer.json", "model.safetensors", "tokenizer.json"])
def test_what_a_kill_left_of_a_removed_checkpoint_does_not_stop_training(
    small_store: Store, run: Path, capsys: pytest.CaptureFixture[str], lost: str
) -> None:
    """Earlier versions removed file by file, so that COMPLETE could outlive the others."""
    (run / "checkpoints" / "step-000002" / lost).unlink()
    assert steps(run) == [4, 6]
    goes_on = config(small_store, run, *PLAIN, "trainer.max_steps=8", "exp_manager.keep_last_n=1")
    assert train(goes_on, Reporter()).step == 8
    assert "step-000002 cannot be read and is passed over" in capsys.readouterr().err
    assert 8 in steps(run)


def test_a_kill_in_the_middle_of_pruning_leaves_no_half_of_one(
    small_store: Store, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        pass

    def killed(path: Path, **_: object) -> None:
        if Path(path).is_dir():
            (Path(path) / "trainer.json").unlink()
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KilledError):
            checkpoint._discard(run / "checkpoints" / "step-000002")
    said: list[str] = []
    assert [path.name for path in checkpoint.complete_checkpoints(run, said.append)] == ["step-000004", "step-000006"]
    assert said == []
    (run / "checkpoints" / ".step-000005.tmp").mkdir()
    train(config(small_store, run, *PLAIN, "trainer.max_steps=8", "exp_manager.keep_last_n=1"), Reporter("quiet"))
    assert not list((run / "checkpoints").glob(".*")), "what was left is removed"


def test_a_checkpoint_that_cannot_be_removed_is_said(
    small_store: Store, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(folder: Path) -> None:
        if folder.exists():
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint, "_discard", refused)
    goes_on = config(small_store, run, *PLAIN, "trainer.max_steps=8", "exp_manager.keep_last_n=1")
    assert train(goes_on, Reporter()).step == 8
    assert "step-000002 cannot be removed: Permission denied" in capsys.readouterr().err


def test_a_pipe_at_a_checkpoint_s_place_is_not_waited_for(small_store: Store, run: Path) -> None:
    for name in ("step-000008", ".step-000006.tmp", ".step-000003.old"):
        os.mkfifo(run / "checkpoints" / name)
    checkpoint._discard(run / "checkpoints" / "step-000008")
    assert not (run / "checkpoints" / "step-000008").exists()
    assert train(config(small_store, run, *PLAIN, "trainer.max_steps=8"), Reporter("quiet")).step == 8
    assert 8 in steps(run)


def test_a_link_at_a_checkpoint_s_place_is_not_followed(run: Path, tmp_path: Path) -> None:
    shutil.move(run / "checkpoints" / "step-000002", tmp_path / "elsewhere")
    link = run / "checkpoints" / "step-000002"
    link.symlink_to(tmp_path / "elsewhere")
    checkpoint._discard(link)
    assert not link.is_symlink()
    assert (tmp_path / "elsewhere" / "COMPLETE").is_file()


def test_a_damaged_newest_one_is_passed_over_and_written_again(
    small_store: Store, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has the name under which the same step is saved again."""
    newest = run / "checkpoints" / "step-000006"
    (newest / "COMPLETE").unlink()
    (newest / "COMPLETE").write_text("{")
    assert checkpoint.find_checkpoint(run).name == "step-000004"
    assert "step-000006" in capsys.readouterr().err
    result = train(config(small_store, run, *PLAIN, "trainer.max_steps=6"), Reporter("quiet"))
    assert (result.step, steps(run)[-1]) == (6, 6)
    checkpoint.verify(newest)


def test_a_loss_that_is_no_number_is_not_the_best(small_store: Store, run: Path) -> None:
    first = run / "checkpoints" / "step-000002"
    state = json.loads((first / "trainer.json").read_text())
    rewrite(first, "trainer.json", json.dumps({**state, "valid_loss": float("nan")}).encode())
    train(config(small_store, run, *PLAIN, "trainer.max_steps=8", "exp_manager.keep_last_n=1"), Reporter("quiet"))
    assert 2 not in steps(run)


def test_the_best_is_of_what_the_newest_was_validated_on(small_store: Store, tmp_path: Path) -> None:
    """A run that goes on with other validation batches: the lower loss of before is of others, and not kept for ever."""
    run, more = tmp_path / "r", [*PLAIN, "exp_manager.keep_last_n=1"]
    first = train(config(small_store, run, *more, "trainer.max_steps=2"), Reporter("quiet")).checkpoint
    state = json.loads((first / "trainer.json").read_text())
    rewrite(first, "trainer.json", json.dumps({**state, "valid_loss": 0.5}).encode())
    again = [*more, "trainer.limit_val_batches=2"]
    last = train(config(small_store, run, *again, "trainer.max_steps=4"), Reporter("quiet")).checkpoint
    assert checkpoint.read_trainer(last)["validated_on"] != state["validated_on"]
    assert checkpoint.complete_checkpoints(run) == [checkpoint.find_checkpoint(run)] == [last]

    rewrite(last, "trainer.json", json.dumps({**checkpoint.read_trainer(last), "valid_loss": 0.5}).encode())
    train(config(small_store, run, *again, "trainer.max_steps=6"), Reporter("quiet"))
    assert checkpoint.find_checkpoint(run) == last, "the same batches"


HOSTILE = {
    "deep": b"[" * 200_000,
    "no object": b"[]",
    "no text": b"\xff\xfe",
    "nothing": b"",
    "no step": b"{}",
    "a step that is no number": b'{"step": "x"}',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_state_with_a_right_checksum(small_store: Store, run: Path, name: str) -> None:
    for step in (2, 4, 6):
        rewrite(run / "checkpoints" / f"step-{step:06d}", "trainer.json", HOSTILE[name])
    with pytest.raises(MissingInputError, match="no complete checkpoint"):
        checkpoint.find_checkpoint(run)
    folder = run / "checkpoints" / "step-000006"
    with pytest.raises(StoreError, match=r"trainer\.json is damaged"):
        checkpoint.read_trainer(folder)
    rewrite(folder, "generation_config.json", HOSTILE[name])
    with pytest.raises(StoreError, match=r"generation_config\.json is damaged"):
        checkpoint.read_generation(folder)
    (folder / "COMPLETE").unlink()
    (folder / "COMPLETE").write_bytes(HOSTILE[name])
    with pytest.raises(StoreError, match="COMPLETE"):
        checkpoint.verify(folder)


def hostile_tensors(raw: bytes) -> dict[str, bytes]:
    """What may stand in place of a .safetensors file, from one that is right."""
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])

    def with_header(content: bytes) -> bytes:
        return len(content).to_bytes(8, "little") + content + raw[8 + size :]

    def changed(**values: object) -> bytes:
        return with_header(
            json.dumps({k: v if k == "__metadata__" else {**v, **values} for k, v in header.items()}).encode()
        )

    return {
        "nothing": b"",
        "cut": raw[:-64],
        "a long header": (1 << 60).to_bytes(8, "little") + raw[8:],
        "deep": with_header(b"[" * 100_000),
        "an unknown type": changed(dtype="F8_E8M0"),
        "whole numbers": changed(dtype="I32"),
        "other names": with_header(json.dumps({f"other.{k}": v for k, v in header.items() if k[0] != "_"}).encode()),
        "its parts are a list": with_header(json.dumps({**header, "__metadata__": {"DCP_SHARDING_INFO": "[]"}}).encode()),
        "its parts are deep": with_header(json.dumps({**header, "__metadata__": {"DCP_SHARDING_INFO": "[" * 99_999}}).encode()),
        "noise": raw[: 8 + size] + b"\xff" * (len(raw) - 8 - size),
    }  # fmt: skip


WEIGHTS_MAY = ("its parts are a list", "its parts are deep", "noise")  # nobody reads them, or training says it


@pytest.mark.parametrize("name", hostile_tensors(b"\2\0\0\0\0\0\0\0{}"))
def test_hostile_tensors_with_a_right_checksum(small_store: Store, run: Path, name: str) -> None:
    again = config(small_store, run, *PLAIN, "trainer.max_steps=8")
    folder = run / "checkpoints" / "step-000006"
    weights = (folder / "model.safetensors").read_bytes()
    if name not in WEIGHTS_MAY:
        rewrite(folder, "model.safetensors", hostile_tensors(weights)[name])
        with pytest.raises(StoreError, match=r"model\.safetensors"):
            train(again, Reporter("quiet"))
        with pytest.raises(StoreError, match=r"model\.safetensors"):
            load_model(folder)
        rewrite(folder, "model.safetensors", weights)
    (shard,) = (folder / "optimizer").iterdir()
    rewrite(folder, f"optimizer/{shard.name}", hostile_tensors(shard.read_bytes())[name])
    with pytest.raises(StoreError, match="optimizer cannot be read"):
        train(again, Reporter("quiet"))


def test_a_size_that_the_weights_do_not_have(run: Path) -> None:
    folder = run / "checkpoints" / "step-000006"
    values = json.loads((folder / "config.json").read_text())
    for changed in ({"hidden_size": 1 << 30}, {"dec_num_layers": 10**9}, {"ffn_hidden_size": 1 << 30}):
        rewrite(folder, "config.json", json.dumps(values | changed).encode())
        with pytest.raises(StoreError, match="does not fit"):
            load_model(folder)


@pytest.mark.parametrize("field", ["tokens_seen", "precision", "stream", "fingerprints", "good_steps"])
def test_a_state_that_lacks_a_field_names_it(small_store: Store, run: Path, field: str) -> None:
    folder = run / "checkpoints" / "step-000006"
    state = json.loads((folder / "trainer.json").read_text())
    rewrite(folder, "trainer.json", json.dumps({key: value for key, value in state.items() if key != field}).encode())
    with pytest.raises(StoreError, match=f"it has no {field}"):
        train(config(small_store, run, *PLAIN, "trainer.max_steps=8"), Reporter("quiet"))


def test_a_pipe_in_place_of_a_file_is_not_waited_for(run: Path) -> None:
    folder = run / "checkpoints" / "step-000006"
    (folder / "trainer.json").unlink()
    os.mkfifo(folder / "trainer.json")
    assert checkpoint.find_checkpoint(run).name == "step-000004"
    with pytest.raises(StoreError, match=r"trainer\.json"):
        checkpoint.verify(folder)


def test_no_memory_for_the_optimizer_or_a_save_names_the_checkpoint(
    small_store: Store, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise MemoryError

    again = config(small_store, run, *PLAIN, "trainer.max_steps=8")
    for name, said in (
        ("_load_shards", "step-000006/optimizer cannot be read"),
        ("_complete", "step-000008 cannot be written"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, name, refused)
            with pytest.raises(OutOfResourceError, match=said):
                train(again, Reporter("quiet"))
