"""`retro eval`, as it is typed."""

import json
import re
from pathlib import Path

import pytest
from cli_helpers import TINY, run
from helpers import small_config

from retro_engine.data.store import Store
from retro_engine.model.flops import token_flops
from retro_engine.model.retro import RetroModel
from retro_engine.model.weights import read_config
from retro_engine.train.checkpoint import find_checkpoint, publish_model


def test_eval(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("eval", work / "run", "--json", "--quiet") == 0
    result = json.loads(capsys.readouterr().out)
    assert {"on", "off", "random"} <= set(result)
    saves = {mode: 1 - result["on"]["loss"] / result[mode]["loss"] for mode in ("off", "random")}
    assert {mode: gain["gain"] for mode, gain in result["saves"].items()} == pytest.approx(saves)
    assert run("eval", work / "run", "--limit", 1, "--modes", "on,off") == 0
    out = capsys.readouterr().out
    assert re.search(r"^on saves -?\d+\.\d% \[.*\] against off: share of the bits, \d+ documents, paired$", out, re.M)
    assert "few documents" in out
    assert run("eval", work / "run", "--neighbors", "river stone", "--modes", "off,given") == 0
    assert re.search(r"^given +\d\.\d+", capsys.readouterr().out, re.M)
    assert run("eval", work / "run", "--fail-if", "bpb_on>0.001", "--limit", 1) == 6
    assert "error: --fail-if bpb_on>0.001 is true" in capsys.readouterr().err
    assert run("eval", work / "run", "--fail-if", "bpb_on<0.001", "--limit", 1, "--share", "all") == 0
    assert run("eval", work / "run", "--limit", 1, "--against", work / "run") == 2
    assert "is a RETRO" in capsys.readouterr().err
    for wrong in (["--fail-if", "import os"], ["--modes", "onn"], ["--modes", "given"]):
        assert run("eval", work / "run", "--limit", 1, *wrong) == 2


def test_other_numbers_of_neighbors_than_in_training(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("eval", work / "run", "--limit", 1, "--modes", "on,off", "--json", "--quiet")
    bits = []
    for count in (1, 2, 4):
        assert run(*words, f"model.num_neighbors={count}") == 0
        found = json.loads(capsys.readouterr().out)
        bits.append((found["on"]["loss"], found["off"]["loss"]))
    assert len({on for on, _ in bits}) == 3 and len({off for _, off in bits}) == 1
    for wrong, said in ((99, "makes a wider table"), (0, "num_neighbors")):
        assert run(*words, f"model.num_neighbors={wrong}") in (2, 3)
        assert said in capsys.readouterr().err
    assert run("generate", work / "run", "The", "model.num_neighbors=1") == 2, "there it is --k"


def test_neighbors_found_more_often_than_every_chunk(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("eval", work / "run", "--limit", 1)
    assert run(*words, "--modes", "on,off", "--json", "--quiet") == 0
    every_chunk = json.loads(capsys.readouterr().out)
    assert run(*words, "--stride", 16, "--json", "--quiet") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["on"], found["off"]) == (every_chunk["on"], every_chunk["off"]) and "random" not in found
    for wrong, said in (
        (["--stride", 5], "does not divide"),
        (["--stride", 0], "does not divide"),
        (["--stride", 8, "--modes", "random"], "no mode random"),
        (["--stride", 8, "--leak-limit", 0.3], "--stride with --leak-limit"),
        (["--stride", 8, "--memory", "ngram"], "--stride with --memory"),
        (["--stride", 8, "--questions", "q.json"], "--stride with --questions"),
        (["--stride", 8, "--lm-eval", "piqa"], "--stride with --lm-eval"),
    ):
        assert run(*words, *wrong) == 2, wrong
        assert said in capsys.readouterr().err


def test_flops_against_a_plain_decoder(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(work / "store")
    plain = small_config(vocab_size=store.vocab_size, chunk_size=16, encoder_seq_length=64, retrieval=False)
    greedy = {"greedy": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    publish_model(tmp_path / "plain", RetroModel(plain), store.tokenizer, {"imported": "here"}, greedy)
    words = ("eval", work / "run", "--limit", 1, "--modes", "on", "--against", tmp_path / "plain")
    assert run(*words, "--json", "--quiet") == 0
    found = json.loads(capsys.readouterr().out)["flops"][str(tmp_path / "plain")]
    mine, theirs = token_flops(read_config(find_checkpoint(work / "run"))), token_flops(plain)
    assert found["inference"] == mine["inference"] / theirs["inference"] != 1
    assert found["training"] == mine["training"] / theirs["training"]
    assert ("kept" in found) == ("kept" in mine)
    assert run(*words) == 0
    assert f"FLOPs a token: training {found['training']:.2f} x, inference" in capsys.readouterr().out


@pytest.fixture(scope="module")
def short_plain(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain decoder that differs from the run of `work` in more than retrieval."""
    out, less = tmp_path_factory.mktemp("short") / "plain", ["model.retrieval=false", "trainer.max_steps=2"]
    more = [*less, "model.dec_num_layers=2", "model.optim.lr=2e-3", "seed=5"]
    assert run("train", "--preset", "tiny", "--out", out, f"model.data.store={work}/store", *TINY, *more) == 0
    return out


def test_what_differs_beside_retrieval_is_said(
    work: Path, short_plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("eval", work / "run", "--limit", 1, "--modes", "on", "--against")
    assert run(*words, f"short={short_plain}", "--json", "--quiet") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gains"].keys() == found["flops"].keys() == {"short"}
    differs = found["differs"]["short"]
    assert differs["steps"] == [4, 2] and "max_steps" not in differs
    assert differs["lr"] == [3e-3, 2e-3] and differs["layers"] == [4, 2] and differs["seed"] == [1234, 5]
    assert differs["tokens"][0] > differs["tokens"][1] > 0 and differs["parameters"][0] > differs["parameters"][1]
    assert differs.keys() == {"steps", "tokens", "lr", "layers", "seed", "parameters"}
    assert run(*words, short_plain) == 0
    assert re.search(r"differs: steps 4 / 2, tokens .*lr 0.003 / 0.002, .*layers 4 / 2", capsys.readouterr().out)
    for wrong in (["short=a", "--against", "short=b"], ["on=a"], ["=a"], ["a="]):
        assert run(*words, *wrong) == 2


def test_what_is_named_is_opened_before_anything_is_evaluated(
    work: Path, short_plain: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluated(*_: object, **__: object) -> None:
        raise AssertionError("evaluated")

    for name in ("perplexity.evaluate", "memories.score_tokens"):
        monkeypatch.setattr(f"retro_engine.evaluate.{name}", evaluated)
    for wrong, said in (
        (["--against", short_plain, short_plain.with_name("plan")], "plan is not a trained run"),
        (["--against", short_plain.with_name("plan"), "--memory", "knn"], "plan is not a trained run"),
        (["--words", work / "no.txt"], "no.txt does not exist"),
        (["--weights", "bf16,int3"], "int3"),
        (["--fail-if", "bpb_onn>1"], "cannot be read"),
    ):
        assert run("eval", work / "run", *wrong) in (2, 3)
        assert said in capsys.readouterr().err


def test_how_many_neighbors_the_leak_limit_drops(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("eval", work / "run", "--limit", 1, "--modes", "on,off,random", "--leak-limit", 0)
    assert run(*words, "--json", "--quiet") == 0
    leaks = json.loads(capsys.readouterr().out)["leaks"]
    assert 0 < leaks["dropped"] < leaks["neighbors"]
    assert run(*words) == 0
    assert f"dropped {leaks['dropped']:,} of {leaks['neighbors']:,} neighbors" in capsys.readouterr().out
