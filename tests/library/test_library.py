"""The live library: what is acknowledged stays, what is deleted is gone, whatever happens at the same time."""

import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import apsw
import numpy as np
import pytest
from helpers import WORDS, read_only_copy, small_disk
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from retro_engine.data import files
from retro_engine.data.corpus import Document
from retro_engine.data.store import Store
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import MissingInputError, OutOfResourceError, StoreError, UsageError
from retro_engine.library.documents import HashEmbedder
from retro_engine.library.file import FILE, is_made, typed_errors
from retro_engine.library.library import Library

TESTS = Path(__file__).parents[1]
IS_CAMPAIGN = bool(os.environ.get("RETRO_CAMPAIGN"))


@pytest.fixture
def folder(tmp_path: Path, small_store: Store) -> Path:
    """An empty library with vectors, in chunks of 8 tokens that overlap by 4."""
    path = tmp_path / "library"
    Library.create(path, small_store.tokenizer, 8, 4, HashEmbedder(small_store.tokenizer))
    return path


def documents(count: int, seed: int = 0) -> list[Document]:
    rng = np.random.default_rng(seed)
    return [
        Document(f"d{i}", f"Title {i}", " ".join([*rng.choice(WORDS, int(rng.integers(1, 40))), f"only{i}x"]))
        for i in range(count)
    ]


def found(library: Library, text: str, k: int = 1000, **settings: Any) -> set[str]:
    return {hit.document for hit in library.search(text, k, **settings)}


def test_nothing_is_compiled_to_search_an_empty_library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server without documents takes neither numba's memory nor its half second."""
    with Library(folder) as library:
        library.add(documents(1))
        library.delete(["d0"])
        monkeypatch.setattr(type(library.file.analyzer), "query", lambda *_: pytest.fail("there is nothing to find"))
        for mode in ("lexical", "dense", "hybrid"):
            assert library.find("river", 5, mode) == []


def test_a_tokenizer_that_is_open_is_taken_where_it_is_the_same(folder: Path, small_store: Store) -> None:
    other = Tokenizer(small_store.tokenizer.json.replace("|pad|", "|gap|"))
    with Library(folder, tokenizer=small_store.tokenizer) as library:
        assert library.chunker.tokenizer is library.file.tokenizer is small_store.tokenizer
    with Library(folder, tokenizer=other) as library:
        assert library.file.tokenizer is not other
        assert library.file.tokenizer.json == small_store.tokenizer.json


def test_add_replace_delete_reset(folder: Path) -> None:
    with Library(folder) as library:
        assert library.search("anything") == []
        assert library.add(documents(10)) == 1
        assert library.add([Document("d3", "New", "quite another thing"), Document("e", "", "second quarry")]) == 2
        assert library.get("d3") == Document("d3", "New", "quite another thing")
        assert found(library, "quarry") == {"e"}
        assert found(library, "another") == {"d3"}
        assert library.delete(["d3", "unknown", "e"]) == 2
        assert library.get("d3") is None
        for mode in ("lexical", "dense", "hybrid"):
            assert not found(library, "another quarry", mode=mode) & {"d3", "e"}
        assert library.version == 3
        assert library.statistics()["namespaces"]["default"]["documents"] == 9
        assert library.reset() == 9
        assert library.search("river", 5, "dense") == []
        assert library.statistics()["namespaces"] == {}
        library.add(documents(1))
        assert library.version == 5
        library.verify()
    with Library(folder) as library:
        assert library.version == 5
        assert [entry.id for entry in library.entries()] == ["d0"]


def test_the_last_of_equal_ids_in_a_batch_stays(folder: Path) -> None:
    with Library(folder) as library:
        library.add([Document("a", "", "first"), Document("a", "", "second")])
        assert library.get("a") == Document("a", "", "second")
        assert found(library, "first") == set()
        library.verify()


def test_a_hit(folder: Path) -> None:
    text = "river stone amber lantern orchard harbor winter copper thistle meadow falcon ember willow granite cedar"
    with Library(folder) as library:
        library.add([Document("a", "The title", text)])
        tokenizer = library.file.tokenizer
        ids = [*tokenizer.encode(text), tokenizer.eod_id]
        hits = library.search("orchard harbor", 3)
        assert hits, "it is there"
        for hit in hits:
            start = 4 * hit.chunk
            assert (hit.document, hit.title, hit.source) == ("a", "The title", "library")
            assert hit.text == tokenizer.decode(ids[start : start + 8])
            assert hit.continuation == tokenizer.decode(ids[start + 8 : start + 16])
        assert "orchard" in hits[0].text
        chunks = sorted(hit.chunk for hit in library.search("river stone amber lantern willow granite cedar", 100))
        assert len(chunks) > 1
        assert all(b - a >= 2 for a, b in zip(chunks, chunks[1:])), "chunks that overlap better ones are left out"


def test_listing_in_pages(folder: Path) -> None:
    with Library(folder) as library:
        library.add(documents(25))
        pages: list[list[str]] = []
        while page := library.entries(after=pages[-1][-1] if pages else "", limit=10):
            pages.append([entry.id for entry in page])
        assert [len(page) for page in pages] == [10, 10, 5]
        assert sum(pages, []) == sorted(f"d{i}" for i in range(25))
        for limit in (0, -1, 1001):
            with pytest.raises(UsageError, match="limit"):
                library.entries(limit=limit)


