"""Accounts: what is stored, who is let in, what a damaged file says."""

import json
import sqlite3
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from retro_engine.errors import StoreError, UsageError
from retro_engine.serve import accounts as accounts_module
from retro_engine.serve.accounts import Accounts

PASSWORD = "correct horse battery"


@pytest.fixture
def accounts(tmp_path: Path) -> Accounts:
    return Accounts(tmp_path / "deep" / "accounts.sqlite")


def test_a_password_opens_a_session_and_nothing_else_does(accounts: Accounts) -> None:
    accounts.add_user("ada", PASSWORD, "write")
    token = accounts.sign_in("ada", PASSWORD)
    assert token is not None
    caller = accounts.of_session(token)
    assert caller == accounts_module.Caller("ada", "write", "user")
    assert [caller.may(scope) for scope in accounts_module.SCOPES] == [True, True, False]
    for name, password in (("ada", PASSWORD + "x"), ("ada", ""), ("bob", PASSWORD), ("", "")):
        assert accounts.sign_in(name, password) is None
    for wrong in ("", token[:-1], token + "a", "x"):
        assert accounts.of_session(wrong) is None
    accounts.sign_out(token)
    assert accounts.of_session(token) is None


def test_a_new_password_and_a_removed_user_end_the_sessions(accounts: Accounts) -> None:
    accounts.add_user("ada", PASSWORD)
    token = accounts.sign_in("ada", PASSWORD)
    assert token is not None
    with pytest.raises(UsageError, match="is there already"):
        accounts.add_user("ada", PASSWORD + "2", "read")
    assert accounts.of_session(token) is not None
    assert accounts.change_user("ada", PASSWORD + "2") == "admin"
    assert accounts.of_session(token) is None
    assert accounts.sign_in("ada", PASSWORD) is None
    token = accounts.sign_in("ada", PASSWORD + "2")
    assert token is not None
    assert accounts.change_user("ada", PASSWORD, "write") == "write"
    assert accounts.users() == [("ada", "write")]
    accounts.remove_user("ada")
    assert accounts.of_session(token) is None
    with pytest.raises(UsageError, match="does not exist"):
        accounts.change_user("ada", PASSWORD)
    assert accounts.users() == []
    with pytest.raises(UsageError, match="does not exist"):
        accounts.remove_user("ada")


def test_sessions_end_by_time_and_number(accounts: Accounts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts_module, "SCRYPT_N", 16)
    monkeypatch.setattr(accounts_module, "MAX_SESSIONS", 3)
    accounts.add_user("ada", PASSWORD)
    tokens = [accounts.sign_in("ada", PASSWORD) or "" for _ in range(5)]
    assert len(set(tokens)) == 5
    assert [accounts.of_session(token) is not None for token in tokens] == [False, False, True, True, True]
    now = accounts_module.time.time()
    monkeypatch.setattr(accounts_module.time, "time", lambda: now + accounts_module.SESSION_S + 1)
    assert accounts.of_session(tokens[-1]) is None


def test_keys(accounts: Accounts, monkeypatch: pytest.MonkeyPatch) -> None:
    key = accounts.add_key("ci", "read", days=1)
    assert key.startswith("rk_")
    assert len(key) >= 43
    assert accounts.of_key(key) == accounts_module.Caller("ci", "read", "key")
    for wrong in ("", key[:-1], key + "x", key.upper(), "rk_"):
        assert accounts.of_key(wrong) is None
    (row,) = accounts.list_keys()
    now = accounts_module.time.time()
    with monkeypatch.context() as patch:
        patch.setattr(accounts_module.time, "time", lambda: now + 86_401)
        assert accounts.of_key(key) is None
    accounts.remove_key(row["id"])
    assert accounts.of_key(key) is None
    with pytest.raises(UsageError, match="does not exist"):
        accounts.remove_key(row["id"])


def test_no_secret_is_in_the_file_and_only_its_owner_reads_it(accounts: Accounts) -> None:
    accounts.add_user("ada", PASSWORD)
    secrets = [PASSWORD, accounts.add_key("ci"), accounts.sign_in("ada", PASSWORD) or ""]
    accounts.audit("sign-in", "ada", "127.0.0.1")
    accounts.close()
    raw = b"".join(path.read_bytes() for path in accounts.path.parent.iterdir())
    for secret in secrets:
        assert secret.encode() not in raw
    assert stat.S_IMODE(accounts.path.stat().st_mode) == 0o600


def test_equal_passwords_have_different_hashes(accounts: Accounts) -> None:
    first, second = accounts_module.hash_password(PASSWORD), accounts_module.hash_password(PASSWORD)
    assert first != second
    assert accounts_module.check_password(PASSWORD, first)
    assert accounts_module.check_password(PASSWORD, second)
    assert first.split("$")[1:4] == ["32768", "8", "1"]


