"""A memory of a store: counts over its parts, documents as borders, what is held out is not there, damage is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from retro_engine.data import files
from retro_engine.data.store import Store
from retro_engine.errors import MissingInputError, StoreError, UsageError
from retro_engine.memory.ngram_memory import NgramMemory, build_ngram_memory, document_tokens


@pytest.fixture(scope="module")
def memory(small_store: Store, tmp_path_factory: pytest.TempPathFactory) -> NgramMemory:
    """Of four parts or so."""
    size = int(small_store.documents[:, 1].sum())
    return build_ngram_memory(small_store, tmp_path_factory.mktemp("memory") / "ngram", size // 4)


def texts(store: Store) -> list[list[int]]:
    return [tokens.tolist() for tokens in document_tokens(store, 0, store.num_documents)]


def by_hand(documents: list[list[int]], eod: int, words: list[int]) -> int:
    """How often words stand in documents, each with the end of another one before it."""
    whole = [[eod, *document] for document in documents]
    return sum(text[i : i + len(words)] == words for text in whole for i in range(len(text) - len(words) + 1))


def test_parts_count_as_one_text(memory: NgramMemory, small_store: Store) -> None:
    documents, eod = texts(small_store), small_store.eod_id
    assert len(memory.parts) >= 4
    assert memory.num_tokens == sum(map(len, documents)) + len(memory.parts)
    text = np.array([eod, *documents[3][:6], *documents[9][2:9]])
    counts = memory.counts(text)
    for place in range(1, len(text)):
        for length in range(1, place + 1):  # not of the end of a document alone
            words = text[place - length + 1 : place + 1].tolist()
            assert counts[place, length] == by_hand(documents, eod, words), words
    assert memory.counts(np.array(documents[5] + documents[6]))[len(documents[5]) + 1, 3] == by_hand(
        documents, eod, [*documents[5][-1:], *documents[6][:2]]
    ), "a suffix ends where its document begins"


def test_what_is_held_out_is_not_there(memory: NgramMemory, small_store: Store) -> None:
    """By content: what is left is what a memory without these documents counts."""
    held = np.array([2, 11, 12, 30])
    found, marks = memory.without(small_store.contents[held])
    assert set(marks) == set(small_store.contents[held].tolist())
    documents = texts(small_store)
    left = [text for text, mark in zip(documents, small_store.contents.tolist()) if mark not in set(marks.tolist())]
    text = np.array([small_store.eod_id, *documents[11]])
    counts = found.counts(text)
    for place in range(1, 20):
        for length in (1, 2, 3, 9):
            words = text[max(0, place - length + 1) : place + 1].tolist()
            if len(words) == length:
                assert counts[place, length] == by_hand(left, small_store.eod_id, words)
    assert memory.counts(text)[19, 9] > counts[19, 9]
    assert memory.without(np.array([1]))[0] is memory
    with pytest.raises(StoreError, match="nothing but documents that are held out"):
        memory.without(small_store.contents)


def test_shares_are_a_distribution(memory: NgramMemory, small_store: Store) -> None:
    """Of every token after a context, with some documents held out: together 1."""
    found, _ = memory.without(small_store.contents[:7])
    document = texts(small_store)[20][:5]
    total: dict[int, float] = {}
    for token in range(small_store.vocab_size):
        guesses = found.guesses(np.array([*document, token]))
        first = int(guesses.ends_T[-2])
        for number, share in enumerate(guesses.shares_J[first:]):
            total[number] = total.get(number, 0) + float(share)
    assert total
    np.testing.assert_allclose(list(total.values()), 1, rtol=1e-5)


def test_another_tokenizer_is_refused(memory: NgramMemory, small_store: Store) -> None:
    memory.check(small_store.tokenizer.fingerprint, "the run")
    with pytest.raises(StoreError, match=r"has tokenizer .*\n  the run has ffffffffffff\n"):
        memory.check("f" * 64, "the run")


def test_files_are_published_whole_and_damage_is_refused(
    memory: NgramMemory, small_store: Store, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="is there already"):
        build_ngram_memory(small_store, memory.folder)
    with pytest.raises(MissingInputError, match="is not a ngram"):
        NgramMemory(tmp_path)
    made = build_ngram_memory(small_store, tmp_path / "m")
    made.verify()
    summary = made.summary()
    assert summary["bytes_per_token"] < 8
    path = made.folder / "order-00000.bin"
    path.chmod(0o644)
    raw = bytearray(path.read_bytes())
    raw[200] ^= 1
    path.write_bytes(raw)
    with pytest.raises(StoreError, match="damaged in block 0"):
        NgramMemory(made.folder)
    with pytest.raises(StoreError, match="SHA-256"):
        made.verify()
    path.write_bytes(raw[:-1])
    with pytest.raises(StoreError, match="bytes"):
        NgramMemory(made.folder)
    path.unlink()
    with pytest.raises(StoreError, match=r"missing[^$]*retro memory ngram STORE makes it"):
        NgramMemory(made.folder)


def test_a_memory_that_contradicts_itself_is_refused(small_store: Store, tmp_path: Path) -> None:
    folder = build_ngram_memory(small_store, tmp_path / "m").folder
    body = json.loads((folder / files.MANIFEST).read_text())
    for change in ({"vocab_size": 20}, {"parts": [{"documents": 3, "tokens": 4}]}, {"format": 9}):
        content = {key: value for key, value in body.items() if key not in ("kind", "version", "fingerprint")}
        (folder / files.MANIFEST).unlink()
        files.write_manifest(folder, "ngram", content | change)
        with pytest.raises(StoreError):
            NgramMemory(folder)


def test_it_is_mapped_not_read(memory: NgramMemory) -> None:
    """A memory that is larger than the machine's: what grows with its text stays in its files."""
    for part in memory.parts:
        for values in (part.tokens, part.order, part.starts, part.ends, part.contents):
            assert not values.flags.owndata and not values.flags.writeable
