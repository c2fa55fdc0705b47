"""The demo on text: too little of it, nothing to gain, and a small corpus all the way."""

import json
from pathlib import Path

import pytest
from helpers import write_corpus

from retro_engine import cli
from retro_engine.data.builtin import python_docs
from retro_engine.data.store import Store
from retro_engine.demo.text import Recipe, heldout_of
from retro_engine.model.flops import inference_flops
from retro_engine.model.weights import read_config
from retro_engine.progress import Reporter
from retro_engine.train.checkpoint import find_checkpoint

SMALL = [
    "model.hidden_size=48",
    "model.ffn_hidden_size=64",
    "model.num_attention_heads=2",
    "trainer.precision=32",
    "model.micro_batch_size=2",
]


def test_a_small_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(tmp_path / "c.jsonl", 40, words=120)
    out = tmp_path / "demo"
    assert cli.main(["demo", str(tmp_path / "c.jsonl"), "--out", str(out), "--steps", "4", *SMALL]) == 0
    said = capsys.readouterr().err
    assert said.index("copy ceiling:") < said.index("retro: 4 steps"), "the ceiling is printed before anyone trains"
    assert "a wider one, equal FLOPs of inference" in said
    assert "RETRO needs" in said
    figures = json.loads((out / "text.json").read_text())
    assert figures["ceiling"] > 0
    assert figures["steps"]["plain-flops"] > figures["steps"]["plain"] == figures["steps"]["retro"]
    assert set(figures["losses"]) == {"on", "off", "random", "plain", "plain-flops", "plain-wide"}
    assert len({losses["tokens"] for losses in figures["losses"].values()}) == 1, "all on the same tokens"
    assert sum(row["chunks"] for row in figures["by_overlap"]) > 0
    assert set(figures["ceiling_realized"]) == {"on", "off", "plain", "plain-flops", "plain-wide"}
    check_flops(out)
    assert cli.main(["demo", str(tmp_path / "c.jsonl"), "--out", str(out)]) == 2
    capsys.readouterr()
    compared = ["--share", "test", "--limit", "1", "--json", "--quiet", "--against", str(out / "plain")]
    assert cli.main(["eval", str(out / "retro"), *compared]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["gains"]) == {str(out / "plain")} <= set(result)
    assert result[str(out / "plain")]["tokens"] == result["on"]["tokens"]


def check_flops(out: Path) -> None:
    """The three rivals cost what their names say, counted over all held-out sequences."""
    store = Store(out / "store")
    heldout = heldout_of(store, Recipe(store=store.folder), Reporter("quiet"))
    batches = list(heldout.batches(8))
    tokens = sum(int((batch.document_ids >= 0).sum()) for batch in batches)
    read = sum(int(batch.lengths.sum()) for batch in batches if batch.lengths is not None)
    retro, wide, plain = (read_config(find_checkpoint(out / name)) for name in ("retro", "plain-wide", "plain"))
    assert wide.ffn_hidden_size > plain.ffn_hidden_size == retro.ffn_hidden_size
    flops = inference_flops(retro, tokens, read, kept=True)
    assert inference_flops(wide, tokens, 0, kept=False) == pytest.approx(flops, rel=0.01)


def test_what_would_make_the_comparison_false_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(tmp_path / "c.jsonl", 40)
    for setting in (
        "model.data.splits_string='98,2,0'",
        "trainer.max_steps=3",
        "model.retrieval=true",
        "exp_manager.exp_dir=x",
    ):
        assert cli.main(["demo", str(tmp_path / "c.jsonl"), "--out", str(tmp_path / "d"), setting]) == 2
        assert "is the demo's own" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


def test_held_out_copies_of_other_documents_are_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_corpus(tmp_path / "c.jsonl", 20, words=120)
    lines = source.read_text().splitlines(keepends=True)
    source.write_text("".join(lines + [line.replace('"id": "d', '"id": "copy') for line in lines[:12]]))
    assert cli.main(["demo", str(source), "--out", str(tmp_path / "d"), "--steps", "2", *SMALL]) == 0
    said = capsys.readouterr().err
    assert said.count("is also among the others: left out") >= 1
    figures = json.loads((tmp_path / "d" / "text.json").read_text())
    assert figures["losses"]["on"]["documents"] == round(0.15 * 32) - said.count("left out")


def test_nothing_to_gain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Documents that share no run of tokens: the ceiling says so, nothing is trained, exit 0."""
    rows = [json.dumps({"text": " ".join(chr(0x4E00 + 700 * d + i) for i in range(40))}) + "\n" for d in range(12)]
    (tmp_path / "c.jsonl").write_text("".join(rows))
    assert cli.main(["demo", str(tmp_path / "c.jsonl"), "--out", str(tmp_path / "demo")]) == 0
    said = capsys.readouterr().err
    assert "nothing to gain here" in said
    assert not (tmp_path / "demo" / "retro").exists()


def test_too_little_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(tmp_path / "c.jsonl", 3)
    assert cli.main(["demo", str(tmp_path / "c.jsonl"), "--out", str(tmp_path / "demo")]) == 2
    assert "has 3 documents" in capsys.readouterr().err
    assert cli.main(["demo", str(tmp_path / "no"), "--out", str(tmp_path / "demo")]) == 3


def test_the_installed_documentation() -> None:
    documents = list(python_docs())
    names = {document.id for document in documents}
    assert len(documents) > 200
    assert len(names) == len(documents)
    assert {"topic:with", "module:json", "module:collections"} <= names
    assert sum(len(document.text) for document in documents) > 1_000_000
