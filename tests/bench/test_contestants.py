"""The contestants of the model benches: what they compute, what they measure, and who is left out."""

from pathlib import Path

import pytest
import torch
from forks import FORKS
from helpers import write_corpus

from retro_engine.bench import checkout, contestants, crowded, decode, model, pipeline, profile, results
from retro_engine.bench.__main__ import main
from retro_engine.bench.contestants import RECOMPUTED, SHAPES, Inputs, Shape
from retro_engine.bench.frame import Options

TINY = Shape(layers=6, width=32, heads=2, vocab=64, length=128, batch=1)


@pytest.mark.parametrize("name", ["ours", "ours, full", RECOMPUTED, "gpt2"])
def test_steps_learn_and_decoding_runs(name: str) -> None:
    if reason := contestants.missing(name):
        pytest.skip(reason)
    module, step, decode = contestants.build(name, TINY)
    inputs = Inputs.draw(TINY)
    first = step(inputs)
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
    for _ in range(4):
        last = step(inputs)
    assert last < first
    with torch.inference_mode():
        decode(inputs.tokens[:, :64], inputs.neighbors, 65)


def test_sizes_are_what_they_say() -> None:
    for size, shape in SHAPES.items():
        from retro_engine.model.retro import RetroModel

        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in RetroModel(shape.config()).parameters())
        assert count / 1e6 == pytest.approx(float(size.removesuffix("M")), rel=0.15), size


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured in a process of its own begins with torch imported."""
    monkeypatch.setattr(contestants.multiprocessing, "get_context", lambda kind: FORKS)


@pytest.mark.usefixtures("forks")
def test_peers_that_are_absent_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkout.load("peers"), "FOLDER", tmp_path)
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    measured = model.run(Options(sizes=["tiny"], implementations=["ours", "megatron-core"]), rounds=1)
    rows = measured.rows
    assert [row.implementation for row in rows] == ["ours"]
    assert rows[0].median_s > 0 and (rows[0].peak_mib or 0) > 0
    assert "megatron-core is left out" in capsys.readouterr().out
    assert {target.value for target in measured.targets} == {None}, "without a rival there is nothing to say"


def test_rivals_do_not_ship(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkout, "IS_HERE", False)
    assert "take a checkout" in contestants.missing("megatron-core")
    assert not contestants.missing("ours")
    assert checkout.benches() == []


def test_too_little_memory_is_said_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(contestants, "free_memory", lambda: 9 * 2**30)
    monkeypatch.setattr(contestants, "Contestant", None)
    command = ["model", "--sizes", "120M", "--out", str(tmp_path), "--implementations", "ours", "ours, full"]
    assert main(command) == 5
    assert "2 implementations do not fit into memory" in capsys.readouterr().err
    contestants.check_memory(["ours"], SHAPES["120M"])


@pytest.mark.usefixtures("forks")
def test_decode_takes_less_than_recomputing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setattr(decode, "PEOPLE", 100)
    monkeypatch.setattr(crowded, "run", lambda *_: ([], []))
    rows = decode.run(Options(sizes=["tiny"], implementations=["ours"]), (2,)).rows
    assert [row.case for row in rows][1:] == ["decode tiny, batch 2"]
    assert rows[0].case.startswith("retrieval, ") and rows[0].median_s > 0
    assert rows[1].gb_s is not None and rows[1].gb_s > 0
    assert "tokens/s" in results.table(rows)


@pytest.mark.long
def test_every_stage_of_the_pipeline_has_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "ROUNDS", 1)
    measured = pipeline.run(Options(text=str(write_corpus(tmp_path / "corpus.jsonl", 30))))
    cases = [row.case for row in measured.rows if row.implementation == "ours" and row.ratios]
    assert cases[:5] == [
        "text to tokens and chunks",
        "chunks to a BM25 index",
        "chunks to BM25 neighbors",
        "vectors to neighbors, Flat, at once",
        "vectors to neighbors, Flat, one by one",
    ]
    assert [target.row.partition(":")[0] for target in measured.targets] == cases


def test_profiles_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    assert not profile.run(Options(sizes=["tiny"], out=tmp_path)).rows
    folder = tmp_path / "profiles"
    names = {path.name for path in folder.iterdir()}
    assert {"step-tiny-fp32.txt", "decode-tiny-fp32.txt", "decode-tiny-int8.txt"} <= names
    step, decoding = ((folder / f"{name}-tiny-fp32.txt").read_text() for name in ("step", "decode"))
    assert step.startswith("device ")
    assert "aten::mm" in step or "onednn_product" in step
    assert "retro_kernels._cpu" in decoding
