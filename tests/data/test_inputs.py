"""Finding files: what is read once, and what is passed over with which reason; nothing is passed over without a word."""

import errno
import io
import os
import re
import socket
import subprocess
from pathlib import Path

import pytest

from retro_engine.data import inputs
from retro_engine.data.inputs import (
    check_file,
    find_files,
    is_unread,
    kind_of,
    open_file,
    read_bounded,
    say_linked,
    shown,
    standard_input,
    tell,
)
from retro_engine.errors import MissingInputError, OutOfResourceError, UsageError


def found(*inputs: Path) -> tuple[list[str], dict[str, str]]:
    files, passed_over = find_files(inputs)
    return [path.name for path in files], {Path(row.source).name: row.reason for row in passed_over}


def test_everything_in_a_folder_is_read_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.txt", "B.TXT", "c.JSONL.GZ", "d.odt", ".hidden.txt", "e.parquet.gz", "locked.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / ".git").mkdir()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "z.html").write_text("x")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    os.mkfifo(tmp_path / "f.txt")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("s.txt")
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked.txt" and real(path, mode))
    names, reasons = found(tmp_path)
    assert names == ["B.TXT", "a.txt", "c.JSONL.GZ", "z.html"]
    assert reasons == {
        ".git": "hidden: its name starts with a dot",
        ".hidden.txt": "hidden: its name starts with a dot",
        "d.odt": "of an unknown kind",
        "e.parquet.gz": "of an unknown kind",
        "f.txt": "a FIFO, not a file",
        "gone.txt": "a link to nothing",
        "locked.txt": "it cannot be read: permission denied",
        "loop.txt": "Too many levels of symbolic links",
        "s.txt": "a socket, not a file",
    }
    faults = {Path(row.source).name for row in find_files([tmp_path])[1] if row.is_fault}
    assert faults == {"f.txt", "gone.txt", "locked.txt", "loop.txt", "s.txt"}, "these stop --strict"


def test_links_are_followed_and_everything_is_read_once(tmp_path: Path) -> None:
    real, top = tmp_path / "real", tmp_path / "top"
    real.mkdir()
    top.mkdir()
    for name in ("a.txt", "b.txt"):
        (real / name).write_text("x")
    (top / "part").symlink_to(real)
    (top / "part2").symlink_to(real)
    (top / "again").symlink_to(top)
    (top / "c.txt").symlink_to(real / "a.txt")
    (top / "hard.txt").hardlink_to(real / "b.txt")
    names, reasons = found(top)
    assert names == ["c.txt", "hard.txt"], "files come before folders, and are read once"
    assert reasons == {
        "again": f"the same folder as {top}",
        "a.txt": f"the same file as {top}/c.txt",
        "b.txt": f"the same file as {top}/hard.txt",
        "part2": f"the same folder as {top}/part",
    }
    assert found(real, real, real / "a.txt")[0] == ["a.txt", "b.txt"]


def test_folders_deeper_than_the_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(1100):
        os.mkdir("d")
        os.chdir("d")
    Path("a.txt").write_text("x")
    os.chdir(tmp_path)
    try:
        assert found(Path("d"))[0] == ["a.txt"]
    finally:
        subprocess.run(["rm", "-r", "d"], check=True)  # shutil.rmtree, which pytest uses, ends with a RecursionError


def test_names_are_printable_text(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path)
    for name in (b"caf\xe9.txt", b"a\nb.txt", b"\xff.bin", "Zürich 黄山\u3000.txt".encode()):
        with open(folder + b"/" + name, "w") as file:
            file.write("x")
    files, passed_over = find_files([tmp_path])
    names = [shown(path) for path in files]
    assert sorted(names) == sorted(f"{tmp_path}/{n}" for n in ("a\\nb.txt", "Zürich 黄山\u3000.txt", "caf\\xe9.txt"))
    assert passed_over[0].source == f"{tmp_path}/\\xff.bin"


