"""Bulk import into a live library: JSON lines in the background, with progress and the reason of every row not used.

A job is a row of the library. Each batch of documents is written in one transaction with the job's progress, so a job
that was killed goes on where it was: no document half, none twice. A stream is first kept in LIBRARY/imports/, and its
job names it by its place there, so a library may be moved. Of the rows that are not used the first are told, all counted.
"""

import contextlib
import itertools
import os
import re
import secrets
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import apsw

from retro_engine.data import files
from retro_engine.data.corpus import Document, Reader, in_batches
from retro_engine.data.inputs import ROW_KINDS, SetAside, check_file, kind_of, shown
from retro_engine.errors import MissingInputError, OutOfResourceError, RetroError, UsageError, write_error
from retro_engine.library.documents import MAX_DOCUMENT_BYTES, check_document, check_namespace
from retro_engine.library.identity import identified_in
from retro_engine.library.library import DEFAULT, Library

IMPORTS = "imports"
BATCH_DOCUMENTS = 256
BATCH_CHARACTERS = 4 << 20
MAX_LINE_BYTES = 2 * MAX_DOCUMENT_BYTES  # JSON escapes make a line longer than its text
ERRORS_KEPT = 100  # of a job's rows that are not used: more are only counted, or small rows would fill the disk
ERROR_CHARACTERS = 500
STREAM = re.compile(r"[0-9a-f]{16}\.jsonl")
STREAM_FILE = re.compile(rf"{STREAM.pattern}|\.{STREAM.pattern}\.tmp")
KEPT_S = 3600.0  # a stream whose job has not begun
TRIM = """
DELETE FROM job_errors WHERE rowid IN (SELECT place FROM (
  SELECT rowid AS place, row_number() OVER (PARTITION BY job ORDER BY rowid) AS n FROM job_errors) WHERE n > ?)
"""
COLUMNS = "number, path, namespace, state, done, added, failed, reason"


@dataclass(frozen=True)
class Job:
    """An import as it is now. States: running, done, failed (see reason; it can go on), interrupted (likewise)."""

    number: int
    path: str
    namespace: str
    state: str
    done: int  # rows read
    added: int
    failed: int  # rows that were not used
    reason: str
    errors: list[tuple[str, str]]  # (file:line, reason), the first 100


