"""A run is used from any folder, also when it was moved; what is not there is said with every place looked at."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from training_helpers import SMALL, config

from retro_engine.cli import main
from retro_engine.config import load_config
from retro_engine.data import files
from retro_engine.data.store import Store
from retro_engine.errors import MissingInputError, StoreError
from retro_engine.model.weights import read_config
from retro_engine.progress import Reporter
from retro_engine.train import record
from retro_engine.train.checkpoint import find_checkpoint
from retro_engine.train.loop import train
from retro_engine.train.run_data import open_evaluation, run_config, run_databases

ONE_STEP = ["trainer.max_steps=1", "exp_manager.create_tensorboard_logger=false", "trainer.limit_val_batches=0"]


@pytest.fixture(scope="module")
def there(small_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with store/docs and runs/one, trained with paths relative to it."""
    folder = tmp_path_factory.mktemp("there")
    shutil.copytree(small_store.folder, folder / "store" / "docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        paths = ["model.data.store=store/docs", "model.data.neighbors=bm25", "exp_manager.exp_dir=runs/one"]
        train(load_config([*SMALL, *ONE_STEP, *paths]), Reporter("quiet"))
    return folder


@pytest.fixture
def place(there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it, with another working folder, while the original is away."""
    shutil.copytree(there, tmp_path / "place")
    shutil.move(there, tmp_path / "away")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    yield tmp_path / "place"
    shutil.move(tmp_path / "away", there)


def store_of(run: Path) -> str | None:
    return run_config(find_checkpoint(run), []).model.data.store


def test_from_another_folder(there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert store_of(there / "runs" / "one") == str(there / "store" / "docs")
    assert [store.folder for store in run_databases(find_checkpoint(there / "runs" / "one"))] == [
        there / "store" / "docs"
    ]
    assert main(["eval", str(there / "runs" / "one"), "--limit", "1", "--quiet"]) == 0


def test_moved_together(place: Path) -> None:
    assert store_of(place / "runs" / "one") == str(place / "store" / "docs")


def test_a_run_moved_alone_finds_its_store_by_name(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.move(place / "runs" / "one", tmp_path / "alone")
    with pytest.raises(MissingInputError) as raised:
        store_of(run)
    for word in ("looked at", "there", "store/docs", "RETRO_STORES", "model.data.store=PATH"):
        assert word in str(raised.value)
    assert main(["generate", str(run), "river", "inference.tokens_to_generate=1"]) == 3
    assert "RETRO_STORES" in capsys.readouterr().err
    for folders in (f"/nowhere:{place / 'store'}", str(place / "store" / "docs"), str(place / "store")):
        monkeypatch.setenv("RETRO_STORES", folders)
        assert store_of(run) == str(place / "store" / "docs")
    monkeypatch.delenv("RETRO_STORES")
    asked = run_config(find_checkpoint(run), [f"model.data.store={place}/store/docs"])
    assert asked.model.data.store == f"{place}/store/docs"


def test_another_store_at_its_place_is_not_evaluated(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other documents would be held out; the right one is found further on."""
    run, store = place / "runs" / "one", place / "store" / "docs"
    shutil.copytree(store, tmp_path / "good" / "docs")
    manifest = json.loads((store / "manifest.json").read_text())
    manifest.pop("fingerprint")
    manifest["counts"]["set_aside"] += 1
    body = {**manifest, "fingerprint": files.fingerprint(manifest)}
    (store / "manifest.json").unlink()
    (store / "manifest.json").write_text(json.dumps(body))
    folder = find_checkpoint(run)
    model = read_config(folder)
    with pytest.raises(MissingInputError, match="another one"):
        run_databases(folder)
    with pytest.raises(StoreError, match="not the store that the run was trained on"):
        open_evaluation(folder, model, [], "valid")
    monkeypatch.setenv("RETRO_STORES", str(tmp_path / "good"))
    assert open_evaluation(folder, model, [], "valid").store.folder == tmp_path / "good" / "docs"


def test_what_it_was_validated_on_is_known_by_its_contents(
    small_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of RETRO_STORES is not taken for the validation store because it is a store; what only retrieves needs none."""
    shutil.copytree(small_store.folder, tmp_path / "held")
    manifest = json.loads((tmp_path / "held" / "manifest.json").read_text())
    manifest.pop("fingerprint")
    manifest["counts"]["set_aside"] += 1
    (tmp_path / "held" / "manifest.json").unlink()
    (tmp_path / "held" / "manifest.json").write_text(
        json.dumps({**manifest, "fingerprint": files.fingerprint(manifest)})
    )
    run = tmp_path / "run"
    held = f"model.data.valid_store='{tmp_path}/held'"
    folder = train(config(small_store, run, *ONE_STEP, held, "model.retrieval=false"), Reporter("quiet")).checkpoint
    (tmp_path / "moved").mkdir()
    shutil.move(tmp_path / "held", tmp_path / "moved" / "held")
    monkeypatch.setenv("RETRO_STORES", str(small_store.folder))
    with pytest.raises(StoreError, match="not the store that the run was validated on"):
        open_evaluation(folder, read_config(folder), [], "valid")
    assert run_config(folder, []).model.data.store == str(small_store.folder)
    monkeypatch.setenv("RETRO_STORES", f"{small_store.folder}:{tmp_path / 'moved'}")
    assert open_evaluation(folder, read_config(folder), [], "valid").store.folder == tmp_path / "moved" / "held"


def test_without_what_it_was_validated_on_a_run_still_answers(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(there / "runs" / "one", tmp_path / "run")
    text = (run / record.SETTINGS_FILE).read_text().split("\n", 1)[1]
    (run / record.SETTINGS_FILE).unlink()
    (run / record.SETTINGS_FILE).write_text(text.replace("valid_questions: null", "valid_questions: /gone/v.jsonl"))
    folder = find_checkpoint(run)
    assert [store.folder for store in run_databases(folder)] == [there / "store" / "docs"]
    with pytest.raises(MissingInputError, match=r"valid_questions=/gone/v\.jsonl"):
        open_evaluation(folder, read_config(folder), [], "valid")


@pytest.mark.parametrize("where", ["cwd", "moved"])
def test_runs_of_earlier_versions_with_relative_paths(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """They wrote what was typed: it is found from the working folder, and from the run's folder."""
    run = place / "runs" / "one"
    text = (run / record.SETTINGS_FILE).read_text().split("\n", 1)[1]
    absolute = next(line.split(": ", 1)[1] for line in text.splitlines() if line.strip().startswith("store:"))
    base = absolute.removesuffix("/store/docs")
    (run / record.SETTINGS_FILE).unlink()
    (run / record.SETTINGS_FILE).write_text(text.replace(f"{base}/", ""))
    if where == "cwd":
        monkeypatch.chdir(place)
        assert store_of(Path("runs/one")) == "store/docs"
    else:
        assert store_of(run) == str(place / "store" / "docs")
