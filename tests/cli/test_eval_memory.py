"""`retro memory` and `retro eval --memory`, as they are typed."""

import json
from pathlib import Path

import pytest
from cli_helpers import run
from helpers import small_config, write_corpus

from retro_engine.data.store import Store
from retro_engine.model.retro import RetroModel
from retro_engine.train.checkpoint import publish_model


@pytest.fixture(scope="module")
def memory(work: Path) -> Path:
    assert run("memory", "ngram", work / "store", "--quiet") == 0
    return work / "store" / "memory" / "ngram"


def test_eval_beside_a_memory(work: Path, memory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "weights.json"
    words = ("eval", work / "run", "--modes", "on,off", "--memory", "ngram")
    assert run(*words, "--json", "--quiet", "--memory-out", weights) == 0
    out = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"on", "on_ngram", "off", "off_ngram", "ngram"} <= set(out)
    assert out["memory"]["left_out"] == out["on"]["documents"]
    assert out["memory"]["bytes_per_token"] < 8 and out["gains"]["on"]["gain"] > 0
    assert json.loads(weights.read_text())["memory"] == out["memory"]["fingerprint"]
    said = ("generate", work / "run", "The river", "--no-retrieval", "--max-new-tokens", 8)
    texts = []
    for more in ([], ["--memory", "ngram", "--memory-weights", weights]):
        assert run(*said, *more) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] != texts[1]
    assert run(*words, "--memory-weights", "0.5", "--limit", 2, "--fail-if", "bpb_on_ngram<0.001") == 0
    out, said = capsys.readouterr()
    assert "on_ngram saves" in out and "bytes each; weights given" in out
    assert "documents of the memory are held out" in said


def test_what_cannot_be_is_refused(
    work: Path, memory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("eval", work / "run", "--modes", "on", "--limit", 1)
    for wrong, code, said in (
        (["--memory", "ngram", "--memory-weights", "1.5"], 2, "from 0 to 1"),
        (["--memory-weights", "0.5"], 2, "--memory-weights is of a memory"),
        (["--memory", "ngram", "--in-prompt"], 2, "--memory with --in-prompt"),
        (["--memory", tmp_path], 3, "is not a ngram"),
        (["--memory", "ngram", "--share", "train"], 3, "nothing but documents that are held out"),
    ):
        assert run(*words, *wrong) == code, wrong
        assert said in capsys.readouterr().err
    for wrong, told in ((["--memory", "ngram"], "has no weights"), (["--memory-weights", "0.1"], "is of a memory")):
        assert run("generate", work / "run", "The river", "--no-retrieval", *wrong) == 2
        assert told in capsys.readouterr().err


def test_an_imported_decoder_beside_the_memory_of_another_store(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, greedy = Store(work / "store"), {"greedy": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    plain = small_config(vocab_size=store.vocab_size, chunk_size=16, encoder_seq_length=64, retrieval=False)
    publish_model(tmp_path / "plain", RetroModel(plain), store.tokenizer, {"imported": "here"}, greedy)
    write_corpus(tmp_path / "more.jsonl", 12, seed=1)
    for name, tokenizer in (("more", ["--tokenizer", work / "store"]), ("other", ["--vocab-size", 290])):
        assert run("prepare", tmp_path / "more.jsonl", "--out", tmp_path / name, "--chunk-size", 16, *tokenizer) == 0
        assert run("memory", "ngram", tmp_path / name) == 0
    words = ("eval", tmp_path / "plain", f"model.data.store={store.folder}", "--share", "all", "--limit", 2)
    capsys.readouterr()
    assert run(*words, "--memory", tmp_path / "more" / "memory" / "ngram", "--json", "--quiet") == 0
    out = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert out["memory"]["left_out"] == 0 and out["off_ngram"]["bits_per_byte"] < out["off"]["bits_per_byte"]
    assert run(*words, "--memory", tmp_path / "other" / "memory" / "ngram") == 3
    assert "has tokenizer" in capsys.readouterr().err
    assert run(*words, "--memory", "knn") == 3
    assert "retro memory knn makes one" in capsys.readouterr().err


def test_a_memory_of_states(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("memory", "knn", work / "run", "--limit", 3, "--out", tmp_path / "knn", "--quiet") == 0
    words = ("eval", work / "run", "--modes", "on,off", "--memory", tmp_path / "knn")
    capsys.readouterr()
    assert run(*words, "--json", "--quiet") == 0
    out = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"on", "on_knn", "off", "off_knn", "knn"} <= set(out)
    assert out["on_knn"]["bits_per_byte"] < out["on"]["bits_per_byte"]
    assert run(*words, "--memory-weights", "0.5") == 2
    assert run("generate", work / "run", "The", "--no-retrieval", *words[-2:], "--memory-weights", "0.5") == 2
    assert "cannot be read while decoding" in capsys.readouterr().err
    assert run("inspect", tmp_path / "knn", "--verify") == 0
