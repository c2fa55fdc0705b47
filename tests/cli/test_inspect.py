"""`retro inspect`, `config` and `doctor`."""

import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
from cli_helpers import run

from retro_engine.cli.doctor import EXTRAS


def test_inspect_config_and_doctor(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, kind in (
        (work / "store", "store"),
        (work / "store/neighbors/bm25", "neighbors"),
        (work / "store/index/bm25", "index"),
        (work / "run", "checkpoint"),
    ):
        assert run("inspect", path, "--verify") == 0
        assert f"kind: {kind}" in capsys.readouterr().out
    assert run("inspect", work / "store/neighbors/bm25", "--samples", 2) == 0
    assert "[d" in capsys.readouterr().out
    assert run("config", "keys", "model.optim") == 0
    assert "model.optim.lr (float, default 0.0006, rate): the highest learning rate" in capsys.readouterr().out
    assert run("config", "keys", "model.optim.lr", "--json") == 0
    assert json.loads(capsys.readouterr().out)["unit"] == "rate"
    assert run("config", "show", "--preset", "tiny") == 0
    (work / "a.yaml").write_text(capsys.readouterr().out)
    assert run("config", "show", "--preset", "tiny", "seed=5") == 0
    (work / "b.yaml").write_text(capsys.readouterr().out)
    assert run("config", "diff", work / "a.yaml", work / "b.yaml") == 0
    assert capsys.readouterr().out == "seed: 1234 -> 5\n"
    assert run("doctor") == 0
    out = capsys.readouterr().out
    assert "loader:" in out
    assert re.search(r"^  ray +neighbors and embeddings over many machines .* (yes|no: ray missing)$", out, re.M)
    assert run("embed", work / "store") == 0
    assert run("index", work / "store", "--retriever", "hash") == 0
    assert run("neighbors", work / "store", "--retriever", "hash", "--k", 2) == 0


def test_inspect_says_what_everything_is_and_whether_it_is_whole(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stores, tables, embeddings and indexes: what, from what, whole, of their store; and samples."""
    shutil.copytree(work / "store", tmp_path / "store")
    store = tmp_path / "store"
    assert run("build", store, "--retriever", "hybrid", "--embedder", "hash", "--k", 4, "--quiet") == 0
    capsys.readouterr()
    paths = ["neighbors/hybrid", "index/bm25", "index/hash", "embeddings/hash", ""]
    for name in paths:
        assert run("inspect", store / name, "--verify", "--samples", 2) == 0, name
        out = capsys.readouterr().out
        assert "verified: True" in out
        assert len(out.splitlines()) > 8
    assert run("inspect", store / "neighbors/hybrid") == 0
    out = capsys.readouterr().out
    assert "similarity: mean" in out
    assert "of the neighbors missing" in out
    assert run("inspect", store / "neighbors/hybrid", "--json") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    for name, victim in (("index/hash", "embeddings/hash/vectors-00000.npy"), ("index/bm25", "index/bm25/scores.npy")):
        raw = bytearray((store / victim).read_bytes())
        raw[-2] ^= 8
        (store / victim).unlink()
        (store / victim).write_bytes(raw)
        assert run("inspect", store / name, "--verify") == 3
        assert "is damaged" in capsys.readouterr().err
    assert run("build", store, "--retriever", "hybrid", "--embedder", "hash", "--name", "again") == 0
    said = capsys.readouterr().err
    assert said.count("is damaged: it is built again") == 2
    assert run("inspect", store / "index" / "hash", "--verify") == 0


def test_doctor_knows_every_extra_and_what_is_in_it() -> None:
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    declared = project["optional-dependencies"]
    names = {extra: {re.split(r"[\[<>=;]", line)[0] for line in lines} for extra, lines in declared.items()}
    names["ask"] |= names["documents"]
    names["replicas"] |= names["serve"]
    assert set(EXTRAS) == set(names)
    for extra, (_, packages) in EXTRAS.items():
        wanted = names[extra] - {"retro-engine"}
        assert set(packages.split()) <= wanted if extra == "dev" else set(packages.split()) == wanted, extra
