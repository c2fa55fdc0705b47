"""The Python quick start, end to end."""

import contextlib
import gc
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import small_model, write_corpus

from retro_engine import Corpus, Index, Retro, cli, fit
from retro_engine.api import Data
from retro_engine.data.kept_stores import keep
from retro_engine.data.neighbor_table import NeighborTable
from retro_engine.data.store import Store
from retro_engine.errors import MissingInputError, StoreError, UsageError
from retro_engine.retrieval.neighbors import build_neighbors

SMALL = ["model.hidden_size=32", "model.ffn_hidden_size=64", "model.num_attention_heads=2", "model.init=standard",
         "model.encoder_seq_length=64", "trainer.precision=32", "trainer.val_check_interval=100"]  # fmt: skip


def test_quick_start(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_corpus(tmp_path / f"{name}.jsonl", 15, seed=ord(name))
    corpus = Corpus.from_files(tmp_path / "*.jsonl", chunk_size=16, vocab_size=300)
    index = Index.build(corpus, retriever="bm25")
    assert index.search("Document doc7.", 1)[0].document == "d7"
    data = corpus.with_neighbors(index, k=2)
    assert len(data.valid.documents) == 3
    assert len(data.train.documents) == 27
    assert not len(data.test.documents)
    fit(data, preset="tiny", out=tmp_path / "run", steps=4, overrides=SMALL, quiet=True)
    model = Retro.from_pretrained(tmp_path / "run")
    evaluation = model.evaluate(data.valid)
    assert set(evaluation.losses) == {"on", "off", "random"}
    assert str(evaluation).startswith("bits per byte: on ")
    assert evaluation.summary()["on"]["documents"] == 3
    out = model.generate("Document doc7. river", index=index, max_new_tokens=8)
    assert out.neighbors[0].document
    assert out.neighbors[0].score > 0
    assert isinstance(out.text, str)
    assert model.generate("river", neighbors=["river stone"], max_new_tokens=2).neighbors[0].document == "given 1"
    again = Corpus.from_files(tmp_path / "a.jsonl", out=tmp_path / "store", vocab_size=300)
    assert Corpus.open(tmp_path / "store").store.fingerprint == again.store.fingerprint
    temporary = corpus.store.folder
    fit(data, preset="tiny", out=tmp_path / "run", steps=5, overrides=SMALL, quiet=True)
    with pytest.raises(UsageError, match="run/store holds other documents\n.*\n.*another out="):
        fit(_of(tmp_path / "a.jsonl"), preset="tiny", out=tmp_path / "run", steps=4, overrides=SMALL, quiet=True)
    del corpus, index, data
    gc.collect()
    assert not temporary.exists()


def test_every_command_uses_the_run_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whose store was temporary, also when the run was moved, and by the folder that it is in."""
    write_corpus(tmp_path / "a.jsonl", 12)
    monkeypatch.chdir(tmp_path)
    fit(_of("*.jsonl"), preset="tiny", out="runs/mine", steps=2, overrides=SMALL, quiet=True)
    gc.collect()
    (tmp_path / "other").mkdir()
    (tmp_path / "runs").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "other")
    run = tmp_path / "moved" / "mine"
    assert cli.main(["eval", str(run.parent), "--limit", "1"]) == 0
    said = capsys.readouterr()
    assert f"note: {run} is the run in {run.parent}" in said.err
    assert "on saves" in said.out
    assert "too few documents for an interval: 4, at least 5" in said.out
    assert cli.main(["generate", str(run), "river stone", "--max-new-tokens", "4", "--show-neighbors"]) == 0
    assert "could read" in capsys.readouterr().out
    assert cli.main(["report", str(run), "--limit", "1"]) == 0
    assert (run / "report.html").is_file()
    pytest.importorskip("starlette")
    from retro_engine.serve.service import ServiceOptions, open_service

    with contextlib.closing(open_service(ServiceOptions(run=str(run.parent)))) as service:
        assert service.static is not None
        assert [store.folder for store in service.static.stores] == [run / "store"]
        assert service.name == "mine"
    shutil.copytree(run, run.parent / "second")
    assert cli.main(["generate", str(run.parent), "river"]) == 2
    assert "holds 2 runs: mine, second" in capsys.readouterr().err


def test_neighbors_from_another_temporary_store_are_kept_too(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_corpus(tmp_path / f"{seed}.jsonl", 8, seed=seed)
    mine = Corpus.from_files(tmp_path / "0.jsonl", chunk_size=16, vocab_size=300)
    other = Corpus.from_files(tmp_path / "1.jsonl", chunk_size=16, tokenizer=str(mine.store.folder), quiet=True)
    data = mine.with_neighbors(Index.build(mine, other))
    kept = keep(data.store, data.table, tmp_path / "run")
    assert keep(data.store, data.table, tmp_path / "run") == kept, "a run that goes on"
    ids = data.table.ids(np.arange(5), 3)
    fewer = build_neighbors(data.store, data.table.databases, num_neighbors=3, name="fewer")
    shutil.move(fewer.folder, tmp_path / "bm25")
    shutil.rmtree(data.table.folder)
    shutil.move(tmp_path / "bm25", data.table.folder)  # the same name for others
    with pytest.raises(UsageError, match="holds other neighbors"):
        keep(data.store, NeighborTable(data.table.folder, data.store), tmp_path / "run")
    del mine, other, data
    gc.collect()
    assert kept == (tmp_path / "run" / "store", tmp_path / "run" / "store" / "neighbors" / "bm25")
    table = NeighborTable(kept[1], Store(kept[0]))
    assert [store.folder.name for store in table.databases] == ["store", "store-1"]
    np.testing.assert_array_equal(table.ids(np.arange(5), 3), ids)


def _of(pattern: str | Path) -> Data:
    corpus = Corpus.from_files(pattern, chunk_size=16, vocab_size=300, quiet=True)
    return corpus.with_neighbors(Index.build(corpus), splits="70,30,0")


def test_a_pattern_that_matches_nothing(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="nothing matches"):
        Corpus.from_files(tmp_path / "*.md")


def test_importing_the_package_does_no_work() -> None:
    import subprocess
    import sys

    code = "import sys, retro_engine; print('torch' in sys.modules, len(retro_engine.__all__))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False 5\n"
    )
    import retro_engine

    with pytest.raises(AttributeError):
        _ = retro_engine.nothing


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    """A model and the data of another tokenizer; an index of other stores than those of the table that is there."""
    stores = []
    for seed in (0, 1):
        source = write_corpus(tmp_path / f"{seed}.jsonl", 8, seed=seed)
        stores.append(Corpus.from_files(source, out=tmp_path / f"store{seed}", chunk_size=16, vocab_size=300))
    one, other = stores
    data = one.with_neighbors(Index.build(one, retriever="hash"))
    model = small_model(vocab_size=300, chunk_size=16, encoder_seq_length=64)
    assert Retro(model, one.store.tokenizer).sequences(data.valid)
    with pytest.raises(StoreError, match="the model has tokenizer .*\n.*store0 has"):
        Retro(model, other.store.tokenizer).evaluate(data.valid)
    with pytest.raises(StoreError, match="store0 has tokenizer .*\n.*store1 has"):
        one.with_neighbors(Index.build(other, retriever="hash"), name="far")
    same = Corpus.from_files(tmp_path / "1.jsonl", out=tmp_path / "s", tokenizer=str(one.store.folder), chunk_size=16)
    with pytest.raises(StoreError, match="has neighbors from stores .*\n.*the index is of"):
        one.with_neighbors(Index.build(same, retriever="hash"))


def test_what_is_passed_over_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By name, unless it is to be quiet; a name with brackets that is there is no pattern."""
    (tmp_path / "[a].txt").write_text("the text of one document")
    (tmp_path / "b.odt").write_text("x and y")
    for quiet in (False, True):
        corpus = Corpus.from_files(tmp_path / "*", tmp_path / "[a].txt", vocab_size=300, quiet=quiet)
        assert corpus.store.num_documents == 1
        error = capsys.readouterr().err
        assert (f"passed over: {tmp_path}/b.odt: of an unknown kind" in error) != quiet
        assert (f"passed over: {tmp_path}/[a].txt: the same file as" in error) != quiet
    assert Corpus.from_files(tmp_path, format="text", vocab_size=300, quiet=True).store.num_documents == 2