class Importer:
    """Runs the import jobs of one open library, each in a thread."""

    def __init__(self, library: Library):
        self.library = library
        self._threads: dict[int, threading.Thread] = {}
        self._is_stopping = False
        with library.locked_transaction() as connection:
            connection.execute("UPDATE jobs SET state = 'interrupted' WHERE state = 'running'")
            connection.execute(TRIM, (ERRORS_KEPT,))  # of earlier versions, which kept all

    def __enter__(self) -> "Importer":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End every job after its batch; they can go on later. To be called before the library is closed."""
        self._is_stopping = True
        for thread in self._threads.values():
            thread.join()

    def start(self, source: str | Path | IO[bytes], namespace: str = DEFAULT) -> int:
        """Begin to import a file or a stream of JSON lines with `text` and perhaps `id` and `title`; return its number.

        A file whose import was interrupted goes on. Raises MissingInputError or UsageError for one that cannot be read.
        """
        check_namespace(namespace)
        path = Path(source).resolve() if isinstance(source, str | Path) else self._keep(source)
        if kind_of(path) not in ROW_KINDS:
            known = f"known: {', '.join(ROW_KINDS)}, compressed or not"
            raise UsageError(f"{shown(path)} is of an unknown kind", known, "rename or convert it")
        size, modified = _state_of(path)
        place = self._place(path)
        rows = self.library.read(
            "SELECT number FROM jobs WHERE path = ? AND size = ? AND modified = ? AND namespace = ? AND state != 'done' "
            "ORDER BY number DESC LIMIT 1",
            *(place, size, modified, namespace),
        )
        if rows:
            return self.resume(rows[0][0])
        with self.library.locked_transaction() as connection:
            connection.execute(
                "INSERT INTO jobs (path, size, modified, namespace, state, done, added, failed, reason) "
                "VALUES (?, ?, ?, ?, 'running', 0, 0, 0, '')",
                (place, size, modified, namespace),
            )
            number = connection.last_insert_rowid()
        return self._run_in_thread(number)

    def resume(self, number: int) -> int:
        """Let a job that was interrupted or failed go on. Raises UsageError when its file has changed."""
        job = self.job(number)
        if job.state == "done" or (number in self._threads and self._threads[number].is_alive()):
            return number
        ((place, *expected),) = self.library.read("SELECT path, size, modified FROM jobs WHERE number = ?", number)
        stream = self._stream(place)
        if stream is not None and not (files.own_folder(stream.parent) and files.kind_of(stream) == "a file"):
            raise MissingInputError(
                f"{stream} is {files.kind_of(stream) or 'gone'}", "it held what was sent", "send it again"
            )
        found = _state_of(Path(job.path))
        if found[0] != expected[0] or (found[1] != expected[1] and stream is None):
            raise UsageError(
                f"{job.path} has changed", f"import {number} read {job.done:,} rows of it", "import it anew"
            )
        with self.library.locked_transaction() as connection:
            connection.execute("UPDATE jobs SET state = 'running', reason = '' WHERE number = ?", (number,))
        return self._run_in_thread(number)

    def recover(self) -> None:
        """Let the imports of streams go on that a killed process left: nobody else could ask for them again.

        Kept streams that no unfinished job names are removed, once they are too old to be still on their way.
        """
        folder = self.library.folder / IMPORTS
        rows = self.library.read("SELECT number, path FROM jobs WHERE state != 'done'")
        known = set()
        for number, place in rows:
            stream = self._stream(place)
            if stream is not None:
                known.add(stream.name)
                try:
                    self.resume(number)
                except RetroError as error:  # a stream that is gone stays as it was
                    self._end(number, self.job(number).state, str(error))
        for name in os.listdir(folder) if files.own_folder(folder) else ():
            file = folder / name
            if STREAM_FILE.fullmatch(name) and name not in known and time.time() - file.lstat().st_mtime > KEPT_S:
                file.unlink(missing_ok=True)

    def _stream(self, place: str) -> Path | None:
        """The stream of this library that a job names; None where it names a file elsewhere.

        Earlier versions wrote down a whole path, which a library that was moved leaves behind.
        """
        path = Path(place)
        is_stream = path.parent.name == IMPORTS and STREAM.fullmatch(path.name) is not None
        own = self.library.folder.resolve() / IMPORTS / path.name
        is_own = not path.is_absolute() or path.parent == own.parent or files.kind_of(own) == "a file"
        return own if is_stream and is_own else None

    def _place(self, path: Path) -> str:
        """What a job writes down of its file."""
        is_own = path.parent == self.library.folder.resolve() / IMPORTS and STREAM.fullmatch(path.name) is not None
        return f"{IMPORTS}/{path.name}" if is_own else str(path)

    def wait(self, number: int, timeout_s: float | None = None) -> Job:
        """The job once it has ended, or when the time is over."""
        if number in self._threads:
            self._threads[number].join(timeout_s)
        return self.job(number)

    def job(self, number: int) -> Job:
        """Raises UsageError when there is none with this number."""
        rows = self.library.read(f"SELECT {COLUMNS} FROM jobs WHERE number = ?", number)
        if not rows:
            raise UsageError(f"import {number} does not exist", "", "look at the list of imports")
        errors: list[Any] = self.library.read(
            "SELECT source, reason FROM job_errors WHERE job = ? ORDER BY rowid LIMIT ?", number, ERRORS_KEPT
        )
        number, place, namespace, state, done, added, failed, reason = rows[0]
        return Job(
            number,
            str(self._stream(place) or place),
            namespace=namespace,
            state=state,
            done=done,
            added=added,
            failed=failed,
            reason=reason,
            errors=errors,
        )

    def jobs(self) -> list[Job]:
        """Every job, the newest first."""
        rows = self.library.read("SELECT number FROM jobs ORDER BY number DESC LIMIT 1000")
        return [self.job(number) for (number,) in rows]

    def _keep(self, stream: IO[bytes]) -> Path:
        """The stream's bytes as a file of the library, published when it has ended."""
        folder = self.library.folder.resolve() / IMPORTS
        files.own_folder(folder)
        files.make_folder(folder)
        path = folder / f"{secrets.token_hex(8)}.jsonl"  # no number: several servers may keep one here at once
        temporary = folder / f".{path.name}.tmp"
        try:
            with open(temporary, "xb") as file:
                shutil.copyfileobj(stream, file, 1 << 20)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise write_error(error, path) from error
        files.publish_file(temporary, path)
        return path

    def _run_in_thread(self, number: int) -> int:
        thread = threading.Thread(target=self._run, args=(number,), name=f"library-import-{number}", daemon=True)
        self._threads[number] = thread
        thread.start()
        return number

    def _run(self, number: int) -> None:
        job = self.job(number)
        try:
            reader = Reader(max_document_bytes=MAX_LINE_BYTES)
            rows = itertools.islice(reader.read([Path(job.path)]), job.done, None)
            for batch in in_batches(rows, BATCH_CHARACTERS, BATCH_DOCUMENTS):
                if self._is_stopping:
                    return  # stays running in the file: the next to open it calls it interrupted
                self._write(job, batch)
            self._end(number, "done", "")
            ((place,),) = self.library.read("SELECT path FROM jobs WHERE number = ?", number)
            stream = self._stream(place)
            if stream is not None and files.own_folder(stream.parent):
                stream.unlink(missing_ok=True)
        except RetroError as error:  # a full disk, an embedder: nothing of the batch was kept
            with contextlib.suppress(RetroError):
                self._end(number, "failed", str(error))
        except BaseException as error:  # a bug: the job must not say "running" for ever
            with contextlib.suppress(RetroError):
                self._end(number, "failed", f"{type(error).__name__}: {error}")
            raise

    def _write(self, job: Job, batch: list[Document | SetAside]) -> None:
        """One batch and the job's progress, in one transaction. Raises OutOfResourceError for what the system let nobody read."""
        unread = next((row for row in batch if isinstance(row, SetAside) and row.is_unread), None)
        if unread is not None:  # nobody knows what it holds: done, it would be lost
            where = self._sender_place(job, unread.source)
            raise OutOfResourceError(
                f"{where} was not read into {self.library.folder}",
                unread.reason,
                "import it again: it goes on where it stopped",
            )
        good: dict[str, Document] = {}
        bad: list[tuple[int, str, str]] = []
        num_good = 0
        for row in batch:
            try:
                if isinstance(row, Document):
                    (document,) = identified_in(self.library, [row], job.namespace)
                    check_document(document)
                    good[document.id] = document  # the last of those with the same id
                    num_good += 1
                else:
                    bad.append((job.number, self._sender_place(job, row.source), row.reason))
            except UsageError as error:
                bad.append((job.number, self._sender_place(job, row.source), f"{error.what}: {error.why}"))

        def progress(connection: apsw.Connection) -> None:
            connection.execute(
                "UPDATE jobs SET done = done + ?, added = added + ?, failed = failed + ? WHERE number = ?",
                (len(batch), num_good, len(bad), job.number),
            )
            ((kept,),) = list[Any](connection.execute("SELECT count(*) FROM job_errors WHERE job = ?", (job.number,)))
            told = [(number, *(text[:ERROR_CHARACTERS] for text in texts)) for number, *texts in bad]
            connection.executemany("INSERT INTO job_errors VALUES (?, ?, ?)", told[: max(0, ERRORS_KEPT - kept)])

        self.library.write(job.namespace, self.library.chunker.prepare(list(good.values())), [], progress)

    def _sender_place(self, job: Job, source: str) -> str:
        """Where a row is, for who sent it: of a stream the line, not the file in which it is kept."""
        is_stream = Path(job.path).resolve().parent == (self.library.folder / IMPORTS).resolve()
        return f"line {source.rpartition(':')[2]}" if is_stream else source

    def _end(self, number: int, state: str, reason: str) -> None:
        with self.library.locked_transaction() as connection:
            connection.execute("UPDATE jobs SET state = ?, reason = ? WHERE number = ?", (state, reason, number))


def _state_of(path: Path) -> tuple[int, int]:
    """Size and time of change: a file with the same is taken to be the same."""
    found = check_file(path)
    return found.st_size, found.st_mtime_ns
