"""Where things are kept, who may read them, and waiting for one's turn."""

import os
import stat
from pathlib import Path

import pytest

from retro_engine.errors import InUseError, UnavailableError, UsageError
from retro_engine.readers.places import home, in_turn, make_private, patiently


def test_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETRO_HOME", "/somewhere/else")
    assert home() == Path("/somewhere/else")
    monkeypatch.delenv("RETRO_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert home() == Path("/cache/retro-engine")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/users/me")
    assert home() == Path("/users/me/.cache/retro-engine")


def test_what_is_private(tmp_path: Path) -> None:
    make_private(tmp_path / "a" / "b")
    assert stat.S_IMODE(os.stat(tmp_path / "a" / "b").st_mode) == 0o700


def test_a_turn(tmp_path: Path) -> None:
    said: list[str] = []
    with in_turn(tmp_path), pytest.raises(UnavailableError), in_turn(tmp_path, said.append, wait_s=0.3):
        pass
    assert said == [f"{tmp_path} is in use by another process: waiting"]
    with in_turn(tmp_path, said.append):
        assert len(said) == 1, "nobody had it"


def test_only_locks_are_waited_for(tmp_path: Path) -> None:
    def fail() -> None:
        raise UsageError("read-only")

    with pytest.raises(UsageError, match="read-only"):
        patiently(fail, tmp_path)
    tries = iter([InUseError("x"), InUseError("x"), None])

    def take() -> None:
        error = next(tries)
        if error is not None:
            raise error

    patiently(take, tmp_path)
    assert not list(tries)