def test_namespaces_do_not_see_each_other(folder: Path) -> None:
    with Library(folder, delta_chunks=8) as library:
        library.add([Document("a", "", "shared words here")], "one")
        library.add([Document("a", "", "shared words there"), Document("b", "", "other")], "two")
        alone = library.search("shared", 5, namespace="one")
        library.merge(is_all=True)
        assert library.search("shared", 5, namespace="one") == alone
        assert library.get("a", "two") == Document("a", "", "shared words there")
        assert found(library, "here there other", namespace="one", mode="dense") == {"a"}
        assert library.search("shared", 5, namespace="three") == []
        library.reset("one")
        assert library.get("a", "one") is None
        assert found(library, "shared", namespace="two") == {"a"}
        library.verify()


def test_all_of_a_batch_or_none(folder: Path) -> None:
    with Library(folder) as library:
        with pytest.raises(UsageError, match="is empty"):
            library.add([*documents(5), Document("bad", "", " ")])
        assert (library.version, library.entries()) == (0, [])
        with pytest.raises(UsageError, match="not allowed"):
            library.delete(["a\n"])


def test_queries_that_are_refused(folder: Path) -> None:
    with Library(folder) as library:
        library.add(documents(3))
        for text, k in (("", 1), ("x" * 1_000_000, 1), ("river", 0), ("river", -3)):
            with pytest.raises(UsageError):
                library.search(text, k)
        with pytest.raises(UsageError, match=r"did you mean lexical"):
            library.search("river", 1, "lexicall")
        for weights in ((0, 0), (-1, 2), (float("nan"), 1), (1,)):
            with pytest.raises(UsageError, match="weights"):
                library.search("river", 1, "hybrid", weights=weights)
        assert len(found(library, "river", 10**9, mode="dense")) == 3, "k above the size gives all there is"
        assert library.search("the of", 5) == [], "nothing but stop words"
        with pytest.raises(UsageError, match="namespace"):
            library.search("river", namespace="a/b")


