"""`retro import` and `export` from the command line, and what imported models can do."""

import json
from pathlib import Path

import pytest
import torch
from cli_helpers import TINY

from retro_engine import cli
from retro_engine.data.store import Store
from retro_engine.interop.imports import Imported, write_checkpoint
from retro_engine.model.retro import RetroModel


def test_import_and_export(small_store: Store, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=small_store.vocab_size, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "hf")
    capsys.readouterr()
    out = ["--out", str(tmp_path / "ours"), "--json"]
    assert cli.main(["import", str(tmp_path / "hf"), *out]) == 3, "it has no tokenizer"
    assert "tokenizer.json" in capsys.readouterr().err
    tokenizer = ["--tokenizer", str(small_store.folder)]
    assert cli.main(["import", str(tmp_path / "hf"), *out, *tokenizer]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == 2
    assert cli.main(["import", str(tmp_path / "hf"), *out, *tokenizer]) == 2, "the folder is there"
    for metadata, content in (("gone.json", None), ("bad.json", "{"), ("list.json", "[]")):
        if content is not None:
            (tmp_path / metadata).write_text(content)
        command = ["import", str(tmp_path / "hf"), "--out", str(tmp_path / "y"), "--metadata", str(tmp_path / metadata)]
        assert cli.main(command) == 3
    assert cli.main(["inspect", str(tmp_path / "ours"), "--verify"]) == 0
    assert cli.main(["generate", str(tmp_path / "ours"), "river", "inference.tokens_to_generate=3"]) == 0
    for path in (work / "run", tmp_path / "ours"):
        assert cli.main(["export", str(path), "--out", str(tmp_path / f"out-{path.name}")]) == 0
        assert (tmp_path / f"out-{path.name}" / "model.safetensors").is_file()
    assert cli.main(["export", str(work / "run"), "--out", str(tmp_path / "out-ours")]) == 2


def test_an_imported_model_cannot_be_resumed(small_store: Store, work: Path, tmp_path: Path) -> None:
    from retro_engine.model.weights import read_config
    from retro_engine.train.checkpoint import find_checkpoint

    model = RetroModel(read_config(find_checkpoint(work / "run")))
    write_checkpoint(Imported(model, small_store.tokenizer, "hf"), tmp_path / "x", "x")
    store = f"model.data.store='{small_store.folder}'"
    command = ["train", "--preset", "tiny", "--out", str(tmp_path / "run"), store, "model.data.neighbors=bm25", *TINY]
    assert cli.main([*command, "--resume", str(tmp_path / "x")]) == 2


def test_training_from_an_imported_decoder(
    small_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from retro_engine.config import ModelConfig

    sizes = {
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 2,
        "dec_num_layers": 7,
        "retrieval": False,
    }
    model = RetroModel(ModelConfig(vocab_size=small_store.vocab_size, **sizes))
    write_checkpoint(Imported(model, small_store.tokenizer, "hf"), tmp_path / "gpt", "x")
    more = ["model.chunk_size=16", "model.encoder_seq_length=64", "model.data.neighbors=bm25", "trainer.max_steps=2"]
    more += [f"model.data.store='{small_store.folder}'", "model.enc_num_layers=1", "model.enc_cross_attention=[0]"]
    command = ["train", "--init-from", str(tmp_path / "gpt"), "--freeze-decoder", "--out", str(tmp_path / "run"), *more]
    capsys.readouterr()
    assert cli.main([*command, "--dry-run"]) == 0
    assert "0.1" in capsys.readouterr().out
    assert cli.main([*command, "--quiet", "trainer.precision=32"]) == 0
    assert cli.main(["eval", str(tmp_path / "run"), "--limit", "1", "--in-prompt", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"on", "off", "random", "prompt"} <= set(found)
    assert found["prompt"]["tokens"] == found["off"]["tokens"]
    alone = [f"model.data.store='{small_store.folder}'", "model.chunk_size=16", "model.encoder_seq_length=64"]
    assert cli.main(["eval", str(tmp_path / "gpt"), *alone, "--limit", "1", "--json"]) == 0
    original = json.loads(capsys.readouterr().out.splitlines()[-1])["off"]
    assert original["tokens"] == found["off"]["tokens"]
    assert original["loss"] == pytest.approx(found["off"]["loss"], rel=1e-6), "the frozen decoder is the original"
    assert cli.main(["eval", str(tmp_path / "gpt")]) == 2, "no store"
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "gpt").rename(tmp_path / "x" / "y" / "gpt")  # beside a config.yaml that is not its own
    (tmp_path / "x" / "config.yaml").write_text("model: {hidden_size: 48}")
    assert cli.main(["eval", str(tmp_path / "x" / "y" / "gpt"), *alone, "--limit", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["off"] == original
    (tmp_path / "x" / "y" / "gpt").rename(tmp_path / "gpt")
    (tmp_path / "run" / "config.yaml").rename(tmp_path / "kept.yaml")
    assert cli.main(["eval", str(tmp_path / "run"), *alone]) == 3, "a run without its settings"
    row = {"question": "Where?", "answer": "river", "neighbors": ["A river."]}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row) + "\n")
    asked = [
        "eval",
        str(tmp_path / "run"),
        "--questions",
        str(tmp_path / "questions.jsonl"),
        "--modes",
        "gold",
        "--json",
    ]
    assert cli.main(asked) == 3, "nor a store"
    assert cli.main([*asked, "--stores", str(small_store.folder)]) == 0
    (tmp_path / "kept.yaml").rename(tmp_path / "run" / "config.yaml")
    half = ["--limit", "1", "--in-prompt", "--dtype", "bf16", "--json"]
    assert cli.main(["eval", str(tmp_path / "run"), *half]) == 0
    rounded = json.loads(capsys.readouterr().out.splitlines()[-1])
    for mode in ("on", "off", "random", "prompt"):
        assert rounded[mode]["loss"] != found[mode]["loss"]
        assert rounded[mode]["loss"] == pytest.approx(found[mode]["loss"], rel=0.01)
    (tmp_path / "words").write_text("one two three\n")
    assert (
        cli.main(["eval", str(tmp_path / "run"), "--words", str(tmp_path / "words"), "--modes", "off", "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["off"]["words"] == 4
    assert cli.main(["eval", str(tmp_path / "run"), "--words", str(tmp_path / "words"), "--limit", "1"]) == 2
    assert cli.main(["eval", str(tmp_path / "gpt"), "--questions", str(tmp_path / "words")]) == 2, "no store"
    assert cli.main(["train", "--freeze-decoder", "--out", str(tmp_path / "no"), *more]) == 2
    assert cli.main([*command[:2], str(tmp_path / "gone"), *command[3:]]) == 3
