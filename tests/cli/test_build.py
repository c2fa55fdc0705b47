"""`retro index`, `embed`, `neighbors`, `build`: flags that cannot be used; `encode`, and what reads it."""

import json
import shutil
from pathlib import Path

import pytest
from cli_helpers import run
from helpers import small_config

from retro_engine.data.store import Store
from retro_engine.model.retro import RetroModel
from retro_engine.train.checkpoint import publish_model


def test_flags_of_building_that_cannot_be_used(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {
        ("--executor", "processes!"): 2,
        ("--workers", "0"): 2,
        ("--retriever", "bm52"): 2,
        ("--retriever", "hash", "--faiss", "IVF!"): 2,
        ("--retriever", "hybrid", "--embedder", "hash", "--fusion", "-1", "1"): 2,
        ("--source-weights", "0"): 2,
        ("--near-duplicates", "1.5"): 2,
        ("--least-shared", "1"): 2,
        ("--k", "0"): 2,
        ("--k", "-3"): 2,
        ("--retriever", "hash", "--stop-words", "none"): 2,
        ("--stop-words", "englisch"): 2,
    }
    for number, (flags, code) in enumerate(wrong.items()):
        assert run("neighbors", work / "store", "--name", f"no{number}", *flags) == code, flags
        assert capsys.readouterr().err.startswith("error: "), flags
    assert run("embed", work / "store", "--retriever", "bm25") == 2
    assert run("neighbors", work / "store", "--name", "wide", "--k", "2000", "--quiet") == 0


def test_what_is_encoded_is_read_by_itself(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(work / "store")
    model = RetroModel(small_config(vocab_size=store.vocab_size, chunk_size=16, enc_cross_attention=[]))
    greedy = {"greedy": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    publish_model(tmp_path / "run", model, store.tokenizer, {"imported": "here"}, greedy)
    assert run("encode", tmp_path / "run", store.folder, "--json", "--quiet") == 0
    made = json.loads(capsys.readouterr().out)
    assert Path(made["folder"]).parent == store.folder / "encodings"
    assert 0 < made["neighbors"] <= store.num_rows and made["bytes"] == made["tokens"] * 2 * 2 * 2 * 24
    assert run("inspect", made["folder"], "--verify") == 0
    assert "kind: encodings" in capsys.readouterr().out
    shutil.copytree(made["folder"], tmp_path / "apart")
    words = ("generate", tmp_path / "run", "river stone amber", "--stores", store.folder, "--max-new-tokens", 4)
    assert run(*words) == 0
    assert f"encoded neighbors are read from {made['folder']}" in capsys.readouterr().err
    shutil.rmtree(made["folder"])
    assert run(*words) == 0
    assert "encoded neighbors" not in capsys.readouterr().err
    assert run(*words, "--encodings", tmp_path / "apart") == 0
    assert f"encoded neighbors are read from {tmp_path / 'apart'}" in capsys.readouterr().err
    assert run(*words, "--encodings", tmp_path / "nowhere") == 3
    given = ("--encodings", tmp_path / "apart")
    assert run("eval", tmp_path / "run", *given, "--questions", tmp_path / "q.json") == 2
    data = (f"model.data.store='{store.folder}'", "model.data.neighbors=bm25", "model.encoder_seq_length=64")
    assert run("eval", tmp_path / "run", *given, *data) == 2
    assert "a whole pass encodes what an encoder reads itself" in capsys.readouterr().err


def test_a_plain_decoder_reads_and_is_evaluated_with_what_was_encoded(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(work / "store")
    plain = {"vocab_size": store.vocab_size, "chunk_size": 16, "encoder_seq_length": 64, "retrieval": False}
    greedy = {"greedy": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    publish_model(tmp_path / "run", RetroModel(small_config(**plain)), store.tokenizer, {"imported": "here"}, greedy)
    assert run("encode", tmp_path / "run", store.folder, "--reading", "none") == 2
    assert "--reading prefix" in capsys.readouterr().err
    assert run("encode", tmp_path / "run", store.folder, "--out", tmp_path / "made", "model.num_neighbors=1") == 0
    words = ("generate", tmp_path / "run", "river stone amber", "--stores", store.folder, "--max-new-tokens", 4)
    capsys.readouterr()
    assert run(*words, "--encodings", tmp_path / "made", "model.num_neighbors=3") == 0, "however many are read"
    assert run(*words, "--encodings", tmp_path / "made", "model.retrieved_length=8") == 3
    assert "has encodings of r 32" in capsys.readouterr().err
    data = [f"model.data.store='{store.folder}'", "model.data.neighbors=bm25", "model.data.splits_string='60,20,20'"]
    ask = ["eval", tmp_path / "run", "--reading", "prefix", "--modes", "on,random", "--json", "--quiet", *data]
    assert run(*ask) == 0
    exact = json.loads(capsys.readouterr().out)
    with monkeypatch.context() as patch:
        patch.setattr(RetroModel, "run_alone", None)  # whatever is encoded is in the file
        assert run(*ask, "--encodings", tmp_path / "made") == 0
    found = json.loads(capsys.readouterr().out)
    for mode in ("on", "random"):
        one, other = exact[mode]["bits_per_byte"], found[mode]["bits_per_byte"]
        assert one != other, "keys and values are rounded to bfloat16"
        assert abs(one - other) < 1e-3 * one
