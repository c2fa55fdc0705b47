"""A reader's folder from a run: what is in it, that it computes what the run does, and what is refused."""

import json
from pathlib import Path

import gguf_helpers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from retro_engine import cli
from retro_engine.data.files import sha256_file
from retro_engine.errors import MissingInputError, UsageError
from retro_engine.generate.open_model import open_model
from retro_engine.readers.bases import base_path
from retro_engine.readers.make_reader import make_reader
from retro_engine.readers.reader import open_reader
from retro_engine.readers.reader_file import read_reader


def test_what_is_in_it(reader_folder: Path, base: Path) -> None:
    assert sorted(path.name for path in reader_folder.iterdir()) == ["README.md", "adapters.safetensors", "reader.json"]
    values = json.loads((reader_folder / "reader.json").read_text())
    assert values["version"] == 1
    assert values["name"] == "tiny-reads"
    assert values["base"] == {
        "name": "tiny", "file": "tiny.gguf", "sha256": sha256_file(base), "get": "from who made it",
    }  # fmt: skip
    assert values["reading"] == {"chunk_size": 16, "retrieved_length": 24, "num_neighbors": 3, "sink_id": 0}
    assert values["lora"]["rank"] == 2
    assert values["lora"]["targets"] == ["q", "k", "v", "out", "gate", "up", "down"]
    assert values["template"] == "question: {question}\nanswer:"
    assert values["absent"] == "not in the documents"
    assert values["adapters"] == sha256_file(reader_folder / "adapters.safetensors")
    assert {value.dtype for value in load_file(reader_folder / "adapters.safetensors").values()} == {torch.bfloat16}
    card = (reader_folder / "README.md").read_text()
    assert card.startswith("# tiny-reads\n")
    assert "3 steps" in card
    assert values["base"]["sha256"] in card


def test_it_computes_what_the_run_does(reader_run: Path, reader_folder: Path, base: Path) -> None:
    """But for the adapters' rounding to bf16."""
    reader = read_reader(reader_folder)
    ours = open_reader(reader, base_path(reader, base), "fp32")
    theirs = open_model(reader_run, device="cpu")
    assert ours.model.config.reads_prefix
    for name in ("chunk_size", "retrieved_length", "num_neighbors", "sink_id", "vocab_size"):
        assert getattr(ours.model.config, name) == getattr(theirs.model.config, name), name
    expected = theirs.model.state_dict()
    assert expected.keys() == ours.model.state_dict().keys()
    for name, value in ours.model.state_dict().items():
        assert torch.allclose(value, expected[name], atol=2e-3), name
    plain = open_model(reader_run.parent / "imported", device="cpu").model.state_dict()
    assert not torch.equal(plain["layers.0.ffn.up.weight"], ours.model.state_dict()["layers.0.ffn.up.weight"])
    assert ours.tokenizer.end_ids == theirs.tokenizer.end_ids


def test_the_command(reader_run: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "card.md").write_text("# Mine\n\nData: my own.\n")
    more = ["--name", "mine", "--absent", "unknown", "--card", str(tmp_path / "card.md"), "--max-new-tokens", "9"]
    more += ["--k", "2", "--chunk-size", "10"]
    command = ["export", str(reader_run), "--out", str(tmp_path / "out"), "--reader", str(base), *more]
    assert cli.main(command) == 0
    reader = read_reader(tmp_path / "out")
    assert (reader.name, reader.absent, reader.max_new_tokens) == ("mine", "unknown", 9)
    reading = reader.reading
    assert (reading.num_neighbors, reading.chunk_size, reading.retrieved_length) == (2, 10, 20)
    assert (tmp_path / "out" / "README.md").read_text().startswith("# Mine\n\nData: my own.\n\n## How it was made")
    assert cli.main(command) == 2, "the folder is there"
    assert cli.main(["export", str(reader_run), "--out", str(tmp_path / "x"), "--name", "mine"]) == 2
    assert "--name cannot be used" in capsys.readouterr().err
    assert cli.main([*command[:3], str(tmp_path / "y"), "--reader", str(base), "--card", str(tmp_path / "gone")]) == 3


def test_what_holds_no_reader(reader_run: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="holds no reader"):
        make_reader(reader_run.parent / "imported", tmp_path / "x", base)
    with pytest.raises(UsageError, match="no {question}"):
        make_reader(reader_run, tmp_path / "x", base, template="answer:")
    with pytest.raises(UsageError, match="{text} once"):
        make_reader(reader_run, tmp_path / "x", base, passage="title")
    with pytest.raises(UsageError, match=r"reader.json.name is 'a/b'"):
        make_reader(reader_run, tmp_path / "x", base, name="a/b")
    with pytest.raises(UsageError, match="max_new_tokens"):
        make_reader(reader_run, tmp_path / "x", base, max_new_tokens=0)
    with pytest.raises(MissingInputError, match="does not exist"):
        make_reader(reader_run, tmp_path / "x", tmp_path / "gone.gguf")
    with pytest.raises(UsageError, match="there is no base smolm2") as caught:
        make_reader(reader_run, tmp_path / "x", "smolm2")
    assert "did you mean smollm2?" in str(caught.value)
    monkeypatch.setenv("RETRO_HOME", str(tmp_path / "home"))
    with pytest.raises(MissingInputError, match="retro fetch smollm2"):
        make_reader(reader_run, tmp_path / "x", "smollm2")
    odd = {"token_embd.weight": np.ones((261, gguf_helpers.WIDTH), np.float32)}
    other = gguf_helpers.write(tmp_path / "other.gguf", blocks="Q8_0", tensors=odd)
    with pytest.raises(UsageError, match="is not what the run learned beside"):
        make_reader(reader_run, tmp_path / "x", other)
    assert not (tmp_path / "x").exists()
