"""Bulk import: every good row once, every bad row with its reason, whatever stops it."""

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import WORDS, small_disk

from retro_engine.data.store import Store
from retro_engine.errors import MissingInputError, UsageError
from retro_engine.retrieval import library_import
from retro_engine.retrieval.library import Library
from retro_engine.retrieval.library_import import Importer

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
from retro_engine.retrieval import library_import
from retro_engine.retrieval.library import Library
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


def test_streams_that_a_killed_process_left_go_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kept stream goes on by itself, a file goes on when it is named again, and what no job names is removed."""
    monkeypatch.setattr(library_import, "BATCH_DOCUMENTS", 5)
    path = write(tmp_path / "in.jsonl", rows(2000))
    kept = folder / "imports"
    with Library(folder) as library, Importer(library) as importer:
        numbers = [importer.start(io.BytesIO(path.read_bytes()), "streams"), importer.start(path, "files")]
        importer.stop()  # the rows say "running", as after a kill
        assert [importer.job(number).state for number in numbers] == ["running", "running"]
    old, new = kept / "old.jsonl", kept / ".new.jsonl.tmp"
    for stale in (old, new):
        stale.write_text("{}\n")
    os.utime(old, (0, 0))
    with Library(folder) as library, Importer(library) as importer:
        importer.recover()
        job = importer.wait(numbers[0])
        assert (job.state, job.added) == ("done", 2000)
        assert importer.job(numbers[1]).state == "interrupted"
        assert [file.name for file in kept.iterdir()] == [new.name], "on its way, perhaps"
        assert importer.wait(importer.start(path, "files")).added == 2000
    with Library(folder) as library, Importer(library) as importer:  # a stream that is gone
        number = importer.start(io.BytesIO(path.read_bytes()), "gone")
        importer.stop()
        Path(importer.job(number).path).unlink()
    with Library(folder) as library, Importer(library) as importer:
        importer.recover()
        assert importer.job(number).state == "interrupted"
