"""Bulk import: every good row once, every bad row with its reason, whatever stops it."""

import errno
import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import apsw
import numpy as np
import pytest
from helpers import WORDS, small_disk

from retro_engine.data import inputs
from retro_engine.data.store import Store
from retro_engine.errors import MissingInputError, StoreError, UsageError
from retro_engine.library import importer as library_import
from retro_engine.library.importer import Importer
from retro_engine.library.library import Library

TESTS = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path, small_store: Store) -> Path:
    Library.create(tmp_path / "library", small_store.tokenizer, 16)
    return tmp_path / "library"


def rows(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [json.dumps({"id": f"d{i}", "text": f"{' '.join(rng.choice(WORDS, 8))} row{i}x"}) for i in range(count)]


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


BAD = ["not json", '{"text": ""}', '{"id": "a\\u0007", "text": "x"}', '{"id": "b"}', "[1]", '{"text": 7}']


def test_good_and_bad_rows(folder: Path, tmp_path: Path) -> None:
    lines = rows(600)
    for place, bad in enumerate(BAD):
        lines.insert(97 * place, bad)
    lines.append(json.dumps({"id": "d5", "title": "Again", "text": "a later text"}))
    path = write(tmp_path / "in.jsonl", lines)
    with Library(folder) as library, Importer(library) as importer:
        job = importer.wait(importer.start(path, "imported"))
        assert (job.state, job.done, job.added, job.failed) == ("done", 607, 601, 6)
        assert [source for source, _ in job.errors] == [f"{path}:{97 * i + 1}" for i in range(6)]
        for (_, reason), part in zip(job.errors, ("not JSON", "empty", "not allowed", "no key", "object", "not text")):
            assert part in reason
        assert len(library.entries("imported", limit=1000)) == 600
        assert library.search("row599x", 1, namespace="imported")[0].document == "d599"
        later = library.get("d5", "imported")
        assert later is not None
        assert later.title == "Again"
        assert library.entries() == []
        assert [j.number for j in importer.jobs()] == [job.number]
        library.verify()


def test_streams_and_compressed_files(folder: Path, tmp_path: Path) -> None:
    raw = ("\n".join(rows(20)) + "\n").encode()
    with gzip.open(tmp_path / "in.jsonl.gz", "wb") as file:
        file.write(raw)
    with Library(folder) as library, Importer(library) as importer:
        for source in (io.BytesIO(raw), tmp_path / "in.jsonl.gz"):
            job = importer.wait(importer.start(source))
            assert (job.state, job.added) == ("done", 20), job
        assert list((folder / "imports").iterdir()) == [], "what was kept of the stream is gone"


def test_what_cannot_be_imported(folder: Path, tmp_path: Path) -> None:
    with Library(folder) as library, Importer(library) as importer:
        with pytest.raises(MissingInputError, match="does not exist"):
            importer.start(tmp_path / "no.jsonl")
        with pytest.raises(UsageError, match="unknown kind"):
            importer.start(write(tmp_path / "a.txt", ["text"]))
        with pytest.raises(UsageError, match="import 7 does not exist"):
            importer.job(7)
        with pytest.raises(UsageError, match="namespace"):
            importer.start(write(tmp_path / "a.jsonl", rows(1)), "a/b")
        (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(("\n".join(rows(5000)) + "\n").encode())[:-2000])
        job = importer.wait(importer.start(tmp_path / "cut.jsonl.gz"))
        assert (job.state, job.failed) == ("done", 1)
        assert "cannot be read further" in job.errors[0][1]
        assert 0 < job.added < 5000


def test_a_job_goes_on_where_it_was_stopped(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_import, "BATCH_DOCUMENTS", 10)
    path = write(tmp_path / "in.jsonl", [*rows(300), *BAD])
    rounds = 0
    state = ""
    while state != "done":
        rounds += 1
        assert rounds < 100
        with Library(folder) as library, Importer(library) as importer:
            number = importer.start(path)
            assert number == 1, "the same job goes on"
            before = importer.job(number).done
            time.sleep(0.01)
            importer.stop()
            job = importer.job(number)
            state = job.state
            assert len(library.entries(limit=1000)) == job.added
            assert before <= job.done <= 306
    assert (job.done, job.added, job.failed) == (306, 300, 6)
    assert rounds > 1
    with Library(folder) as library, Importer(library) as importer:
        assert importer.resume(1) == 1
        path.write_text("other\n")
        assert importer.start(path) == 2, "another file of the same name is another job"


KILLED = """
import sys
from retro_engine.library import importer as library_import
from retro_engine.library.library import Library
library_import.BATCH_DOCUMENTS = 5
with Library(sys.argv[1]) as library, library_import.Importer(library) as importer:
    number = importer.start(sys.argv[2])
    print("started", flush=True)
    importer.wait(number)
"""


def test_kills_leave_no_row_out_and_none_half(folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", rows(2000))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for kill in range(2):
        program = [sys.executable, "-c", KILLED, str(folder), str(path)]
        with subprocess.Popen(program, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"
            time.sleep(0.2 + 0.1 * kill)
            process.send_signal(signal.SIGKILL)
        with Library(folder) as library, Importer(library) as importer:
            job = importer.job(1)
            assert job.state in ("interrupted", "done")
            assert (
                library.statistics()["namespaces"].get("default", {"documents": 0})["documents"]
                == job.added
                == job.done
            )
            library.verify()
    with Library(folder) as library, Importer(library) as importer:
        job = importer.wait(importer.start(path)) if job.state != "done" else job
        assert (job.number, job.state, job.added) == (1, "done", 2000)
        assert library.search("row1999x", 1)[0].document == "d1999"


def test_a_full_disk_fails_the_job_and_it_goes_on(tmp_path: Path, small_store: Store) -> None:
    path = write(tmp_path / "in.jsonl", rows(4000))
    with small_disk(tmp_path, "1500k") as disk:
        Library.create(disk / "library", small_store.tokenizer, 16)
        ballast = disk / "ballast"
        ballast.write_bytes(b"x" * 400_000)
        with Library(disk / "library", delta_chunks=10**6) as library, Importer(library) as importer:
            job = importer.wait(importer.start(path))
            assert job.state in ("failed", "running"), "there may be no room to write that it failed"
            assert library.statistics()["namespaces"].get("default", {"documents": 0})["documents"] == job.added
            importer.stop()
        ballast.unlink()
        with Library(disk / "library", delta_chunks=10**6) as library, Importer(library) as importer:
            again = importer.wait(importer.start(path))
            assert again.number == job.number
            assert again.done >= job.done
            assert library.statistics()["namespaces"]["default"]["documents"] == again.added


def test_a_stream_that_nobody_could_read_is_not_done(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was called done with one bad row, and what had been sent was removed."""
    with Library(folder) as library, Importer(library) as importer:
        with monkeypatch.context() as patch:

            def fail(path: Path) -> None:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

            patch.setattr(inputs.files, "open_file", fail)
            job = importer.wait(importer.start(io.BytesIO("\n".join(rows(3)).encode())))
        assert (job.state, job.done) == ("failed", 0)
        assert "Too many open files" in job.reason
        importer.recover()
        job = importer.wait(job.number)
        assert (job.state, job.done, job.added, job.failed) == ("done", 3, 3, 0)


def test_streams_that_a_killed_process_left_go_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kept stream goes on by itself, a file goes on when it is named again, and what no job names is removed."""
    monkeypatch.setattr(library_import, "BATCH_DOCUMENTS", 5)
    path = write(tmp_path / "in.jsonl", rows(600))
    kept = folder / "imports"
    with Library(folder) as library, Importer(library) as importer:
        numbers = [importer.start(io.BytesIO(path.read_bytes()), "streams"), importer.start(path, "files")]
        importer.stop()  # the rows say "running", as after a kill
        assert [importer.job(number).state for number in numbers] == ["running", "running"]
    old, new = kept / f"{'0' * 16}.jsonl", kept / f".{'1' * 16}.jsonl.tmp"
    for stale in (old, new):
        stale.write_text("{}\n")
    os.utime(old, (0, 0))
    with Library(folder) as library, Importer(library) as importer:
        importer.recover()
        job = importer.wait(numbers[0])
        assert (job.state, job.added) == ("done", 600)
        assert importer.job(numbers[1]).state == "interrupted"
        assert [file.name for file in kept.iterdir()] == [new.name], "on its way, perhaps"
        assert importer.wait(importer.start(path, "files")).added == 600
    with Library(folder) as library, Importer(library) as importer:  # a stream that is gone
        number = importer.start(io.BytesIO(path.read_bytes()), "gone")
        importer.stop()
        Path(importer.job(number).path).unlink()
    with Library(folder) as library, Importer(library) as importer:
        importer.recover()
        assert importer.job(number).state == "interrupted"


def interrupted_stream(folder: Path) -> int:
    """A stream that was acknowledged, and the server stopped."""
    raw = ("\n".join(rows(500)) + "\n").encode()
    with Library(folder) as library, Importer(library) as importer:
        number = importer.start(io.BytesIO(raw))
        importer.stop()
    return number


def test_a_stream_goes_on_in_a_library_that_was_moved(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs name streams by their place in the library; those of earlier versions by a whole path."""
    monkeypatch.setattr(library_import, "BATCH_DOCUMENTS", 5)
    for is_old in (False, True):
        number = interrupted_stream(folder)
        (stream,) = (folder / "imports").iterdir()
        connection = apsw.Connection(str(folder / "documents.sqlite"))
        (path,) = connection.execute("SELECT path FROM jobs WHERE number = ?", (number,)).fetchone()  # type: ignore[misc]
        assert path == f"imports/{stream.name}"
        if is_old:
            connection.execute("UPDATE jobs SET path = ? WHERE number = ?", (str(stream), number))
        connection.close()
        moved = tmp_path / f"moved{is_old}"
        shutil.copytree(folder, moved, copy_function=shutil.copyfile)  # also loses the time of change
        shutil.rmtree(folder)
        with Library(moved) as library, Importer(library) as importer:
            importer.recover()
            job = importer.wait(number)
            assert (job.state, job.added) == ("done", 500), job
            assert list((moved / "imports").iterdir()) == []
        folder = moved


def test_jobs_of_a_crafted_library_remove_and_read_nothing_elsewhere(folder: Path, tmp_path: Path) -> None:
    precious = write(tmp_path / "precious.jsonl", rows(3))
    (tmp_path / "imports").mkdir()
    other = write(tmp_path / "imports" / f"{'a' * 16}.jsonl", rows(3))
    (folder / "imports").mkdir()
    link = folder / "imports" / f"{'b' * 16}.jsonl"
    link.symlink_to(precious)
    stray = write(folder / "imports" / "notes.jsonl", rows(1))
    os.utime(stray, (0, 0))
    insert = "INSERT INTO jobs (path, size, modified, namespace, state, done, added, failed, reason) VALUES (?, ?, 0, 'default', 'interrupted', 0, 0, 0, '')"
    names = [
        precious,
        other,
        f"imports/../../{precious.name}",
        f"../imports/{other.name}",
        "imports/..",
        f"imports/{link.name}",
    ]
    with Library(folder) as library, Importer(library) as importer:
        with library.locked_transaction() as connection:
            for name in names:
                connection.execute(insert, (str(name), precious.stat().st_size))
        importer.recover()
        for job in importer.jobs():
            importer.wait(job.number)
        assert library.entries() == [], "a link shows files of others"
        assert precious.is_file()
        assert other.is_file()
        assert stray.is_file()
    shutil.rmtree(folder / "imports")
    (folder / "imports").symlink_to(tmp_path / "imports")
    with Library(folder) as library, Importer(library) as importer:
        with pytest.raises(StoreError, match="imports is a link"):
            importer.recover()
        with pytest.raises(StoreError, match="imports is a link"):
            importer.start(io.BytesIO(b"{}\n"))
    assert other.is_file()


def test_many_bad_rows_are_counted_and_the_first_told(folder: Path, tmp_path: Path) -> None:
    """4 MB of them made a library of 287 MB."""
    path = tmp_path / "bad.jsonl"
    path.write_text("[1]\n" * 20_000 + '{"id": "' + "x" * 5000 + '", "text": "long"}\n')
    database = folder / "documents.sqlite"
    with Library(folder) as library, Importer(library) as importer:
        job = importer.wait(importer.start(path))
        assert (job.state, job.failed, len(job.errors)) == ("done", 20_001, 100)
        assert job.errors[-1][0] == f"{path}:100"
    assert database.stat().st_size < 1 << 20
    connection = apsw.Connection(str(database))  # as earlier versions did
    connection.execute("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000) "
                       "INSERT INTO job_errors SELECT 1 + i % 2, i, printf('%.200c', 'x') FROM n")  # fmt: skip
    connection.close()
    large = database.stat().st_size
    assert large > 4 << 20
    with Library(folder) as library, Importer(library) as importer:
        assert len(importer.job(1).errors) == 100
        assert importer.job(1).errors == job.errors
        library.reset()
    assert database.stat().st_size < 1 << 20, "reset gives the space back"


def test_a_job_whose_thread_meets_a_bug_has_failed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Library(folder) as library, Importer(library) as importer:
        monkeypatch.setattr(importer, "_write", lambda *_: 1 // 0)
        monkeypatch.setattr(threading, "excepthook", lambda _: None)
        job = importer.wait(importer.start(write(tmp_path / "in.jsonl", rows(1))))
        assert (job.state, job.reason.split(":")[0]) == ("failed", "ZeroDivisionError")
