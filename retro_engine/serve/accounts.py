"""Who calls: users with passwords and sessions, keys with scopes; in one SQLite file, with an audit log beside it.

Passwords are hashed by scrypt, sessions, devices and keys (256 random bits) by SHA-256; hashes are compared in constant
time. A device is a browser that a user has signed in with before: guessing at his name elsewhere does not hold it up.
The file may be changed by `retro users` and `retro keys` while a server has it open.
"""

import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
import stat
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw

from retro_engine.data import files
from retro_engine.errors import StoreError, UsageError, write_error

SCOPES = ("read", "write", "admin")  # each may do what the ones before it may
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,63}")
MIN_PASSWORD, MAX_PASSWORD = 10, 1024  # characters
SCRYPT_N, SCRYPT_R, SCRYPT_P = 1 << 15, 8, 1  # 32 MiB and 50-100 ms a try
SESSION_S = 12 * 3600
DEVICE_S = 180 * 86_400
MAX_SESSIONS = 64  # of one user, and devices; the oldest go
APPLICATION_ID = 0x52455441  # "RETA", SQLite's mark of whose file it is
SCHEMA = """
CREATE TABLE users (name TEXT PRIMARY KEY, password TEXT NOT NULL, scope TEXT NOT NULL) STRICT;
CREATE TABLE keys (id TEXT PRIMARY KEY, hash TEXT NOT NULL, name TEXT NOT NULL, scope TEXT NOT NULL,
  expires REAL) STRICT;
CREATE TABLE sessions (hash TEXT PRIMARY KEY, user TEXT NOT NULL REFERENCES users (name) ON DELETE CASCADE,
  expires REAL NOT NULL) STRICT;
"""
DEVICES = """CREATE TABLE IF NOT EXISTS devices (hash TEXT PRIMARY KEY,
  user TEXT NOT NULL REFERENCES users (name) ON DELETE CASCADE, expires REAL NOT NULL) STRICT"""  # files before have none
SOMEBODY = "SELECT 1 FROM users UNION ALL SELECT 1 FROM keys LIMIT 1"


@dataclass(frozen=True)
class Caller:
    """Somebody who has shown a key or has a session."""

    name: str
    scope: str
    kind: str  # key or user
    key_id: str = field(default="", compare=False)  # names of keys may repeat

    @property
    def id(self) -> str:
        """Tells callers apart."""
        return f"{self.kind} {self.key_id or self.name}"

    def about(self) -> dict[str, str]:
        return {"name": self.name, "scope": self.scope, "kind": self.kind}

    def may(self, scope: str) -> bool:
        return SCOPES.index(self.scope) >= SCOPES.index(scope)


