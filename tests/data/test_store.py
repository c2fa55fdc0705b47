"""The chunk store: what was written is read, whatever the sizes; damage and mixtures are refused."""

import contextlib
import json
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import as_version_0
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_engine.data import files
from retro_engine.data.contents import content_mark
from retro_engine.data.corpus import Document
from retro_engine.data.loader import NeighborLoader
from retro_engine.data.store import Store, StoreWriter
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import OutOfResourceError, RetroError, StoreError, UsageError

TOKENIZER = Tokenizer.train(["a tiny corpus of a few words"], 300)


def write(folder: Path, texts: list[str], chunk_size: int = 8, shard_rows: int = 1 << 18) -> Store:
    writer = StoreWriter(folder, TOKENIZER, chunk_size, shard_rows)
    for number, text in enumerate(texts):
        writer.add(Document(f"id{number}", f"title {number}", text, f"f:{number}"), TOKENIZER.encode(text))
    return writer.close()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=60), min_size=1, max_size=12), st.integers(1, 20), st.integers(1, 9))
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], m: int, shard_rows: int
) -> None:
    store = write(tmp_path_factory.mktemp("s") / "store", texts, m, shard_rows)
    assert store.num_documents == len(texts)
    assert store.counts["bytes"] == sum(len(text.encode()) for text in texts)
    for document, text in enumerate(texts):
        first, end = store.document_rows(document)
        tokens, lengths = store.rows(first, end)
        ids = [int(t) for row, n in zip(tokens, lengths) for t in row[:n]]
        assert ids == [*TOKENIZER.encode(text), TOKENIZER.eod_id]
        assert (lengths[:-1] == m).all()
        assert (tokens[-1, lengths[-1] :] == TOKENIZER.pad_id).all()
        assert store.name(document) == (f"id{document}", f"title {document}")
        assert all(store.document_of(row) == document for row in range(first, end))
        assert (store.row_documents()[first:end] == document).all()
    chunks = [text for batch in store.texts(batch=3) for text in batch]
    assert len(chunks) == store.num_rows
    if m == 20 and all(len(text) < 5 for text in texts):  # no chunk border inside a character
        assert chunks == texts
    store.verify()


def test_same_input_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, ["one two three four", "five", "six seven"] * 20, 4, 16)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert len(names) > 10
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_published_store_is_not_written_over(tmp_path: Path) -> None:
    write(tmp_path / "store", ["text"])
    with pytest.raises(UsageError, match="never changes"):
        StoreWriter(tmp_path / "store", TOKENIZER, 8)


def test_an_unfinished_store_is_not_there(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "store", TOKENIZER, 4, shard_rows=1)
    writer.add(Document("a", "", "text", "f"), TOKENIZER.encode("text"))
    assert list((tmp_path / "store").glob("tokens-*"))
    with pytest.raises(RetroError, match="never finished"):
        Store(tmp_path / "store")
    whole = write(tmp_path / "store", ["other"], 4)
    assert whole.text(0) == "othe"


def test_other_files_in_the_folder_are_not_touched(tmp_path: Path) -> None:
    for name in ("pytorch_model-00001-of-00002.bin", "tokens-00000.bin", "notes-00001.bin"):
        (tmp_path / name).write_bytes(b"mine")
    StoreWriter(tmp_path, TOKENIZER, 4)
    assert len(list(tmp_path.iterdir())) == 3


def test_no_document_and_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no document"):
        StoreWriter(tmp_path / "a", TOKENIZER, 8).close()
    writer = StoreWriter(tmp_path / "b", TOKENIZER, 8)
    with pytest.raises(StoreError, match="outside the vocabulary"):
        writer.add(Document("a", "", "x", "f"), [TOKENIZER.vocab_size])
    for m in (0, -1, 1 << 16):
        with pytest.raises(UsageError, match="chunk_size"):
            StoreWriter(tmp_path / "c", TOKENIZER, m)


