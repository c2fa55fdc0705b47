"""Sequences, packing, splits and who may be whose neighbor."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import random_texts
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_engine.data.batches import Order, Sequences, copies_of, describe_copies, pack, pack_in_order, split_documents
from retro_engine.data.neighbor_table import NeighborTable, find_table
from retro_engine.data.prepare import prepare
from retro_engine.data.store import Store
from retro_engine.errors import StoreError, UsageError
from tests.helpers import table_of

AS_IT_IS = Order(7, is_shuffled=False, is_cyclic=False)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 9))
def test_every_row_is_packed_once_and_in_order(counts: list[int], L: int) -> None:
    num_rows = np.array(counts)
    first = np.cumsum(num_rows) - num_rows
    sequences = pack(first, num_rows, L)
    rows = sequences[sequences >= 0]
    assert sorted(rows.tolist()) == list(range(int(num_rows.sum())))
    document = np.repeat(np.arange(len(counts)), num_rows)
    for sequence in sequences:
        used = sequence[sequence >= 0]
        assert (sequence[: len(used)] == used).all(), "padding is at the end"
        for d in np.unique(document[used]):
            mine = used[document[used] == d]
            assert (np.diff(mine) == 1).all(), "a piece is consecutive rows"
            if num_rows[d] <= L:
                assert len(mine) == num_rows[d], "a document that fits is not cut"
    used_share = len(rows) / sequences.size
    assert used_share > 0.5 or len(sequences) == 1, used_share


@pytest.fixture(scope="module")
def table(small_store: Store) -> NeighborTable:
    return NeighborTable(find_table(small_store, "bm25"), small_store)


def sequences(store: Store, table: NeighborTable | None, **options: object) -> Sequences:
    shares = split_documents(store, "80,20,0")
    return Sequences(store, shares["train"], 64, table, 2, database_documents=shares["train"], **options)


def test_tokens_labels_and_documents(small_store: Store) -> None:
    """Labels are the next token of the same document, across rows and sequences; padding has none."""
    data = Sequences(small_store, np.arange(small_store.num_documents), 32)
    m = small_store.chunk_size
    texts: dict[int, list[int]] = {}
    for d in range(small_store.num_documents):
        first, end = small_store.document_rows(d)
        tokens, lengths = small_store.rows(first, end)
        texts[d] = [int(t) for row, n in zip(tokens, lengths) for t in row[:n]]
    labelled = {d: 0 for d in texts}
    place_of: dict[int, int] = {}
    for batch, rows in zip(data.batches(1), data.in_order()):
        for t in range(32):
            d, row = int(batch.document_ids[0, t]), int(rows[t // m])
            if d < 0:
                assert batch.labels[0, t] == -100
                continue
            place = (row - small_store.document_rows(d)[0]) * m + t % m
            place_of[d] = max(place_of.get(d, 0), place)
            assert batch.tokens[0, t] == texts[d][place]
            expected = texts[d][place + 1] if place + 1 < len(texts[d]) else -100
            assert batch.labels[0, t] == expected
            labelled[d] += expected != -100
    assert labelled == {d: len(text) - 1 for d, text in texts.items()}, (
        "every token with a predecessor is predicted once"
    )


def test_no_neighbor_is_of_the_own_document_or_held_out(small_store: Store, table: NeighborTable) -> None:
    """Whatever stands in the table: a full scan of what training and validation are shown."""
    shares = split_documents(small_store, "80,20,0")
    document = small_store.row_documents()
    train = set(shares["train"].tolist())
    for share in ("train", "valid"):
        data = Sequences(small_store, shares[share], 64, table, 2, database_documents=shares["train"])
        seen = 0
        for mode in ("on", "random", "one_right"):
            rows = data.in_order()
            ids = data.neighbor_ids(rows, mode)
            for row, chosen in zip(rows.reshape(-1), ids.reshape(-1, 2)):
                for chunk in chosen[chosen >= 0]:
                    assert row >= 0
                    assert document[chunk] != document[row], "own document"
                    assert int(document[chunk]) in train, "held-out document"
                    seen += 1
        assert seen > 100


def test_a_missing_first_neighbor_gives_way_to_the_next(small_store: Store, table: NeighborTable) -> None:
    data = sequences(small_store, table)
    rows = data.in_order()
    all_ids = table.ids(np.where(rows < 0, 0, rows), table.num_neighbors)
    document = small_store.row_documents()
    train = split_documents(small_store, "80,20,0")["train"]
    for row, chosen, candidates in zip(
        rows.reshape(-1), data.neighbor_ids(rows).reshape(-1, 2), all_ids.reshape(-1, table.num_neighbors)
    ):
        if row >= 0:
            good = [c for c in candidates if c >= 0 and document[c] in train and document[c] != document[row]]
            assert chosen.tolist() == (good + [-1, -1])[:2]


def test_training_batches_are_a_function_of_the_step(small_store: Store, table: NeighborTable) -> None:
    """Any step can be made first; epochs follow each other; each epoch has every token once, in another order."""
    data, again = sequences(small_store, table), sequences(small_store, table)
    per_epoch = len(data.epoch(Order(7), 0))
    steps = list(range(2 * per_epoch // 3 + 3))
    made = {step: data.training_batch(step, 3, Order(7)) for step in steps}
    for step in reversed(steps):
        other = again.training_batch(step, 3, Order(7))
        np.testing.assert_array_equal(made[step].tokens, other.tokens)
        np.testing.assert_array_equal(made[step].neighbors, other.neighbors)
    first, second = data.epoch(Order(7), 0), data.epoch(Order(7), 1)
    assert sorted(first[first >= 0]) == sorted(second[second >= 0])
    assert not np.array_equal(first, second[: len(first)])


def test_single_reads_the_corpus_in_its_order(small_store: Store, table: NeighborTable) -> None:
    """Row after row, whatever the documents' lengths; no document that fits is cut."""
    data = sequences(small_store, table)
    once = data.epoch(AS_IT_IS, 0)
    rows = once[once >= 0]
    assert (np.diff(rows) > 0).all()
    assert sorted(rows) == sorted(data.in_order()[data.in_order() >= 0])
    count = data.num_sequences(AS_IT_IS)
    assert count == len(once)
    for index in range(count):
        np.testing.assert_array_equal(data.training_batch(index, 1, AS_IT_IS).tokens, data.batch(once[[index]]).tokens)
    with pytest.raises(StopIteration):
        data.training_batch(count, 1, AS_IT_IS)
    documents = small_store.row_documents()
    for document in np.unique(documents[rows]):
        holding = [n for n, sequence in enumerate(once) if (documents[sequence[sequence >= 0]] == document).any()]
        assert (
            len(holding) == 1
            or small_store.document_rows(int(document))[1] - small_store.document_rows(int(document))[0] > 4
        )


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 9))
def test_packing_in_order_keeps_the_order(counts: list[int], L: int) -> None:
    num_rows = np.array(counts)
    packed = pack_in_order(np.cumsum(num_rows) - num_rows, num_rows, L)
    assert packed[packed >= 0].tolist() == list(range(int(num_rows.sum())))
    for sequence in packed:
        used = (sequence >= 0).sum()
        assert (sequence[:used] >= 0).all()
        assert used


