"""Opening a reader: its base is found and compared, its adapters have to fit, its types generate."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import gguf_helpers
import pytest
import torch
from safetensors.torch import load_file, save_file

from retro_engine.data.files import sha256_file
from retro_engine.errors import MissingExtraError, MissingInputError, RetroError, StoreError, UsageError
from retro_engine.generate.generator import Generator
from retro_engine.readers.bases import base_path
from retro_engine.readers.reader import open_reader
from retro_engine.readers.reader_file import read_reader, with_settings


def test_where_the_base_lies(reader_folder: Path, base: Path, tmp_path: Path) -> None:
    reader = read_reader(reader_folder)
    with pytest.raises(MissingInputError, match="the base of the reader tiny-reads is not here"):
        base_path(reader)
    beside = shutil.copytree(reader_folder, tmp_path / "beside")
    shutil.copy(base, beside / "tiny.gguf")
    assert base_path(read_reader(beside)) == beside / "tiny.gguf"
    assert base_path(reader, base) == base


def test_another_base_is_refused(reader_folder: Path, tmp_path: Path) -> None:
    other = gguf_helpers.write(tmp_path / "tiny.gguf", blocks="Q4_0")
    with pytest.raises(StoreError, match="is not the base of the reader") as caught:
        base_path(read_reader(reader_folder), other)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert sha256_file(other)[:16] in lines[1]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", None])
def test_types(reader_folder: Path, base: Path, dtype: str | None) -> None:
    opened = open_reader(read_reader(reader_folder), base, dtype)
    out = Generator(opened.model, opened.tokenizer).generate("question: x", 5, neighbors=["The river.", "A stone."])
    assert len(out.tokens) <= 5
    assert len(out.neighbors) == 2
    assert not any(parameter.requires_grad for parameter in opened.model.parameters())


def test_what_the_first_opening_makes_is_mapped_by_later_ones(
    reader_folder: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETRO_HOME", str(tmp_path / "home"))
    reader, said = read_reader(reader_folder), list[str]()
    first = open_reader(reader, base, "bf16", said.append)
    (kept,) = (tmp_path / "home" / "opened" / reader.name).glob("bf16-*")
    base.with_suffix(".tmp").write_bytes(b"")  # another file: it is not read
    later = open_reader(reader, base.with_suffix(".tmp"), "bf16", said.append)
    assert first.model.state_dict().keys() == later.model.state_dict().keys()
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, later.model.state_dict()[name]), name
    assert first.tokenizer.fingerprint == later.tokenizer.fingerprint
    assert first.tokenizer.end_ids == later.tokenizer.end_ids
    assert first.folder == later.folder == reader_folder
    for dtype in ("fp32", "int8"):  # of one file
        open_reader(reader, base, dtype, said.append)
    assert len(list(kept.parent.iterdir())) == 2 + 1  # and the lock
    assert said == []
    weights = kept / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.unlink()
    weights.write_bytes(raw)
    again = open_reader(reader, base, "bf16", said.append)
    assert torch.equal(again.model.embedding.weight, first.model.embedding.weight)
    assert len(said) == 1 and said[0].endswith("it is made again")
    open_reader(replace(reader, adapters="0" * 64), base, "bf16", said.append)  # the same reader, trained again
    assert not kept.exists()
    assert len(said) == 1


def test_a_reader_that_cannot_be_kept_is_opened_all_the_same(
    reader_folder: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").write_text("a file where the folder would be")
    monkeypatch.setenv("RETRO_HOME", str(tmp_path / "home"))
    said = list[str]()
    assert open_reader(read_reader(reader_folder), base, "fp32", said.append).model.config.reads_prefix
    assert len(said) == 1 and said[0].startswith("the opened reader cannot be kept")


def test_what_is_refused(reader_folder: Path, base: Path, tmp_path: Path) -> None:
    reader = read_reader(reader_folder)
    with pytest.raises(UsageError, match="dtype='fp8' does not exist"):
        open_reader(reader, base, "fp8")
    own = load_file(reader_folder / "adapters.safetensors")
    name = "layers.0.ffn.up.adapter"
    cases = {
        "no such layer": own | {"layers.9.ffn.up.adapter.a": own[f"{name}.a"].clone()},
        "one of two": {key: value for key, value in own.items() if key != f"{name}.b"},
        "another rank": own | {f"{name}.a": torch.zeros(3, 32)},
        "another width": own | {f"{name}.a": torch.zeros(2, 31)},
    }
    for case, adapters in cases.items():
        folder = tmp_path / case
        shutil.copytree(reader_folder, folder)
        (folder / "adapters.safetensors").unlink()
        save_file(adapters, folder / "adapters.safetensors")
        values = json.loads((folder / "reader.json").read_text())
        values["adapters"] = sha256_file(folder / "adapters.safetensors")
        (folder / "reader.json").unlink()
        (folder / "reader.json").write_text(json.dumps(values))
        with pytest.raises(RetroError, match="do(es)? not fit"):
            open_reader(read_reader(folder), base)


def test_a_missing_extra_is_named(
    reader_folder: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETRO_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"retro-engine\[ask\]"):
        open_reader(read_reader(reader_folder), base)


def test_settings_of_a_user(reader_folder: Path) -> None:
    reader = with_settings(read_reader(reader_folder), 1, 3)
    assert (reader.reading.num_neighbors, reader.max_new_tokens) == (1, 3)
    assert with_settings(reader) == reader