def test_opening_what_cannot_be(folder: Path, small_store: Store, tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="is not a library"):
        Library(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(UsageError, match="holds a library"):
        Library.create(folder, small_store.tokenizer)
    for chunk_size, stride in ((0, None), (1 << 16, None), (8, 9), (8, 0)):
        with pytest.raises(UsageError, match="cannot be used"):
            Library.create(tmp_path / "x", small_store.tokenizer, chunk_size, stride)
    database = folder / "documents.sqlite"
    for pragma, why in (("user_version = 4", "has version 4"), ("application_id = 7", "not a library of retro-engine")):
        changed = tmp_path / pragma.split()[0]
        changed.mkdir()
        connection = apsw.Connection(str(database))
        connection.execute(f"VACUUM INTO '{changed / 'documents.sqlite'}'")
        connection.close()
        connection = apsw.Connection(str(changed / "documents.sqlite"))
        connection.execute(f"PRAGMA {pragma}")
        connection.close()
        with pytest.raises(StoreError, match=why):
            Library(changed)
    for content in (b"", b"not a database, but long enough to be looked at by SQLite" * 100):
        broken = tmp_path / f"broken{len(content)}"
        broken.mkdir()
        (broken / "documents.sqlite").write_bytes(content)
        with pytest.raises((StoreError, MissingInputError), match="damaged|never finished"):
            Library(broken)


class Other:
    name = "other"

    def encode(self, texts: list[str]) -> np.ndarray:
        return np.ones((len(texts), 3), np.float32)


def test_embedders(folder: Path, tmp_path: Path, small_store: Store) -> None:
    with pytest.raises(StoreError, match=r"made with embedder hash\n.*other"):
        Library(folder, Other())
    Library.create(tmp_path / "o", small_store.tokenizer, 8, embedder=Other())
    with Library(tmp_path / "o", Other()) as library:
        library.add(documents(3))
        assert len(library.search("anything", 5, "dense")) == 5
    with Library(tmp_path / "o") as library:
        assert library.search("river stone amber", 1)
        for act in (lambda: library.search("river", 1, "dense"), lambda: library.add(documents(1))):
            with pytest.raises(UsageError, match="without its embedder"):
                act()
    Library.create(tmp_path / "plain", small_store.tokenizer, 8)
    with Library(tmp_path / "plain") as library:
        library.add(documents(3))
        with pytest.raises(UsageError, match="needs vectors"):
            library.search("river", 1, "hybrid")
    with pytest.raises(StoreError, match="made with no embedder"):
        Library(tmp_path / "plain", Other())


def test_one_process_at_a_time(folder: Path) -> None:
    code = f"from retro_engine.library.library import Library; Library({str(folder)!r})"
    with Library(folder):
        with pytest.raises(UsageError, match="in use"):
            Library(folder)
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "is in use" in other.stderr
    with Library(folder) as library:
        pass
    library.close()
    for act in (
        lambda: library.search("a"),
        lambda: library.add(documents(1)),
        lambda: library.entries(),
        library.merge,
    ):
        with pytest.raises(UsageError, match="is closed"):
            act()


def test_the_background_makes_segments(folder: Path) -> None:
    with Library(folder, delta_chunks=32) as library:
        for document in documents(60):
            library.add([document])
            assert document.id in found(library, f"only{document.id[1:]}x"), "a write is read by the next search"
        deadline = time.monotonic() + 20
        while (parts := library.statistics()["namespaces"]["default"])["delta"] >= 32 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert parts["segments"]
        assert parts["delta"] < 32
        library.delete([f"d{i}" for i in range(0, 60, 2)])
        for mode in ("lexical", "dense", "hybrid"):
            assert all(int(name[1:]) % 2 for name in found(library, "river stone", mode=mode))
        before = library.search("river stone amber", 20, "hybrid")
        version = library.version
        library.merge(is_all=True)
        parts = library.statistics()["namespaces"]["default"]
        assert (len(parts["segments"]), parts["delta"], parts["dead"]) == (1, 0, 0)
        assert library.version == version, "a merge changes nothing that can be asked for"
        assert library.search("river stone amber", 20, "hybrid") == before
        library.verify()
    assert len(list((folder / "segments").iterdir())) == 1
    with Library(folder) as library:
        assert library.search("river stone amber", 20, "hybrid") == before
        library.verify()


def test_merging_all_leaves_nothing_dead_in_a_segment_that_is_alone(folder: Path) -> None:
    with Library(folder) as library:
        library.add(documents(20))
        library.merge(is_all=True)
        library.delete([f"d{i}" for i in range(0, 20, 2)])
        before = library.search("river stone amber", 20)
        library.merge(is_all=True)
        parts = library.statistics()["namespaces"]["default"]
        assert (len(parts["segments"]), parts["delta"], parts["dead"]) == (1, 0, 0)
        assert library.search("river stone amber", 20) == before
        library.verify()


def test_a_library_that_has_lived_answers_as_a_fresh_one(folder: Path, tmp_path: Path, small_store: Store) -> None:
    rng = random.Random(0)
    everything = documents(80)
    with Library(folder, delta_chunks=24) as library:
        for number, document in enumerate(everything):
            library.add([Document(document.id, "", "an earlier text of it")])
            library.add([document])
            if number % 3 == 0:
                library.delete([rng.choice(everything).id])
        alive = [library.get(d.id) for d in everything if library.get(d.id)]
        Library.create(tmp_path / "fresh", small_store.tokenizer, 8, 4, HashEmbedder(small_store.tokenizer))
        with Library(tmp_path / "fresh") as fresh:
            fresh.add([d for d in alive if d is not None])
            for query in ("river stone", "amber only3x falcon", " ".join(WORDS)):
                for mode in ("lexical", "dense"):
                    ours, theirs = library.search(query, 50, mode), fresh.search(query, 50, mode)
                    assert [round(h.score, 5) for h in ours] == [round(h.score, 5) for h in theirs]
                    # equal scores may stand in another order, and at the end one of them may be cut off
                    last = round(ours[-1].score, 5)
                    both = [
                        {(h.document, h.chunk) for h in hits if round(h.score, 5) > last} for hits in (ours, theirs)
                    ]
                    assert mode == "dense" or both[0] == both[1] or len(both[0] ^ both[1]) <= 6


def test_damaged_segments_are_made_again(folder: Path) -> None:
    with Library(folder) as library:
        library.add(documents(20))
        library.merge()
        library.add([Document("d1", "", "replaced text"), Document("new", "", "another text")])
        before = library.search("river stone amber text", 30, "hybrid")
    (segment,) = (folder / "segments").iterdir()
    for name in sorted(path.name for path in segment.iterdir()):
        path = segment / name
        raw = path.read_bytes()
        path.unlink()
        path.write_bytes(raw[: len(raw) // 2])
        with Library(folder) as library:
            (note,) = library.statistics()["notes"]
            assert "was made again" in note
            after = library.search("river stone amber text", 30, "hybrid")
            assert [(h.document, h.chunk) for h in after] == [(h.document, h.chunk) for h in before]
            library.verify()
        with Library(folder) as library:
            assert library.statistics()["notes"] == []
        (segment,) = (folder / "segments").iterdir()


def test_flipped_bits_are_told(folder: Path) -> None:
    """Whatever byte of the file is changed: a typed error, or every answer as before."""
    with Library(folder) as library:
        library.add(documents(40))
        texts = {name: library.get(name) for name in (f"d{i}" for i in range(40))}
        before = library.search("river stone amber", 10, "hybrid")
    raw = (folder / "documents.sqlite").read_bytes()
    rng = random.Random(0)
    num_told = 0
    for _ in range(10_000 if IS_CAMPAIGN else 150):
        damaged = bytearray(raw)
        damaged[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        (folder / "documents.sqlite").write_bytes(bytes(damaged))
        try:
            with Library(folder) as library:
                library.verify()
                assert {name: library.get(name) for name in texts} == texts
                assert library.search("river stone amber", 10, "hybrid") == before
        except (StoreError, MissingInputError):
            num_told += 1
    assert num_told > 50


def test_a_flipped_bit_that_makes_null_or_renames_a_column(folder: Path) -> None:
    """Two of 10,000 flips did so, and were no StoreError once."""
    with Library(folder) as library:
        for value in (None, 7, 0.5):
            with pytest.raises(StoreError, match="document 3 has another checksum"):
                library.file.check(3, 0, value)
        with pytest.raises(StoreError, match="no such column"), typed_errors(folder / FILE):
            library.file.writer.execute("SELECT absent FROM documents")


def test_verifying_while_a_merge_removes_a_segment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The campaign met it once in 1,200 libraries."""
    with Library(folder) as library:
        library.add(documents(30))
        library.merge()
        library.delete(["d3"])
        read = files.read_manifest

        def after_a_merge(path: Path, kind: str) -> Any:
            monkeypatch.setattr(files, "read_manifest", read)
            library.merge(is_all=True)
            return read(path, kind)

        monkeypatch.setattr(files, "read_manifest", after_a_merge)
        library.verify()
        (segment,) = (folder / "segments").iterdir()
        (segment / "manifest.json").unlink()
        with pytest.raises(MissingInputError):
            library.verify()


def test_a_full_disk(tmp_path: Path, small_store: Store) -> None:
    with small_disk(tmp_path, "3m") as disk:
        Library.create(disk / "library", small_store.tokenizer, 8, 4, HashEmbedder(small_store.tokenizer))
        kept: list[str] = []
        with Library(disk / "library", delta_chunks=64) as library:

            def fill() -> None:
                for number in range(1000):
                    library.add([Document(f"a{number}", "", f"word{number} " + "river stone " * 100)])
                    kept.append(f"a{number}")

            with pytest.raises(OutOfResourceError, match="no space left"):
                fill()
            assert len(kept) > 3
            assert [e.id for e in library.entries(limit=1000)] == sorted(kept)
            assert found(library, f"word{len(kept) - 1}") == {kept[-1]}
            assert found(library, f"word{len(kept)}") == set()
        with Library(disk / "library") as library:
            assert [e.id for e in library.entries(limit=1000)] == sorted(kept)
            assert found(library, "word2") == {"a2"}


def test_readers_and_writers_at_once(folder: Path) -> None:
    """Each writer owns some ids: it reads its own writes, and nobody ever finds what was deleted before they asked."""
    errors: list[BaseException] = []
    gone: set[str] = set()  # words of documents whose deletion was acknowledged
    is_over = threading.Event()
    num_searches = [0]

    def write(owner: int) -> None:
        rng = random.Random(owner)
        try:
            for number in range(60 if IS_CAMPAIGN else 30):
                word = f"w{owner}x{number}"
                library.add([Document(f"{owner}-{number % 7}", "", f"{word} " + " ".join(rng.choices(WORDS, k=12)))])
                assert library.search(word, 1)[0].document == f"{owner}-{number % 7}"
                if rng.random() < 0.4:
                    library.delete([f"{owner}-{number % 7}"])
                    gone.add(word)
                    assert library.search(word, 1) == []
        except BaseException as error:
            errors.append(error)

    def read(seed: int) -> None:
        rng = random.Random(seed)
        try:
            while not is_over.is_set():
                dead = set(gone)
                for hit in library.search(
                    " ".join(rng.choices(WORDS, k=4)), 10, rng.choice(["lexical", "dense", "hybrid"])
                ):
                    assert not set(hit.text.split()) & dead, "a deleted document was returned"
                num_searches[0] += 1
        except BaseException as error:
            errors.append(error)

    with Library(folder, delta_chunks=64) as library:
        writers = [threading.Thread(target=write, args=(owner,)) for owner in range(4)]
        readers = [threading.Thread(target=read, args=(seed,)) for seed in range(60 if IS_CAMPAIGN else 4)]
        for thread in writers + readers:
            thread.start()
        for thread in writers:
            thread.join()
        is_over.set()
        for thread in readers:
            thread.join()
        assert not errors, errors[0]
        assert num_searches[0] > 10
        library.verify()


def test_what_a_version_counted_is_found(folder: Path) -> None:
    """Generation remembers neighbors under the version: one that ran ahead of its documents hid them for good."""
    errors: list[str] = []
    is_over = threading.Event()
    latest = {0: "", 1: ""}  # of each batch's version, a word that only it has

    def write() -> None:
        for number in range(30 if not IS_CAMPAIGN else 400):
            latest[library.version + 1] = f"batch{number}x"
            text = f"batch{number}x river stone"
            library.add([Document(f"{number}-{i}", "", text) for i in range(20)] + [Document("same", "", text)])
        is_over.set()

    def read() -> None:
        while not is_over.is_set() and not errors:
            version = library.version
            if version and not found(library, latest[version], 1):
                errors.append(f"version {version} does not find its documents")
            if version and len(found(library, "river", 10_000)) < 20 * version:
                errors.append(f"version {version} misses documents of earlier ones")

    def compare() -> None:
        """What GET answers is what a query answers that comes after it."""
        while not is_over.is_set() and not errors:
            document = library.get("same")
            if document is not None:
                word = document.text.split()[0]
                newest = library.get("same")
                if "same" not in found(library, word, 1000) and newest == library.get("same") == document:
                    errors.append(f"{word} is got and not found")
            if "same" not in found(library, "river", 10_000) and document is not None:
                errors.append("a document that is replaced is not found meanwhile")

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with Library(folder, delta_chunks=400) as library:
            threads = [threading.Thread(target=act) for act in (write, read, read, compare)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            library.verify()
    finally:
        sys.setswitchinterval(before)
    assert not errors, errors[0]


def test_reads_between_disk_and_snapshot_wait(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A document is got when it is found, and gone when it is no more found: the version goes with the snapshot."""
    with Library(folder) as library:
        library.add([Document("old", "", "some old text"), Document("same", "", "an early quarry")])
        show, is_written, may_show = library._index.show, threading.Event(), threading.Event()

        def late(*arguments: Any) -> None:
            is_written.set()
            assert may_show.wait(20)
            show(*arguments)

        monkeypatch.setattr(library._index, "show", late)
        changes = (
            lambda: library.add([Document("new", "", "a late arrival"), Document("same", "", "a late quarry")]),
            lambda: library.delete(["old", "new"]),
        )
        for number, change in enumerate(changes):
            is_written.clear(), may_show.clear()
            answers: dict[str, Any] = {}
            asks = {
                "get": lambda: [library.get(name) for name in ("old", "new")],
                "list": lambda: [entry.id for entry in library.entries()],
                "counts": lambda: library.statistics()["namespaces"]["default"]["documents"],
                "query": lambda: found(library, "quarry"),
            }
            writer = threading.Thread(target=change)
            writer.start()
            assert is_written.wait(20)
            assert library.version == 1 + number, "it is not seen yet"
            readers = [
                threading.Thread(target=lambda name, ask: answers.update({name: ask()}), args=item)
                for item in asks.items()
            ]
            for thread in readers:
                thread.start()
            time.sleep(0.05)
            assert not answers.keys() - ({"query"} if number else set()), "they tell of what no search finds"
            may_show.set()
            for thread in (writer, *readers):
                thread.join()
            new = [Document("old", "", "some old text"), Document("new", "", "a late arrival")]
            assert answers == {
                "get": [None, None] if number else new,
                "list": ["same"] if number else ["new", "old", "same"],
                "counts": 1 if number else 3,
                "query": {"same"},
            }
            assert library.version == 2 + number


def test_kills_lose_nothing_acknowledged(folder: Path) -> None:
    kills = 1000 if IS_CAMPAIGN else 12
    rng = random.Random(os.environ.get("RETRO_SEED", "0"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    state: dict[str, str] = {}
    program = [sys.executable, str(TESTS / "library_writer.py")]
    num_acknowledged = 0
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as zygote:
        assert zygote.stdin is not None
        assert zygote.stdout is not None
        for kill in range(kills):
            zygote.stdin.write(f"{folder} {kill}\n")
            zygote.stdin.flush()
            pending: dict[str, str | None] = {}
            pid = 0
            limit = rng.randrange(1, 40)
            for line in zygote.stdout:
                event = json.loads(line)
                pid = event.get("pid", pid)
                if "begin" in event:
                    pending = event["begin"]
                    limit -= 1
                    if limit == 0:
                        time.sleep(rng.random() * 0.004)
                        os.kill(pid, signal.SIGKILL)
                elif "end" in event:
                    state = applied(state, pending)
                    pending = {}
                    num_acknowledged += 1
                elif "ended" in event:
                    break
            with Library(folder, delta_chunks=16) as library:
                now = {entry.id: library.get(entry.id).text for entry in library.entries(limit=1000)}  # type: ignore[union-attr]
                assert now in (state, applied(state, pending)), f"kill {kill}: acknowledged changes were lost"
                state = now
                library.verify()
                for name in rng.sample(sorted(now), min(3, len(now))):
                    assert name in found(library, now[name].rsplit(" ", 1)[1])
        zygote.stdin.close()
    assert num_acknowledged > 5 * kills


def applied(state: dict[str, str], change: dict[str, str | None]) -> dict[str, str]:
    return {name: text for name, text in (state | change).items() if text is not None}


class LibraryMachine(RuleBasedStateMachine):
    """Any operations in any order, against a dict."""

    root: Path
    tokenizer: Tokenizer
    count = 0

    @initialize(embeds=st.booleans(), stride=st.sampled_from([4, 8]))
    def begin(self, embeds: bool, stride: int) -> None:
        LibraryMachine.count += 1
        self.folder = self.root / str(LibraryMachine.count)
        self.modes = ["lexical", "dense", "hybrid"] if embeds else ["lexical"]
        Library.create(self.folder, self.tokenizer, 8, stride, HashEmbedder(self.tokenizer) if embeds else None)
        self.library = Library(self.folder, delta_chunks=12)
        self.expected: dict[str, dict[str, str]] = {"default": {}, "other": {}}
        self.version = 0

    namespaces = st.sampled_from(["default", "default", "other"])
    ids = st.integers(0, 7).map("d{}".format)
    texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=30).map(" ".join)

    @rule(namespace=namespaces, batch=st.dictionaries(ids, texts, min_size=1, max_size=4))
    def add(self, namespace: str, batch: dict[str, str]) -> None:
        version = self.library.add([Document(name, "", text) for name, text in batch.items()], namespace)
        assert version == self.version + 1
        self.version += 1
        self.expected[namespace] |= batch

    @rule(namespace=namespaces, names=st.sets(ids, min_size=1, max_size=3))
    def delete(self, namespace: str, names: set[str]) -> None:
        there = names & self.expected[namespace].keys()
        assert self.library.delete(sorted(names), namespace) == len(there)
        self.version += 1
        for name in there:
            del self.expected[namespace][name]

    @rule(namespace=namespaces)
    def reset(self, namespace: str) -> None:
        assert self.library.reset(namespace) == len(self.expected[namespace])
        self.version += 1
        self.expected[namespace] = {}

    @rule(namespace=namespaces, words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=3), k=st.integers(1, 40))
    def search(self, namespace: str, words: list[str], k: int) -> None:
        expected = self.expected[namespace]
        for mode in self.modes:
            hits = self.library.search(" ".join(words), k, mode, namespace)
            assert len(hits) <= k
            assert len({(hit.document, hit.chunk) for hit in hits}) == len(hits)
            assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
            for hit in hits:
                assert hit.text.strip() in expected[hit.document]
        hits = self.library.search(words[0], 1000, "lexical", namespace)
        assert {hit.document for hit in hits} == {name for name, text in expected.items() if words[0] in text.split()}

    @rule(is_all=st.booleans())
    def merge(self, is_all: bool) -> None:
        self.library.merge(is_all)

    @rule()
    def open_again(self) -> None:
        self.library.close()
        self.library = Library(self.folder, delta_chunks=12)

    @invariant()
    def is_as_expected(self) -> None:
        assert self.library.version == self.version
        for namespace, expected in self.expected.items():
            assert {e.id for e in self.library.entries(namespace)} == expected.keys()
            for name in list(expected)[:2]:
                assert self.library.get(name, namespace) == Document(name, "", expected[name])

    def teardown(self) -> None:
        if hasattr(self, "library"):
            self.library.verify()
            self.library.close()


def test_any_operations_against_a_dict(tmp_path: Path, small_store: Store) -> None:
    LibraryMachine.root, LibraryMachine.tokenizer = tmp_path, small_store.tokenizer
    steps = 50
    run_state_machine_as_test(
        LibraryMachine,
        settings=settings(
            max_examples=(100_000 if IS_CAMPAIGN else 1000) // steps,
            stateful_step_count=steps,
            deadline=None,
            derandomize=not IS_CAMPAIGN,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_an_interrupt_between_disk_and_snapshot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on the disk is what is seen, also when the program is stopped between the two."""
    with Library(folder) as library:
        library.add(documents(3))

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(library._index, "show", stop)
            with pytest.raises(KeyboardInterrupt):
                library.add([Document("late", "", "a late arrival")])
        assert found(library, "arrival") == {"late"}
        assert library.version == 2
        library.verify()


def tampered(folder: Path, statement: str, *values: object) -> None:
    """What somebody else writes into a library's file."""
    connection = apsw.Connection(str(folder / FILE))
    connection.execute(statement, values)
    connection.close()


def listing(folder: Path) -> dict[str, bytes | None]:
    """Everything that lies in a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.name != "documents.sqlite")
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


def crafted_names(outside: Path) -> list[str]:
    return [
        str(outside),
        f"../../{outside.name}",
        "../imports",
        "..",
        ".",
        "",
        "00000001/..",
        "1",
        "00000001\n",
        "٠١٢٣٤٥٦٧",
    ]


@pytest.mark.parametrize("is_read_only", [True, False])
def test_a_crafted_library_removes_nothing_elsewhere(folder: Path, tmp_path: Path, is_read_only: bool) -> None:
    """The table of segments names folders; they were removed, wherever they were."""
    outside = tmp_path / "outside"
    for place in (outside, folder / "imports"):
        place.mkdir()
        (place / "precious").write_text("all that I have")
    with Library(folder) as library:
        library.add(documents(5))
    before = {**listing(outside), **listing(folder)}
    for number, name in enumerate(crafted_names(outside)):
        row = (name, "default", 1 + number % 2, 5, "0" * 64)
        tampered(folder, "INSERT OR REPLACE INTO segments VALUES (?, ?, ?, ?, ?)", *row)
        with Library(folder, is_read_only=is_read_only) as library:
            assert len(library.entries()) == 5
            assert found(library, "only3x") == {"d3"}
        assert listing(outside).items() <= before.items()
        assert (folder / "imports" / "precious").is_file()
        if is_read_only:
            assert {**listing(outside), **listing(folder)} == before, "reading writes nothing at all"
    if not is_read_only:
        with Library(folder) as library:
            library.verify()
            library.reset()
        assert (outside / "precious").is_file()


def test_links_in_a_library_are_refused(folder: Path, tmp_path: Path, small_store: Store) -> None:
    with Library(folder) as library:
        library.add(documents(5))
    outside = tmp_path / "outside"
    (outside / "00000007").mkdir(parents=True)
    (outside / "00000007" / "precious").write_text("mine")
    (outside / "file").write_text("mine")
    before = listing(outside)
    (folder / "segments").symlink_to(outside)
    for is_read_only in (True, False):
        with pytest.raises(StoreError, match="segments is a link"):
            Library(folder, is_read_only=is_read_only)
    (folder / "segments").unlink()
    (folder / "segments").mkdir()
    (folder / "segments" / "00000009").symlink_to(outside)
    with Library(folder) as library:
        library.merge()
    (folder / ".lock").unlink()
    for target in ("file", "nothing"):
        (folder / ".lock").symlink_to(outside / target)
        for is_read_only in (True, False):
            with pytest.raises(StoreError, match=r"\.lock is a link"):
                Library(folder, is_read_only=is_read_only)
        (folder / ".lock").unlink()
    assert listing(outside) == before
    shutil.move(folder / FILE, outside / "mine")
    (folder / FILE).symlink_to(outside / "mine")
    before = listing(outside)
    for is_read_only in (True, False):
        with pytest.raises(StoreError, match=r"documents\.sqlite is a link"):
            Library(folder, is_read_only=is_read_only)
    (tmp_path / "new").mkdir()
    (outside / "empty").touch()
    (tmp_path / "new" / FILE).symlink_to(outside / "empty")
    with pytest.raises(StoreError, match=r"documents\.sqlite is a link"):
        Library.create(tmp_path / "new", small_store.tokenizer)
    assert (outside / "empty").read_bytes() == b""


def test_a_pipe_with_the_name_of_a_segment_is_not_waited_for(folder: Path) -> None:
    with Library(folder) as library:
        library.add(documents(5))
        library.merge()
        (name,) = (path.name for path in (folder / "segments").iterdir())
    shutil.rmtree(folder / "segments" / name)
    for pipe in (name, "00000009"):
        os.mkfifo(folder / "segments" / pipe)
    with Library(folder) as library:
        assert found(library, "only3x") == {"d3"}
        library.reset()


def test_another_programs_file_stays_as_it_is(folder: Path, tmp_path: Path, small_store: Store) -> None:
    """Also its journal mode, which is written into it."""
    (tmp_path / "other").mkdir()
    path = tmp_path / "other" / FILE
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE notes (text)")
    before = path.read_bytes()
    assert is_made(tmp_path / "other")
    with pytest.raises(StoreError, match="not a library of retro-engine"):
        Library(tmp_path / "other")
    with pytest.raises(UsageError, match="holds another"):
        Library.create(tmp_path / "other", small_store.tokenizer)
    assert path.read_bytes() == before


def test_a_library_whose_making_was_killed_is_made(tmp_path: Path, small_store: Store) -> None:
    for name, content in (("nothing", b""), ("no schema", None)):
        folder = tmp_path / name
        folder.mkdir()
        if content is None:
            with contextlib.closing(sqlite3.connect(folder / FILE)) as connection:
                connection.execute("PRAGMA journal_mode = WAL")
        else:
            (folder / FILE).write_bytes(content)
        assert not is_made(folder)
        with pytest.raises(MissingInputError, match="never finished"):
            Library(folder)
        Library.create(folder, small_store.tokenizer)
        assert is_made(folder)
        Library(folder).close()


def test_a_journal_that_names_another_file(folder: Path, tmp_path: Path) -> None:
    """SQLite removes the file that such a journal names as the journal of several databases."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    name = str(precious).encode()
    checksum = sum(name) & 0xFFFFFFFF
    magic = bytes.fromhex("d9d505f920a163d7")
    header = magic + bytes(4) + bytes(4) + (1).to_bytes(4, "big") + (512).to_bytes(4, "big") + (4096).to_bytes(4, "big")
    lock_page = ((1 << 30) // 4096 + 1).to_bytes(4, "big")
    record = lock_page + name + len(name).to_bytes(4, "big") + checksum.to_bytes(4, "big") + magic
    tampered(folder, "PRAGMA journal_mode = DELETE")
    journal = folder / "documents.sqlite-journal"
    for is_read_only in (True, False):
        journal.write_bytes(header.ljust(512, b"\0") + record)
        with pytest.raises(StoreError, match="names another file"):
            Library(folder, is_read_only=is_read_only)
        assert precious.is_file()
    journal.unlink()
    for end in ("-wal", "-shm", "-journal"):
        os.mkfifo(folder / f"documents.sqlite{end}")
        with pytest.raises(StoreError, match="is a pipe"):
            Library(folder)
        (folder / f"documents.sqlite{end}").unlink()


def test_reading_alone(folder: Path) -> None:
    """Nothing is written or made again; several read at once, and a writer waits for them."""
    with Library(folder) as library:
        library.add(documents(20))
        library.merge()
        library.add([Document("d1", "", "replaced text"), Document("new", "", "another text")])
        before = library.search("river stone amber text", 30, "hybrid")
    (segment,) = (folder / "segments").iterdir()
    (segment / "keys.npy").unlink()
    (folder / "segments" / "00000077").mkdir()  # of a merge that was killed
    there = listing(folder)
    with Library(folder, is_read_only=True) as library, Library(folder, is_read_only=True) as other:
        assert library.get("new") == other.get("new") == Document("new", "", "another text")
        assert library.search("river stone amber text", 30, "hybrid") == before
        (note,) = library.statistics()["notes"]
        assert "searched one by one" in note
        with pytest.raises(StoreError, match="keys.npy"):
            library.verify()
        for act in (lambda: library.add(documents(1)), lambda: library.delete(["d1"]), library.reset):
            with pytest.raises(UsageError, match="open for reading"):
                act()
        with pytest.raises(UsageError, match="is in use"):
            Library(folder)
    assert listing(folder) == there
    with Library(folder) as library, pytest.raises(UsageError, match="is in use"):
        Library(folder, is_read_only=True)
    with Library(folder, is_read_only=True) as library:
        library.verify()
        assert library.search("river stone amber text", 30, "hybrid") == before


def test_reading_where_nothing_can_be_written(folder: Path, tmp_path: Path) -> None:
    with Library(folder) as library:
        library.add(documents(3))
        shutil.copytree(folder, tmp_path / "killed")  # its log is not in the file yet
    (folder / ".lock").unlink()
    with read_only_copy(folder, tmp_path / "a") as copy, Library(copy, is_read_only=True) as library:
        assert found(library, "only2x") == {"d2"}
        library.verify()
    with Library(tmp_path / "killed", is_read_only=True) as library:
        assert found(library, "only2x") == {"d2"}
    for name in ("documents.sqlite-shm", ".lock"):
        (tmp_path / "killed" / name).unlink(missing_ok=True)
    with read_only_copy(tmp_path / "killed", tmp_path / "b") as copy:
        with pytest.raises(MissingInputError, match="cannot be read where it is"):
            Library(copy, is_read_only=True)
        with pytest.raises((UsageError, MissingInputError)):
            Library(copy)


def test_a_foreign_schema_is_refused(folder: Path) -> None:
    """A trigger or a view would run what its maker wants."""
    tampered(folder, "CREATE TABLE own (x)")
    with pytest.raises(StoreError, match="its tables are others"):
        Library(folder)
    tampered(folder, "DROP TABLE own")
    tampered(folder, "CREATE TRIGGER t AFTER INSERT ON documents BEGIN DELETE FROM documents; END")
    for is_read_only in (True, False):
        with pytest.raises(StoreError, match="its tables are others"):
            Library(folder, is_read_only=is_read_only)


def test_stray_files_do_not_end_merging(folder: Path) -> None:
    (folder / "segments").mkdir()
    for name in ("notes.txt", ".DS_Store", "00000001.bak", "٠٠٠٠٠٠٠١"):
        (folder / "segments" / name).write_text("mine")
    (folder / "segments" / "99999999").mkdir()  # the last name there is, of a merge that was killed
    with Library(folder) as library:
        (folder / "segments" / "99999999").mkdir()
        library.add(documents(10))
        library.merge()
        assert library.is_merging
        assert library.statistics()["merging"] == "yes"
        assert sum("is left alone" in note for note in library.statistics()["notes"]) == 4
        library.verify()
        assert found(library, "only3x") == {"d3"}
    assert sorted(path.name for path in (folder / "segments").iterdir())[:2] == [".DS_Store", "00000001"]
    with Library(folder) as library:
        assert library.statistics()["namespaces"]["default"]["segments"], "it is found again"
        assert (folder / "segments" / "notes.txt").is_file()


def test_a_merging_thread_that_died_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with Library(folder, delta_chunks=4) as library:
        merge = library._index._merge
        monkeypatch.setattr(library._index, "_merge", lambda *_: 1 // 0)
        library.add(documents(10))
        library._index._thread.join(20)
        assert not library.is_merging
        assert "ZeroDivisionError" in library.statistics()["merging"]
        assert "ZeroDivisionError" in library.statistics()["notes"][0]
        with pytest.raises(StoreError, match="merges no more"):
            library.verify()
        library.add(documents(12))
        assert found(library, "only11x") == {"d11"}, "it serves on"
        monkeypatch.setattr(library._index, "_merge", merge)


def test_vacuum_gives_space_back(folder: Path) -> None:
    with Library(folder) as library:
        library.add([Document(f"d{i}", "x" * 4096, f"only{i}x river stone") for i in range(400)])
        library.delete([f"d{i}" for i in range(1, 400)])
        version = library.version
        assert library.vacuum() > 1 << 20
        assert library.version == version
        assert found(library, "river") == {"d0"}
        library.verify()
        assert (folder / FILE).stat().st_size < 1 << 20
        library.add([Document("later", "", "a later quarry")])
    with Library(folder) as library:
        assert found(library, "quarry") == {"later"}
        library.verify()
    with Library(folder, is_read_only=True) as library:
        for act in (library.vacuum, library.merge):
            with pytest.raises(UsageError, match="open for reading"):
                act()


@pytest.mark.parametrize(
    ("column", "value"), [("title", "'Another'"), ("chunks", "9"), ("num_tokens", "2"), ("bytes", "3")]
)
def test_what_a_list_shows_has_a_checksum(folder: Path, column: str, value: str) -> None:
    with Library(folder) as library:
        library.add(documents(3))
    with contextlib.closing(sqlite3.connect(folder / FILE)) as raw, raw:
        raw.execute(f"UPDATE documents SET {column} = {value} WHERE id = 'd1'")
    with pytest.raises(StoreError, match=r"documents\.sqlite is damaged"), Library(folder) as library:
        library.entries()


def test_a_disk_that_fails_and_a_file_that_may_not_be_read_are_no_damage(folder: Path) -> None:
    with pytest.raises(OutOfResourceError, match="cannot be read or written") as raised, typed_errors(folder / FILE):
        raise apsw.exception_for(10 | 1 << 8)
    assert (raised.value.exit_code, "IOERR_READ" in raised.value.why) == (5, True)
    with pytest.raises(OutOfResourceError, match="could not be read"), typed_errors(folder / FILE):
        raise apsw.CorruptError("database disk image is malformed")  # as SQLite calls an EIO; and all of it is whole
    with pytest.raises(MissingInputError, match="let it and its folder be read"), typed_errors(folder / FILE):
        raise apsw.ReadOnlyError("attempt to write a readonly database")
    with pytest.raises(UsageError, match="in use"), typed_errors(folder / FILE):
        raise apsw.BusyError("database is locked")
    raw = bytearray((folder / FILE).read_bytes())
    raw[4096:8192] = b"\xff" * 4096
    (folder / FILE).write_bytes(raw)
    with pytest.raises(StoreError, match="is damaged"), typed_errors(folder / FILE):
        raise apsw.CorruptError("database disk image is malformed")