@pytest.mark.parametrize("is_shuffled", [True, False])
def test_cyclic_shuffles_sequences_in_every_epoch(small_store: Store, table: NeighborTable, is_shuffled: bool) -> None:
    """Whatever is done with the documents: without, every epoch has the same sequences in another order."""
    data = sequences(small_store, table)
    first, second = (data.epoch(Order(7, is_shuffled), number) for number in (0, 1))
    assert sorted(first[first >= 0]) == sorted(second[second >= 0])
    assert not np.array_equal(first, second)
    in_order = data.in_order()
    if not is_shuffled:
        assert sorted(map(tuple, first)) == sorted(map(tuple, second)) == sorted(map(tuple, in_order))
        assert not np.array_equal(first, in_order)
    assert data.num_sequences(Order(7, is_shuffled)) is None


@pytest.mark.parametrize("count", [1, 2, 3, 10, 1000])
def test_splits(count: int) -> None:
    class Documents:
        num_documents = count

    shares = split_documents(Documents(), "90,5,5")  # type: ignore[arg-type]
    together = np.concatenate(list(shares.values()))
    assert sorted(together.tolist()) == list(range(count))
    assert len(shares["train"]) >= 1
    if count >= 3:
        assert len(shares["valid"]) >= 1
        assert len(shares["test"]) >= 1
    assert not len(split_documents(Documents(), "98,2,0")["test"])  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused(small_store: Store, table: NeighborTable) -> None:
    everything = np.arange(small_store.num_documents)
    for length in (24, 8, 0):
        with pytest.raises(UsageError, match="encoder_seq_length"):
            Sequences(small_store, everything, length, table)
    with pytest.raises(UsageError, match="k=7"):
        Sequences(small_store, everything, 64, table, 7)
    with pytest.raises(StoreError, match="no document in this share"):
        Sequences(small_store, everything[:0], 64, table)