def test_what_lies_behind_links_is_said(tmp_path: Path) -> None:
    for name in ("real/a.txt", "real/b.txt", "top/own/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "top" / "part").symlink_to("../real")
    (tmp_path / "top" / "again.txt").symlink_to("own/c.txt")  # in the folder
    (tmp_path / "link").symlink_to("top")

    def said(*inputs: Path) -> list[str]:
        lines: list[str] = []
        say_linked(find_files(inputs)[0], inputs, lines.append)
        return lines

    assert (
        said(tmp_path / "top")
        == said(tmp_path / "link")
        == ["note: 2 of 3 files lie elsewhere, behind links, which are followed"]
    )
    assert said(tmp_path / "real") == said(tmp_path / "top" / "part" / "a.txt", tmp_path / "top" / "o*") == []


def test_patterns_and_named_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.txt", "sub/b.txt", "sub/c.doc", "[x].txt"):
        (tmp_path / name).write_text("x")
    assert found(tmp_path / "**" / "*")[0] == ["[x].txt", "a.txt", "b.txt"]
    assert found(tmp_path / "**" / "*")[1]["c.doc"] == "of an unknown kind"
    assert found(tmp_path / "[x].txt")[0] == ["[x].txt"], "a name that is there is no pattern"
    with pytest.raises(MissingInputError, match="nothing matches"):
        found(tmp_path / "*.md")
    with pytest.raises(MissingInputError, match=r"no.txt does not exist"):
        found(tmp_path / "no.txt")
    with pytest.raises(UsageError, match="unknown kind"):
        found(tmp_path / "sub" / "c.doc")


def test_what_has_no_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "f.txt")
    for path, what in ((tmp_path / "f.txt", "a FIFO"), (Path("/dev/zero"), "a device"), (tmp_path, "a folder")):
        for function in (check_file, open_file, lambda path: read_bounded(path, 10)):
            with pytest.raises(MissingInputError, match=f"is {what}"):
                function(path)
    (tmp_path / "a.txt").write_text("x" * 11)
    with pytest.raises(UsageError, match="larger than 10 bytes"):
        read_bounded(tmp_path / "a.txt", 10)
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(MissingInputError, match="no standard input"):
        standard_input()
    with open("/dev/null") as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        assert standard_input().read() == b""


def test_many_are_named_or_listed(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number:02d}.png").write_text("x")
    passed_over = find_files([tmp_path])[1]
    said: list[str] = []
    tell(passed_over, said.append)
    assert said == [f"passed over: {tmp_path}/{number:02d}.png: of an unknown kind" for number in range(30)]
    said.clear()
    tell(passed_over, said.append, "list.jsonl")
    assert said[19:] == [f"passed over: {tmp_path}/19.png: of an unknown kind", "30 passed over, listed in list.jsonl"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.TXT", ".txt"),
        ("a.b.jsonl.gz", ".jsonl"),
        ("a.html.ZST", ".html"),
        ("a.gz", ""),
        ("a", ""),
        ("txt", ""),
        (".txt", ""),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(Path(name)) == kind


@pytest.mark.parametrize(
    ("code", "unread"),
    [(errno.EIO, True), (errno.EACCES, True), (errno.ESTALE, True), (errno.ENOENT, False), (errno.EINVAL, False)],
)
def test_whose_fault_it_is_that_something_was_not_read(code: int, unread: bool) -> None:
    """The system's, also where another error tells of it; not the file's own."""
    met = OSError(code, "as it says")
    wrapped = MissingInputError("a file cannot be read", "")
    wrapped.__cause__ = met
    assert is_unread(met) is is_unread(wrapped) is unread
    assert not is_unread(MissingInputError("a file cannot be read", ""))
    assert not is_unread(EOFError()) and not is_unread(OSError("Not a gzipped file"))


def test_a_file_that_the_system_stops_reading_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(inputs, "open_file", lambda path: Failing())
    with pytest.raises(OutOfResourceError, match=re.escape(f"{tmp_path / 'a.json'} cannot be read")):
        read_bounded(tmp_path / "a.json", 10)


def test_a_path_that_is_nearly_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "mytext").mkdir()
    for given, said in (("mytxt", f"did you mean {tmp_path / 'mytext'}?"), ("else", ""), ("no/mytxt", "")):
        with pytest.raises(MissingInputError) as raised:
            find_files([tmp_path / given])
        assert (raised.value.why, raised.value.what) == (said, f"{tmp_path / given} does not exist")