def test_the_set_up_link_works_once_and_only_while_there_is_nobody(accounts: Accounts) -> None:
    token = accounts.begin_setup()
    assert token is not None
    assert not accounts.set_up(token + "x", "ada", PASSWORD)
    assert accounts.set_up(token, "ada", PASSWORD)
    assert accounts.users() == [("ada", "admin")]
    assert not accounts.set_up(token, "eve", PASSWORD)
    assert accounts.begin_setup() is None
    other = Accounts(accounts.path.with_name("other.sqlite"))
    token = other.begin_setup()
    other.add_key("ci")
    assert token is not None
    assert not other.set_up(token, "eve", PASSWORD)


def test_two_processes_may_have_the_file_open(accounts: Accounts) -> None:
    other = Accounts(accounts.path)
    key = other.add_key("ci", "write")
    assert accounts.of_key(key) == accounts_module.Caller("ci", "write", "key")


@pytest.mark.parametrize("name", ["", " ", "a b", "x" * 65, "né", "a\n", "-a", "a/b"])
def test_names_that_are_refused(accounts: Accounts, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be used"):
        accounts.add_user(name, PASSWORD)
    with pytest.raises(UsageError, match="cannot be used"):
        accounts.add_key(name)


def test_what_else_is_refused(accounts: Accounts, tmp_path: Path) -> None:
    for password in ("", "short", "x" * 1025):
        with pytest.raises(UsageError, match="password"):
            accounts.add_user("ada", password)
    for days in (0, -1, float("nan"), 1e9):
        with pytest.raises(UsageError, match="days"):
            accounts.add_key("ci", days=days)
    with pytest.raises(UsageError, match="scope"):
        accounts.add_key("ci", "root")
    (tmp_path / "junk").write_bytes(b"not a database at all" * 100)
    with pytest.raises(StoreError, match="holds no accounts"):
        Accounts(tmp_path / "junk")
    with sqlite3.connect(tmp_path / "foreign") as foreign:
        foreign.execute("CREATE TABLE t (x)")
    with pytest.raises(StoreError, match="holds no accounts"):
        Accounts(tmp_path / "foreign")


def test_the_audit_log_appends_and_a_full_disk_is_said(
    accounts: Accounts, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    accounts.audit("documents.add", "ada", "127.0.0.1", ids=["a"], count=1)
    accounts.audit("sign-out", "ada", "127.0.0.1")
    path = accounts.path.with_name("audit.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["action"] for row in rows] == ["documents.add", "sign-out"]
    path.unlink()
    path.mkdir()
    accounts.audit("sign-in", "ada", "127.0.0.1")
    assert "audit.jsonl cannot be written" in capsys.readouterr().err


def test_the_set_up_link_makes_one_user_in_a_race(accounts: Accounts, monkeypatch: pytest.MonkeyPatch) -> None:
    """All have passed every look at whether somebody is there before the first one is written."""
    token = accounts.begin_setup()
    assert token is not None
    together = threading.Barrier(4)
    hashed = accounts_module.hash_password

    def wait_and_hash(password: str) -> str:
        together.wait(20)
        return hashed(password)

    monkeypatch.setattr(accounts_module, "hash_password", wait_and_hash)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: accounts.set_up(token, f"user{n}", PASSWORD), range(4)))
    assert sorted(found) == [False, False, False, True]
    assert len(accounts.users()) == 1


def test_a_file_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    accounts = Accounts(tmp_path / "accounts.sqlite")
    accounts.close()
    accounts.path.chmod(0o644)
    log = tmp_path / "audit.jsonl"
    log.write_text("")
    log.chmod(0o644)
    accounts = Accounts(accounts.path)
    accounts.audit("sign-in", "ada", "127.0.0.1")
    assert [stat.S_IMODE(path.stat().st_mode) for path in (accounts.path, log)] == [0o600] * 2


def test_a_new_audit_log_is_its_owners(accounts: Accounts) -> None:
    accounts.audit("sign-in", "ada", "127.0.0.1")
    assert stat.S_IMODE(accounts.path.with_name("audit.jsonl").stat().st_mode) == 0o600


def test_a_file_of_before_devices_is_read(accounts: Accounts) -> None:
    accounts.add_user("ada", PASSWORD)
    accounts.close()
    with sqlite3.connect(accounts.path) as old:
        old.execute("DROP TABLE devices")
    again = Accounts(accounts.path)
    assert again.add_device("ada") is not None


def test_threads_at_once(accounts: Accounts) -> None:
    """One connection that several threads use is an error of SQLite's."""
    accounts.add_user("ada", PASSWORD)
    token = accounts.add_device("ada")
    assert token is not None
    key = accounts.add_key("ci")

    def use(number: int) -> None:
        for _ in range(40):
            assert accounts.of_key(key) is not None
            assert number % 4 or accounts.add_device("ada")

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(use, range(12)))


@pytest.mark.parametrize(
    "name", ["a\u200bb", "a\u202eb", "\u2066ada", "ada\u00ad", "e\u0301", "\u3000", "ａda", "\x00"]
)
def test_names_that_look_like_others_are_refused(accounts: Accounts, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be used"):
        accounts.add_user(name, PASSWORD)
    with pytest.raises(UsageError, match="cannot be used"):
        accounts.add_key(name)