def copied_store(folder: Path, texts: list[str], tokenizer: str = "auto") -> Store:
    folder.mkdir()
    lines = (json.dumps({"id": f"{folder.name}{n}", "text": text}) + "\n" for n, text in enumerate(texts))
    (folder / "c.jsonl").write_text("".join(lines))
    return prepare([folder / "c.jsonl"], folder / "store", tokenizer, vocab_size=400, chunk_size=16)


def test_no_batch_has_a_copy_whatever_the_table_says(tmp_path: Path) -> None:
    """A table of an earlier version: neighbors of copies of the own document, and of copies of held-out documents."""
    texts = random_texts(10)
    store = copied_store(tmp_path / "a", [*texts, texts[0], texts[9] + "\n"])  # 10 repeats 0, 11 repeats 9
    other = copied_store(tmp_path / "b", texts, str(store.folder))
    total = store.num_rows + other.num_rows
    rng = np.random.default_rng(0)
    table = table_of(store, [store, other], np.stack([rng.permutation(total)[:40] for _ in range(store.num_rows)]))
    held_out = np.array([4, 9])
    trained = np.setdiff1d(np.arange(store.num_documents), held_out)
    contents = np.concatenate([s.contents_of(np.arange(s.num_rows)) for s in (store, other)])
    for documents in (trained, held_out):
        data = Sequences(store, documents, 64, table, 4, database_documents=trained)
        for mode in ("on", "random", "one_right"):
            rows = data.in_order()
            ids = data.neighbor_ids(rows, mode)
            there = ids >= 0
            assert there.mean() > 0.5
            own = store.contents_of(np.maximum(rows, 0))[..., None]
            assert not (there & (contents[ids] == own)).any(), "a copy of the own document"
            in_other = there & (ids >= store.num_rows)
            assert in_other.any()
            assert not (in_other & np.isin(contents[ids], store.contents[held_out])).any(), "a copy of a held-out one"
            here = there & (ids < store.num_rows)
            assert not np.isin(store.row_documents()[ids[here]], held_out).any()
    assert copies_of(store, held_out, trained).tolist() == [9]
    assert copies_of(other, np.arange(10), held_out, store).tolist() == [4, 9]
    train, valid = (Sequences(store, documents, 64) for documents in (trained, held_out))
    warning = describe_copies(valid, train)
    assert warning is not None
    assert warning.startswith("WARNING: 1 of 2 held-out documents are also among those trained on: a9\n")
    assert describe_copies(Sequences(store, np.array([4]), 64), train) is None
