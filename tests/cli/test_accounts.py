"""`retro users` and `retro keys`, as they are typed; what `retro serve` says when an extra is missing."""

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from retro_engine.cli import main


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("RETRO_SERVE_ACCOUNTS", str(tmp_path / "accounts.sqlite"))

    def call(*words: str, code: int = 0, stdin: str = "") -> tuple[str, str]:
        class Stdin:
            isatty = staticmethod(lambda: False)
            readline = staticmethod(lambda: stdin)

        monkeypatch.setattr("sys.stdin", Stdin)
        assert main(list(words)) == code
        return capsys.readouterr()

    return call


def test_users(run: Any, tmp_path: Path) -> None:
    assert run("users", "add", "ada", stdin="correct horse battery\n")[0] == "ada  read\n"
    assert run("users", "change", "ada", "--scope", "admin", stdin="correct horse battery\n")[0] == "ada  admin\n"
    assert run("users", "change", "ada", stdin="correct horse staple\n")[0] == "ada  admin\n"
    assert "is there already" in run("users", "add", "ada", code=2, stdin="correct horse battery\n")[1]
    run("users", "add", "bob", "--scope", "read", stdin="correct horse battery\n")
    assert run("users", "list")[0] == "ada  admin\nbob  read\n"
    assert [json.loads(line)["name"] for line in run("users", "list", "--json")[0].splitlines()] == ["ada", "bob"]
    run("users", "remove", "bob")
    assert run("users", "list")[0] == "ada  admin\n"
    for words, stdin, why in (
        (("add", "x y"), "correct horse battery\n", "name"), (("add", "eve"), "short\n", "password"),
        (("add", "eve"), "", "password"), (("add", "eve", "--scope", "root"), "correct horse battery\n", "scope"),
        (("remove", "nobody"), "", "does not exist"), (("change", "nobody"), "correct horse battery\n", "does not exist"),
    ):  # fmt: skip
        assert why in run("users", *words, code=2, stdin=stdin)[1]
    assert stat.S_IMODE((tmp_path / "accounts.sqlite").stat().st_mode) == 0o600


def test_keys(run: Any) -> None:
    key = run("keys", "add", "ci", "--scope", "write", "--days", "30")[0].strip()
    assert key.startswith("rk_")
    (row,) = [json.loads(line) for line in run("keys", "list", "--json")[0].splitlines()]
    assert (row["name"], row["scope"]) == ("ci", "write")
    assert key not in json.dumps(row)
    run("keys", "remove", row["id"])
    assert run("keys", "list")[0] == ""
    assert "does not exist" in run("keys", "remove", row["id"], code=2)[1]
    assert "days" in run("keys", "add", "ci", "--days", "0", code=2)[1]