class Accounts:
    """An open accounts file; made when it is not there, readable by its owner alone."""

    def __init__(self, path: str | Path):
        """Raises StoreError for a file that is not one of accounts."""
        self.path = Path(path)
        files.make_folder(self.path.parent)
        try:
            os.close(_open_private(self.path, os.O_RDWR))
        except OSError as error:
            raise write_error(error, self.path) from error
        self._lock = threading.Lock()  # writers take turns
        self._setup: str | None = None
        self._free: list[apsw.Connection] = []
        try:
            with self._connection() as db:
                db.execute("PRAGMA journal_mode = WAL")
            with self._transaction() as db:
                found = db.pragma("application_id")
                if found == 0 and not db.execute("SELECT name FROM sqlite_schema").fetchall():
                    db.execute(f"{SCHEMA} PRAGMA application_id = {APPLICATION_ID}")
                elif found != APPLICATION_ID:
                    raise apsw.NotADBError("it is another program's")
                db.execute(DEVICES)
        except (apsw.NotADBError, apsw.CorruptError) as error:
            self.close()
            raise StoreError(f"{self.path} holds no accounts", str(error), "name another with --accounts") from error

    def close(self) -> None:
        while self._free:
            self._free.pop().close()

    @contextlib.contextmanager
    def _connection(self) -> Iterator[apsw.Connection]:
        """A connection that no other thread has."""
        try:
            db = self._free.pop()
        except IndexError:
            db = apsw.Connection(str(self.path))
            db.set_busy_timeout(10_000)
            db.execute("PRAGMA foreign_keys = ON")
        try:
            yield db
        finally:
            self._free.append(db)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[apsw.Connection]:
        """All of the block's changes on the disk when it ends, or none; what it reads is so until then."""
        with self._lock, self._connection() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    def _rows(self, statement: str, *values: Any) -> list[Any]:
        with self._connection() as db:
            return db.execute(statement, values).fetchall()

    def _write(self, statement: str, *values: Any) -> int:
        """Number of rows changed, once they are on the disk."""
        with self._transaction() as db:
            db.execute(statement, values)
            return db.changes()

    # Users

    def add_user(self, name: str, password: str, scope: str = "admin") -> None:
        """Raises UsageError for a name that is taken: nobody becomes another by a slip."""
        row = _user(name, password, scope)
        with self._transaction() as db:
            if db.execute("SELECT 1 FROM users WHERE name = ?", (name,)).fetchall():
                what = f"user {name!r} is there already"
                raise UsageError(what, "its password and scope stay as they are", f"retro users change {name}")
            db.execute("INSERT INTO users VALUES (?, ?, ?)", row)

    def change_user(self, name: str, password: str, scope: str | None = None) -> str:
        """A new password, and a new scope unless it is None; ends the user's sessions, and forgets his devices. Returns the
        scope.
        """
        row = _user(name, password, scope or SCOPES[0])
        with self._transaction() as db:
            found = db.execute("SELECT scope FROM users WHERE name = ?", (name,)).fetchall()
            if not found:
                raise UsageError(f"user {name!r} does not exist", "", "retro users list")
            kept = scope or str(found[0][0])
            db.execute("DELETE FROM sessions WHERE user = ?", (name,))
            db.execute("DELETE FROM devices WHERE user = ?", (name,))
            db.execute("UPDATE users SET password = ?, scope = ? WHERE name = ?", (row[1], kept, name))
        return kept

    def remove_user(self, name: str) -> None:
        if not self._write("DELETE FROM users WHERE name = ?", name):
            raise UsageError(f"user {name!r} does not exist", "", "retro users list")

    def users(self) -> list[tuple[str, str]]:
        """(name, scope) of every user."""
        return [(name, scope) for name, scope in self._rows("SELECT name, scope FROM users ORDER BY name")]

    # Keys

    def add_key(self, name: str, scope: str = "read", days: float | None = None) -> str:
        """A new key, which is kept as a hash only: this is the one time it is seen."""
        _check_name(name)
        _check_scope(scope)
        if days is not None and not 0 < days <= 36_500:
            raise UsageError(f"--days {days} cannot be used", "a key is valid for more than 0 days")
        key = f"rk_{secrets.token_urlsafe(32)}"
        digest = _sha256(key)
        expires = None if days is None else time.time() + days * 86_400
        self._write("INSERT INTO keys VALUES (?, ?, ?, ?, ?)", digest[:12], digest, name, scope, expires)
        return key

    def remove_key(self, identifier: str) -> None:
        if not self._write("DELETE FROM keys WHERE id = ?", identifier):
            raise UsageError(f"key {identifier!r} does not exist", "", "retro keys list")

    def list_keys(self) -> list[dict[str, Any]]:
        rows = self._rows("SELECT id, name, scope, expires FROM keys ORDER BY name, id")
        return [dict(zip(("id", "name", "scope", "expires"), row)) for row in rows]

    @property
    def is_empty(self) -> bool:
        return not self._rows(SOMEBODY)

    # Who calls

    def of_key(self, key: str) -> Caller | None:
        digest = _sha256(key)
        row = self._valid(digest, "SELECT hash, expires, name, scope FROM keys WHERE id = ?", digest[:12])
        return None if row is None else Caller(row[0], row[1], "key", digest[:12])

    def of_session(self, token: str) -> Caller | None:
        digest = _sha256(token)
        statement = "SELECT hash, expires, user, scope FROM sessions JOIN users ON user = name WHERE hash = ?"
        row = self._valid(digest, statement, digest)
        return None if row is None else Caller(row[0], row[1], "user")

    def _valid(self, digest: str, statement: str, *values: Any) -> list[Any] | None:
        """What the first row has after its hash, which is `digest`, and the time up to which it is valid (None: for ever)."""
        for hashed, expires, *rest in self._rows(statement, *values):
            if hmac.compare_digest(hashed, digest) and (expires is None or time.time() < expires):
                return rest
        return None

    def sign_in(self, name: str, password: str) -> str | None:
        """A new session's token, or None for a wrong name or password; both take as long."""
        found = self._rows("SELECT password FROM users WHERE name = ?", name)
        stored = found[0][0] if found else _UNKNOWN
        if not check_password(password, stored) or not found:
            return None
        return self._new_token("sessions", name, SESSION_S)

    def _new_token(self, table: str, name: str, seconds: float) -> str | None:
        """A secret of a user, kept as a hash; None for a user who was removed meanwhile."""
        token, now = secrets.token_urlsafe(32), time.time()
        with self._transaction() as db:
            if not db.execute("SELECT 1 FROM users WHERE name = ?", (name,)).fetchall():
                return None
            db.execute(f"DELETE FROM {table} WHERE expires < ?", (now,))
            db.execute(f"INSERT INTO {table} VALUES (?, ?, ?)", (_sha256(token), name, now + seconds))
            db.execute(
                f"DELETE FROM {table} WHERE user = ? AND hash NOT IN "
                f"(SELECT hash FROM {table} WHERE user = ? ORDER BY expires DESC LIMIT ?)",
                (name, name, MAX_SESSIONS),
            )
        return token

    def add_device(self, name: str) -> str | None:
        """A secret for the browser that a user has signed in with."""
        return self._new_token("devices", name, DEVICE_S)

    def device_of(self, token: str, name: str) -> str | None:
        """What tells a device of this user apart, or None where it is not one."""
        digest = _sha256(token)
        row = self._valid(digest, "SELECT hash, expires FROM devices WHERE hash = ? AND user = ?", digest, name)
        return digest[:12] if row is not None else None

    def sign_out(self, token: str) -> None:
        self._write("DELETE FROM sessions WHERE hash = ?", _sha256(token))

    # The first user

    def begin_setup(self) -> str | None:
        """The secret of a one-time set-up link, where nobody has access yet; it dies with the process."""
        if not self.is_empty:
            return None
        token = secrets.token_urlsafe(32)
        self._setup = _sha256(token)
        return token

    def set_up(self, token: str, name: str, password: str) -> bool:
        """Make the first user. False for a wrong secret, one that was used, or when there is somebody already: also of
        several at the same time only one is made.
        """
        if self._setup is None or not hmac.compare_digest(self._setup, _sha256(token)):
            return False
        row = _user(name, password, "admin")
        with self._transaction() as db:
            if self._setup is None or db.execute(SOMEBODY).fetchall():
                return False
            db.execute("INSERT INTO users VALUES (?, ?, ?)", row)
            self._setup = None
        return True

    def audit(self, action: str, caller: str, client: str, **about: Any) -> None:
        """Append a line to audit.jsonl. A full disk loses the line and says so, not the answer."""
        row = {"time": round(time.time(), 3), "action": action, "caller": caller, "client": client, **about}
        try:
            path = self.path.with_name("audit.jsonl")
            with self._lock, os.fdopen(_open_private(path, os.O_WRONLY | os.O_APPEND), "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            print(f"retro: audit.jsonl cannot be written: {error.strerror}", file=sys.stderr)


def _open_private(path: Path, flags: int) -> int:
    """A file that its owner alone reads, made when it is not there; also one that others could read before."""
    descriptor = os.open(path, os.O_CREAT | os.O_CLOEXEC | flags, 0o600)
    about = os.fstat(descriptor)
    if stat.S_IMODE(about.st_mode) & 0o077 and about.st_uid == os.geteuid():
        os.fchmod(descriptor, 0o600)
    return descriptor


def _user(name: str, password: str, scope: str) -> tuple[str, str, str]:
    """A row of users. Raises UsageError for what cannot be used."""
    _check_name(name)
    _check_scope(scope)
    if not MIN_PASSWORD <= len(password) <= MAX_PASSWORD:
        raise UsageError(
            "this password cannot be used", f"it has {len(password)} characters", f"take {MIN_PASSWORD} or more"
        )
    return name, hash_password(password), scope


def hash_password(password: str) -> str:
    salt = secrets.token_bytes(16)
    digest = _scrypt(password, salt, SCRYPT_N, SCRYPT_R, SCRYPT_P)
    return f"scrypt${SCRYPT_N}${SCRYPT_R}${SCRYPT_P}${salt.hex()}${digest.hex()}"


def check_password(password: str, stored: str) -> bool:
    _, n, r, p, salt, digest = stored.split("$")
    found = _scrypt(password[:MAX_PASSWORD], bytes.fromhex(salt), int(n), int(r), int(p))
    return hmac.compare_digest(found, bytes.fromhex(digest))


def _scrypt(password: str, salt: bytes, n: int, r: int, p: int) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, n=n, r=r, p=p, maxmem=256 * n * r, dklen=32)


# What an unknown name's password is compared with: no password has this hash.
_UNKNOWN = f"scrypt${SCRYPT_N}${SCRYPT_R}${SCRYPT_P}${'00' * 16}${'00' * 32}"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _check_name(name: str) -> None:
    if NAME.fullmatch(name) is None:
        raise UsageError(f"name {name[:80]!r} cannot be used", "it is 1 to 64 letters, digits, _ . @ and -")


def _check_scope(scope: str) -> None:
    if scope not in SCOPES:
        raise UsageError(f"scope {scope!r} does not exist", "", f"one of {', '.join(SCOPES)}")
