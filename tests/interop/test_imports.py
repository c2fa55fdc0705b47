"""`import_model` and the checkpoint it publishes: generation from it, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from helpers import small_config
from interop_helpers import chat_folder
from tokenizer_helpers import CHATML, chatml

from retro_engine.api import Retro
from retro_engine.data.store import Store
from retro_engine.errors import MissingInputError, StoreError, UsageError
from retro_engine.interop.exports import export_model
from retro_engine.interop.imports import Imported, find_format, import_model, write_checkpoint
from retro_engine.model.retro import RetroModel
from retro_engine.train import checkpoint


@pytest.fixture(scope="module")
def folder(small_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a small Llama with the store's tokenizer."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, eos_token_id=5
    )
    folder = tmp_path_factory.mktemp("hf")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(small_store.tokenizer.json)
    return folder


def test_an_imported_checkpoint_is_one_of_ours(folder: Path, tmp_path: Path) -> None:
    imported = import_model(folder)
    ends = [imported.tokenizer.backend.id_to_token(i) for i in (5, 0)]
    assert imported.notes == [f"a text ends at {ends[0]} or {ends[1]}; there is no chat template"]
    write_checkpoint(imported, tmp_path / "out", folder)
    retro = Retro.from_pretrained(tmp_path / "out")
    assert len(retro.generate("river", max_new_tokens=4).tokens) <= 4
    assert checkpoint.read_trainer(tmp_path / "out")["imported"] == "hf"
    for name, value in imported.model.state_dict().items():
        assert torch.equal(retro.model.state_dict()[name], value), name
    assert import_model(folder, dtype=torch.bfloat16).model.embedding.weight.dtype == torch.bfloat16


def test_nothing_is_overwritten_and_damage_is_seen(folder: Path, tmp_path: Path) -> None:
    imported = import_model(folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UsageError, match="is there already"):
        write_checkpoint(imported, tmp_path / "full", folder)
    write_checkpoint(imported, tmp_path / "out", folder)
    path = tmp_path / "out" / "model.safetensors"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(StoreError):
        Retro.from_pretrained(tmp_path / "out")


def test_a_tokenizer_that_does_not_fit(folder: Path, small_store: Store, tmp_path: Path) -> None:
    from retro_engine.data.tokenizer import Tokenizer

    big = Tokenizer.train([" ".join(f"word{i}" for i in range(500))], 400)
    (tmp_path / "tokenizer.json").write_text(big.json)
    with pytest.raises(StoreError, match=r"entries\n.*embedding has 320 rows"):
        import_model(folder, tokenizer=tmp_path / "tokenizer.json")


def test_formats(folder: Path, tmp_path: Path) -> None:
    assert find_format(folder) == "hf"
    assert find_format(folder, "mcore") == "mcore"
    with pytest.raises(UsageError, match="--format gguff is not known\n.*did you mean gguf"):
        find_format(folder, "gguff")
    with pytest.raises(MissingInputError, match="does not exist"):
        find_format(tmp_path / "gone")


def test_an_imported_model_has_no_optimizer(small_store: Store, tmp_path: Path) -> None:
    model = RetroModel(small_config(vocab_size=small_store.vocab_size))
    write_checkpoint(Imported(model, small_store.tokenizer, "hf"), tmp_path / "out", "x")
    checkpoint.verify(tmp_path / "out")


def test_a_chat_model_stays_one(tmp_path: Path) -> None:
    """Template, names and all end tokens: imported, exported, and imported again."""
    source = chat_folder(tmp_path / "hf")
    write_checkpoint(import_model(source), tmp_path / "ours", source)
    checkpoint.verify(tmp_path / "ours")
    retro = Retro.from_pretrained(tmp_path / "ours")
    files = retro.tokenizer.chat_files
    assert retro.tokenizer.end_ids == [2, 3, 0]
    assert (files.templates, files.tokens) == ({"default": CHATML, "rag": "x"}, {"eos_token": "<|im_end|>"})
    theirs = json.loads((export_model(tmp_path / "ours", tmp_path / "out") / "config.json").read_text())
    assert theirs["eos_token_id"] == [2, 3, 0]
    again = import_model(tmp_path / "out").tokenizer
    assert again.end_ids == [2, 3, 0]
    assert again.chat_files.templates == files.templates


def test_another_tokenizer_leaves_the_models_template(tmp_path: Path) -> None:
    source = chat_folder(tmp_path / "hf")
    (tmp_path / "plain.json").write_text(chatml().json)
    found = import_model(source, tokenizer=tmp_path / "plain.json").tokenizer
    assert found.end_ids == [2, 3, 0]
    assert found.chat_files.templates["default"] == CHATML


def test_advice_where_there_is_no_tokenizer(tmp_path: Path) -> None:
    source = chat_folder(tmp_path / "hf")
    (source / "tokenizer.json").unlink()
    with pytest.raises(MissingInputError, match=r"has no tokenizer that is read\n.*merges.txt\n.*--tokenizer PATH"):
        import_model(source)
    (source / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(StoreError, match=r"tokenizer.model is SentencePiece's file.*\n.*\n.*save_pretrained"):
        import_model(source)
    with pytest.raises(UsageError, match=r"--tokenizer auto cannot be used\n.*trained with.*\n.*--tokenizer PATH"):
        import_model(source, tokenizer="auto")
    with pytest.raises(MissingInputError, match="--tokenizer .*gone does not exist"):
        import_model(source, tokenizer=tmp_path / "gone")


def test_what_was_exported_is_imported_again(small_store: Store, tmp_path: Path) -> None:
    """A RETRO too, with its encoder; the config of an export is checked as any other."""
    torch.manual_seed(0)
    model = RetroModel(small_config(vocab_size=small_store.vocab_size))
    write_checkpoint(Imported(model, small_store.tokenizer, "hf"), tmp_path / "ours", "x")
    folder = export_model(tmp_path / "ours", tmp_path / "theirs")
    again = import_model(folder)
    for name, value in model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    assert again.model.config == model.config
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").chmod(0o644)
    for change, message in (({"hidden_size": "32"}, "hidden_size=32"), ({"chunk_size": -1}, "chunk_size=-1"), ({"x": 1}, "unknown fields: x")):  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config | {"retro": config["retro"] | change}))
        with pytest.raises(StoreError, match=message):
            import_model(folder)
    (folder / "config.json").write_text(json.dumps(config | {"retro": None}))
    with pytest.raises(StoreError, match="has no architecture"):
        import_model(folder)
