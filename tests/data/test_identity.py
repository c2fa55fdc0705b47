"""Ids: the row's own whatever type a table gave it, a file's by its real path, content's by its hash."""

import os
from pathlib import Path

import pytest

from retro_engine.data.corpus import Document, Reader, SetAside
from retro_engine.data.identity import content_id, file_id, own_id


@pytest.mark.parametrize(
    ("row", "identifier"),
    [
        ({"id": "a"}, "a"),
        ({"_id": "doc-17"}, "doc-17"),
        ({"id": "a", "_id": "b"}, "a"),
        ({"id": None, "_id": "b"}, "b"),
        ({"id": 18}, "18"),
        ({"id": -3}, "-3"),
        ({"id": 18.0}, "18"),
        ({"id": -0.0}, "0"),
        ({"id": 2.5}, "2.5"),
        ({"_id": 1 << 70}, str(1 << 70)),
        ({"id": float("nan")}, None),
        ({"id": None}, None),
        ({}, None),
    ],
)
def test_ids_of_rows(row: dict[str, object], identifier: str | None) -> None:
    assert own_id(row) == identifier


@pytest.mark.parametrize("value", ["", "  ", True, False, [], ["a"], {"$oid": "x"}, b"x", float("inf"), 1e300, 2.0**53])
@pytest.mark.parametrize("key", ["id", "_id"])
def test_ids_that_cannot_be_used(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"'{key}' is"):
        own_id({key: value})


def test_rows_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(
        '{"_id": "doc-17", "text": "a"}\n{"id": 18.0, "text": "b"}\n{"id": true, "text": "c"}\n'
        '{"id": "", "text": "d"}\n{"id": null, "text": "e"}\n{"id": 1e999, "text": "f"}\n'
    )
    rows = list(Reader().read([path]))
    assert [row.id for row in rows if isinstance(row, Document)] == ["doc-17", "18", f"{path}:5"]
    aside = [(row.source.rpartition(":")[2], row.reason) for row in rows if isinstance(row, SetAside)]
    assert [line for line, _ in aside] == ["3", "4", "6"]
    assert all("'id' is" in reason for _, reason in aside)


def test_a_file_has_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.txt").write_text("x")
    (tmp_path / "link").symlink_to("d")
    (tmp_path / "d" / "b.txt").symlink_to("a.txt")
    monkeypatch.chdir(tmp_path)
    spellings = ["d/a.txt", "./d/a.txt", "d/../d/a.txt", "d//a.txt", str(tmp_path / "d/a.txt"), "link/a.txt", "d/b.txt"]
    assert {file_id(Path(os.path.join(spelling)), tmp_path) for spelling in spellings} == {"d/a.txt"}
    assert file_id(Path("d/a.txt"), tmp_path / "link") == "a.txt"
    assert file_id(Path("d/a.txt"), tmp_path / "runs" / "mine") == "../../d/a.txt"
    assert file_id(Path("d/a.txt"), Path("/proc")) == str(tmp_path.resolve() / "d/a.txt")


def test_content_is_the_title_and_the_text() -> None:
    assert len({content_id(*pair) for pair in (("a", "b"), ("", "ab"), ("ab", ""), ("a", "c"))}) == 4
    assert content_id("T", "text") == "row-602a1fab6cf4fe12ed3c6f0f"
