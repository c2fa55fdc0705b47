"""reader.json: everything in it is looked at before it is used."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from retro_engine.errors import MissingInputError, RetroError, StoreError
from retro_engine.readers import reader_file
from retro_engine.readers.reader_file import find_reader, read_reader, shipped_readers


@pytest.fixture
def folder(reader_folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(reader_folder, tmp_path / "reader")
    for path in (tmp_path / "reader").iterdir():
        path.chmod(0o644)
    return tmp_path / "reader"


def changed(folder: Path, place: str, value: Any) -> Path:
    values = json.loads((folder / "reader.json").read_text())
    *parents, last = place.split(".")
    inner = values
    for name in parents:
        inner = inner[name]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    (folder / "reader.json").write_text(json.dumps(values))
    return folder


def test_round_trip(folder: Path) -> None:
    reader = read_reader(folder)
    assert reader.to_json() == json.loads((folder / "reader.json").read_text())
    assert reader.prompt("Who {x}?") == "question: Who {x}?\nanswer:"
    assert read_reader(changed(folder, "passage", "{title}: {text}")).shown("A {text}", "b") == "A {text}: b"
    read_reader(changed(folder, "of_a_later_version", [1]))


BAD = {
    "version": [..., "1", True],
    "name": ["", "../x", "a b", 3, ...],
    "base": [[], ...],
    "base.file": ["../base.gguf", "/etc/passwd", "", None],
    "base.sha256": ["0" * 63, "G" * 64, None],
    "base.get": ["two\nlines", "", 1],
    "lora.rank": [0, -1, 1.5, True, 1 << 20],
    "lora.alpha": [0, -1, 1e300, "16"],
    "lora.targets": [["eval"], "q", None],
    "reading.chunk_size": [0, 1 << 20, None],
    "reading.retrieved_length": [0, 33, 1 << 20, "24"],
    "reading.num_neighbors": [0, 1000, None],
    "reading.sink_id": [-1, "0", 1 << 40],
    "template": ["no question", 7, "x\0{question}"],
    "passage": ["", "{text}{text}", None],
    "absent": ["", "a\nb", "x" * 300],
    "max_new_tokens": [0, 1 << 20, None],
    "adapters": ["", "0" * 64],
}


@pytest.mark.parametrize("place", BAD)
def test_what_is_no_value_of_a_field(folder: Path, place: str) -> None:
    good = (folder / "reader.json").read_text()
    for value in BAD[place]:
        (folder / "reader.json").write_text(good)
        with pytest.raises(StoreError, match="is damaged") as caught:
            read_reader(changed(folder, place, value))
        assert len(str(caught.value).splitlines()) == 3, value


def test_versions_and_files(folder: Path) -> None:
    with pytest.raises(StoreError, match="has version 2\n  this program reads version 1\n  update retro-engine"):
        read_reader(changed(folder, "version", 2))
    changed(folder, "version", 1)
    raw = bytearray((folder / "adapters.safetensors").read_bytes())
    raw[-3] ^= 1
    (folder / "adapters.safetensors").write_bytes(raw)
    with pytest.raises(StoreError, match="its checksum does not match"):
        read_reader(folder)
    (folder / "adapters.safetensors").unlink()
    with pytest.raises(MissingInputError):
        read_reader(folder)
    for text in ("", "{", "[]", "[" * 100_000, '{"version": NaN}'):
        (folder / "reader.json").write_text(text)
        with pytest.raises(RetroError):
            read_reader(folder)
    (folder / "reader.json").unlink()
    with pytest.raises(MissingInputError, match="is no reader"):
        read_reader(folder)


def test_names(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert find_reader(folder).name == "tiny-reads"
    monkeypatch.setattr(reader_file, "SHIPPED", tmp_path / "shipped")
    with pytest.raises(MissingInputError, match="this package has none"):
        find_reader()
    shutil.copytree(folder, tmp_path / "shipped" / "smollm2")
    assert shipped_readers() == ["smollm2"]
    assert find_reader().folder == tmp_path / "shipped" / "smollm2"
    with pytest.raises(MissingInputError, match="did you mean smollm2"):
        find_reader("smollm")


@pytest.mark.parametrize("name", shipped_readers())
def test_shipped_readers_are_whole(name: str) -> None:
    reader = find_reader(name)
    assert reader.name == name
    assert (reader.folder / "README.md").read_text().strip()
    assert sum(path.stat().st_size for path in reader.folder.iterdir()) <= 25_000_000
