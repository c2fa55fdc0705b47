"""Who calls: users with passwords and sessions, keys with scopes; in one SQLite file, with an audit log beside it.

Passwords are hashed by scrypt, sessions and keys (256 random bits) by SHA-256; hashes are compared in constant time.
The file may be changed by `retro users` and `retro keys` while a server has it open.
"""

import hashlib
import hmac
import json
import os
import re
import secrets
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw

from retro_engine.data import files
from retro_engine.errors import StoreError, UsageError

SCOPES = ("read", "write", "admin")  # each may do what the ones before it may
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,63}")
MIN_PASSWORD, MAX_PASSWORD = 10, 1024  # characters
SCRYPT_N, SCRYPT_R, SCRYPT_P = 1 << 15, 8, 1  # 32 MiB and 50-100 ms a try
SESSION_S = 12 * 3600
MAX_SESSIONS = 64  # of one user; the oldest go
APPLICATION_ID = 0x52455441  # "RETA", SQLite's mark of whose file it is
SCHEMA = """
CREATE TABLE users (name TEXT PRIMARY KEY, password TEXT NOT NULL, scope TEXT NOT NULL) STRICT;
CREATE TABLE keys (id TEXT PRIMARY KEY, hash TEXT NOT NULL, name TEXT NOT NULL, scope TEXT NOT NULL,
  expires REAL) STRICT;
CREATE TABLE sessions (hash TEXT PRIMARY KEY, user TEXT NOT NULL REFERENCES users (name) ON DELETE CASCADE,
  expires REAL NOT NULL) STRICT;
"""


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
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
        except OSError as error:
            raise files.io_error(error, self.path) from error
        self._lock = threading.Lock()
        self._setup: str | None = None
        self._db = apsw.Connection(str(self.path))
        try:
            self._db.set_busy_timeout(10_000)
            self._db.execute("PRAGMA journal_mode = WAL; PRAGMA foreign_keys = ON")
            found = self._db.pragma("application_id")
            if found == 0 and not self._rows("SELECT name FROM sqlite_schema"):
                with self._db:
                    self._db.execute(f"{SCHEMA} PRAGMA application_id = {APPLICATION_ID}")
            elif found != APPLICATION_ID:
                raise apsw.NotADBError("it is another program's")
        except (apsw.NotADBError, apsw.CorruptError) as error:
            self._db.close()
            raise StoreError(f"{self.path} holds no accounts", str(error), "name another with --accounts") from error

    def close(self) -> None:
        self._db.close()

    def _rows(self, statement: str, *values: Any) -> list[Any]:
        return self._db.execute(statement, values).fetchall()

    def _write(self, statement: str, *values: Any) -> int:
        """Number of rows changed, once they are on the disk."""
        with self._lock:
            self._db.execute(statement, values)
            return self._db.changes()

    # Users

    def add_user(self, name: str, password: str, scope: str = "admin") -> None:
        """Add a user, or give one a new password and scope; ends the user's sessions."""
        _check_name(name)
        _check_scope(scope)
        if not MIN_PASSWORD <= len(password) <= MAX_PASSWORD:
            raise UsageError(
                "this password cannot be used", f"it has {len(password)} characters", f"take {MIN_PASSWORD} or more"
            )
        hashed = hash_password(password)
        with self._lock, self._db:
            self._db.execute("DELETE FROM sessions WHERE user = ?", (name,))
            self._db.execute(
                "INSERT INTO users VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE SET password = ?, scope = ?",
                (name, hashed, scope, hashed, scope),
            )

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
        return not self._rows("SELECT 1 FROM users UNION ALL SELECT 1 FROM keys LIMIT 1")

    # Who calls

    def of_key(self, key: str) -> Caller | None:
        digest = _sha256(key)
        for hashed, name, scope, expires in self._rows(
            "SELECT hash, name, scope, expires FROM keys WHERE id = ?", digest[:12]
        ):
            if hmac.compare_digest(hashed, digest) and (expires is None or time.time() < expires):
                return Caller(name, scope, "key", digest[:12])
        return None

    def of_session(self, token: str) -> Caller | None:
        digest = _sha256(token)
        for hashed, name, scope, expires in self._rows(
            "SELECT hash, user, scope, expires FROM sessions JOIN users ON user = name WHERE hash = ?", digest
        ):
            if hmac.compare_digest(hashed, digest) and time.time() < expires:
                return Caller(name, scope, "user")
        return None

    def sign_in(self, name: str, password: str) -> str | None:
        """A new session's token, or None for a wrong name or password; both take as long."""
        found = self._rows("SELECT password FROM users WHERE name = ?", name)
        stored = found[0][0] if found else _UNKNOWN
        if not check_password(password, stored) or not found:
            return None
        token = secrets.token_urlsafe(32)
        now = time.time()
        with self._lock, self._db:
            self._db.execute("DELETE FROM sessions WHERE expires < ?", (now,))
            self._db.execute("INSERT INTO sessions VALUES (?, ?, ?)", (_sha256(token), name, now + SESSION_S))
            self._db.execute(
                "DELETE FROM sessions WHERE user = ? AND hash NOT IN "
                "(SELECT hash FROM sessions WHERE user = ? ORDER BY expires DESC LIMIT ?)",
                (name, name, MAX_SESSIONS),
            )
        return token

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
        """Make the first user. False for a wrong secret, one that was used, or when there is somebody already."""
        if self._setup is None or not hmac.compare_digest(self._setup, _sha256(token)) or not self.is_empty:
            return False
        self.add_user(name, password, "admin")
        self._setup = None
        return True

    def audit(self, action: str, caller: str, client: str, **about: Any) -> None:
        """Append a line to audit.jsonl. A full disk loses the line and says so, not the answer."""
        row = {"time": round(time.time(), 3), "action": action, "caller": caller, "client": client, **about}
        try:
            with self._lock, open(self.path.with_name("audit.jsonl"), "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            print(f"retro: audit.jsonl cannot be written: {error.strerror}", file=sys.stderr)


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
