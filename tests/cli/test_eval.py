"""`retro eval`, as it is typed."""

import json
import re
from pathlib import Path

import pytest
from cli_helpers import run
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
