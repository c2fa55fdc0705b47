"""Folders that a server follows: what changes in them is read by the next search; one that vanishes takes nothing with it."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serve_helpers import Server, post, serving

from retro_engine.errors import MissingInputError, UsageError
from retro_engine.serve import follow
from retro_engine.serve.service import ServiceOptions, open_service


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("followed") / "notes"
    folder.mkdir()
    (folder / "mill.md").write_text("The zyzzyva sleeps in the mill.")
    return folder


@pytest.fixture(scope="module")
def following(small_run: Path, notes: Path) -> Iterator[Server]:
    options = ServiceOptions(
        run=str(small_run), library=str(notes.parent / "library"), follow=[str(notes)], name="tiny"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(follow.FollowedFolders.__init__, "__defaults__", (0.02,))
        patch.setattr(follow, "SHARE", 0)
        with serving(lambda: open_service(options), notes.parent) as server:
            yield server


def waited(server: Server, query: str, count: int) -> list[str]:
    """Titles of what is found, once there are so many."""
    deadline = time.monotonic() + 20
    while True:
        found = [hit["document"] for hit in post(server, "/v1/retrieve", query=query, k=5).json()["data"]]
        if len(found) == count or time.monotonic() > deadline:
            return sorted(found)
        time.sleep(0.02)


def listed(server: Server) -> Any:
    with server.client("read") as client:
        return client.get("/v1/documents").json()["statistics"]


def test_files_come_change_and_go(following: Server, notes: Path) -> None:
    assert waited(following, "zyzzyva", 1) == ["notes/mill.md"]
    (notes / "tide.md").write_text("Another zyzzyva swims.")
    assert waited(following, "zyzzyva", 2) == ["notes/mill.md", "notes/tide.md"]
    (notes / "tide.md").write_text("A heron swims there now.")
    assert waited(following, "zyzzyva", 1) == ["notes/mill.md"]
    assert waited(following, "heron", 1) == ["notes/tide.md"]
    (notes / "tide.md").unlink()
    assert waited(following, "heron", 0) == []
    (about,) = listed(following)["followed"]
    assert (about["folder"], about["files"], about["documents"], about["state"]) == ("notes", 1, 1, "followed")


def test_a_folder_that_vanishes_takes_nothing_with_it(following: Server, notes: Path) -> None:
    away = notes.with_name("away")
    notes.rename(away)
    deadline = time.monotonic() + 20
    while not (said := listed(following)["notes"]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert said == [
        "folder notes is not followed now: notes is no folder: a folder is followed; what was read of it stays: 1 files"
    ]
    assert waited(following, "zyzzyva", 1) == ["notes/mill.md"]
    shutil.move(away, notes)
    deadline = time.monotonic() + 20
    while listed(following)["notes"] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert listed(following)["followed"][0]["state"] == "followed"


def test_folders_that_cannot_be_followed(small_run: Path, tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(MissingInputError, match="is no folder"):
        open_service(ServiceOptions(run=str(small_run), library=str(tmp_path / "l"), follow=[str(tmp_path / "no")]))
    with pytest.raises(UsageError, match="named twice"):
        follow.check_folders([str(tmp_path / "a"), str(tmp_path / "a" / "b")])
    assert follow.check_folders([str(tmp_path / "a")]) == [tmp_path / "a"]