def test_every_damaged_file_is_refused(tmp_path: Path) -> None:
    """One flipped bit or one missing byte in any file: an error that names it, at open, at touch or at verify."""
    original = write(tmp_path / "store", ["some text that is long enough", "another"] * 10, 4, 32)
    assert len(original.shards) > 1

    def read_everything(folder: Path) -> None:
        store = Store(folder)
        assert store.tokenizer.vocab_size
        _ = store.documents, store.row_documents(), [store.name(d) for d in range(store.num_documents)]
        store.rows(0, store.num_rows)
        store.verify()

    rng = np.random.default_rng(0)
    for path in sorted((tmp_path / "store").iterdir()):
        if path.name == ".lock":
            continue
        raw = path.read_bytes()
        for damage in ("flip", "cut", "gone"):
            copy = tmp_path / "copy"
            shutil.copytree(tmp_path / "store", copy)
            target = copy / path.name
            target.unlink()
            if damage != "gone":
                changed = bytearray(raw)
                if damage == "flip":
                    changed[rng.integers(len(raw))] ^= 1 << int(rng.integers(8))
                target.write_bytes(changed[:-1] if damage == "cut" else changed)
            try:
                read_everything(copy)
            except RetroError:
                pass
            else:
                assert Store(copy).manifest == original.manifest, f"{damage} of {path.name} was not noticed"
                assert path.name == "manifest.json", f"{damage} of {path.name} was not noticed"  # white space
            shutil.rmtree(copy)


def test_shards_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    global TOKENIZER
    write(tmp_path / "a", ["text"], 4)
    mine, TOKENIZER = TOKENIZER, Tokenizer.train(["quite another corpus"], 290)
    try:
        write(tmp_path / "b", ["text"], 4)
    finally:
        TOKENIZER = mine
    for name in ("tokens-00000.bin", "tokenizer.json"):
        shutil.copytree(tmp_path / "a", tmp_path / "mixed")
        (tmp_path / "mixed" / name).unlink()
        shutil.copy(tmp_path / "b" / name, tmp_path / "mixed" / name)
        with pytest.raises(StoreError, match="made"):
            _ = Store(tmp_path / "mixed").tokenizer
        shutil.rmtree(tmp_path / "mixed")


def test_nothing_of_the_machine_is_in_the_manifest(tmp_path: Path) -> None:
    write(tmp_path / "store", ["text"])
    assert str(tmp_path) not in json.dumps(Store(tmp_path / "store").manifest)


def test_contents_are_of_the_text_alone(tmp_path: Path) -> None:
    """Over shards, whatever ids and titles are; and the same where an earlier version wrote none."""
    texts = ["one two\n three", "four" * 9, "one two three\n", "a café", "four" * 9, "cafe\u0301 a"]
    store = write(tmp_path / "s", texts, 4, shard_rows=4)
    assert len(store.shards) > 1
    assert store.contents.tolist() == [content_mark(text) for text in texts]
    assert [int(np.flatnonzero(store.contents == mark)[0]) for mark in store.contents] == [0, 1, 0, 3, 1, 5]
    rows = np.arange(store.num_rows)
    np.testing.assert_array_equal(store.contents_of(rows), store.contents[store.row_documents()])
    kept = store.contents
    as_version_0(tmp_path / "s")
    old = Store(tmp_path / "s")
    old.verify()
    assert (old.has_contents, store.has_contents) == (False, True)
    np.testing.assert_array_equal(old.contents, kept)


def test_a_later_minor_version_is_read(tmp_path: Path) -> None:
    store = write(tmp_path / "s", ["one two"], 4)
    body = {key: value for key, value in store.manifest.items() if key != "fingerprint"} | {"minor": 2, "more": True}
    (tmp_path / "s" / "manifest.json").unlink()
    (tmp_path / "s" / "manifest.json").write_text(json.dumps({**body, "fingerprint": files.fingerprint(body)}))
    assert Store(tmp_path / "s").contents.tolist() == store.contents.tolist()


@contextlib.contextmanager
def few_descriptors(more: int) -> Iterator[None]:
    """At most `more` than are open now."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + more, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_store_of_many_shards_opens_with_few_descriptors(tmp_path: Path, small_store: Store) -> None:
    """120 shards are 720 files."""
    tokenizer = small_store.tokenizer
    writer = StoreWriter(tmp_path / "s", tokenizer, 16, shard_rows=1)
    for number in range(120):
        writer.add(Document(str(number), "", "river"), tokenizer.encode("river"))
    writer.close()
    with few_descriptors(16):
        store = Store(tmp_path / "s")
        assert len(store.rows(0, store.num_rows)[0]) == 120
        tokens, _ = NeighborLoader([store]).gather(np.arange(120), 16)
        assert tokens.shape == (120, 16)
        assert store.name(119) == ("119", "")


def test_no_descriptor_at_all_is_said(small_store: Store) -> None:
    taken: list[int] = []
    try:
        with few_descriptors(0):
            with contextlib.suppress(OSError):
                while True:
                    taken.append(os.open(os.devnull, os.O_RDONLY))
            with pytest.raises(OutOfResourceError, match="ulimit -n") as raised:
                Store(small_store.folder)
    finally:
        for descriptor in taken:
            os.close(descriptor)
    assert raised.value.exit_code == 5
