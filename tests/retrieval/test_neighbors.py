"""Filling the table: same-document filter, several databases, reproducible, refused when it is there."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from helpers import as_version_0, random_texts, write_corpus

from retro_engine.cli import main
from retro_engine.data.batches import Sequences, split_documents
from retro_engine.data.prepare import prepare
from retro_engine.data.store import Store
from retro_engine.errors import RetroError, StoreError, UsageError
from retro_engine.progress import Reporter
from retro_engine.retrieval import neighbors as neighbors_module
from retro_engine.retrieval.ceiling import copy_ceiling, describe_ceiling
from retro_engine.retrieval.executor import Executor
from retro_engine.retrieval.neighbors import DUPLICATE_NGRAM, Filters, build_neighbors
from retro_engine.retrieval.overlap import repeated_share
from retro_engine.retrieval.quality import quality
from retro_engine.retrieval.search import Building, Retriever


@pytest.mark.parametrize("retriever", ["bm25", "hash"])
def test_no_neighbor_is_of_the_own_document(small_store: Store, retriever: str) -> None:
    table = build_neighbors(small_store, [small_store], retriever, 8, name=f"own-{retriever}")
    ids = table.ids(np.arange(small_store.num_rows), 8)
    document = small_store.row_documents()
    for row in range(small_store.num_rows):
        found = ids[row][ids[row] >= 0]
        assert not (document[found] == document[row]).any()
    assert (ids[:, 0] >= 0).mean() > 0.9


def test_several_databases_and_reproducible_bytes(small_store: Store, tmp_path: Path) -> None:
    other = prepare(
        [write_corpus(tmp_path / "c.jsonl", 10, seed=3)], tmp_path / "s", str(small_store.folder), chunk_size=16
    )
    tables = [build_neighbors(other, [small_store, other], num_neighbors=4, name=name) for name in ("x", "y")]
    ids = tables[0].ids(np.arange(other.num_rows), 4)
    assert ids.max() < small_store.num_rows + other.num_rows
    first = [(t.folder / name).read_bytes() for t in tables for name in t.manifest["files"]]
    assert first[0] == first[1]
    document = other.row_documents()
    for row in range(other.num_rows):
        own = ids[row][ids[row] >= small_store.num_rows] - small_store.num_rows
        assert not (document[own] == document[row]).any()


def test_cost_is_said_and_a_table_is_not_written_over(small_store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    build_neighbors(small_store, [small_store], "bm25", 2, name="once", reporter=Reporter("text"))
    said = capsys.readouterr().err
    assert "searching" in said
    assert "chunks with bm25 at" in said
    with pytest.raises(UsageError, match="never changes"):
        build_neighbors(small_store, [small_store], "bm25", 2, name="once")
    with pytest.raises(UsageError, match="--k 0"):
        build_neighbors(small_store, [small_store], "bm25", 0, name="zero")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_any_executor_resumes_any_other(small_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after two shards: processes go on, redo none of them, and the bytes are those of one run."""
    monkeypatch.setattr(neighbors_module, "SHARD_ROWS", 40)
    whole = content(build_neighbors(small_store, [small_store], num_neighbors=3, name="whole").folder)
    real, count = neighbors_module.find_shard, 0

    def stop_at_third(*given: object) -> object:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return real(*given)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(neighbors_module, "find_shard", stop_at_third)
        with pytest.raises(KeyboardInterrupt):
            build_neighbors(small_store, [small_store], num_neighbors=3, name="stopped")
    folder = small_store.folder / "neighbors" / "stopped"
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("ids-*")}
    assert len(before) == 4
    building = Building(Executor("processes", 2))
    build_neighbors(small_store, [small_store], num_neighbors=3, name="stopped", building=building)
    assert content(folder) == whole
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in folder.glob("ids-*")}.items()


def test_near_duplicates_are_left_out(small_store: Store) -> None:
    plain = build_neighbors(small_store, [small_store], num_neighbors=4, name="plain")
    limit = 0.5
    filtered = build_neighbors(small_store, [small_store], num_neighbors=4, name="f", filters=Filters(limit))
    rows = np.arange(small_store.num_rows)

    def worst(table_ids: np.ndarray) -> float:
        found = 0.0
        for row in rows:
            tokens, lengths = small_store.rows(row, row + 1)
            own = tokens[0, : lengths[0]].tolist()
            n = min(DUPLICATE_NGRAM, len(own))
            for chunk in table_ids[row][table_ids[row] >= 0]:
                end = small_store.document_rows(small_store.document_of(int(chunk)))[1]
                t, ls = small_store.rows(int(chunk), min(int(chunk) + 2, end))
                other = [x for line, length in zip(t, ls) for x in line[:length].tolist()]
                grams = {tuple(other[i : i + n]) for i in range(len(other) - n + 1)}
                covered = {
                    j for i in range(len(own) - n + 1) if tuple(own[i : i + n]) in grams for j in range(i, i + n)
                }
                found = max(found, len(covered) / len(own))
        return found

    assert worst(plain.ids(rows, 4)) > limit >= worst(filtered.ids(rows, 4))
    assert filtered.manifest["retriever"]["filters"]["near_duplicates"] == limit


def test_leaks_are_left_out_for_held_out_documents_only(small_store: Store) -> None:
    splits = "60,40,0"
    plain = build_neighbors(small_store, [small_store], num_neighbors=4, name="p2", merge_overlaps=False)
    filters = Filters(leak_limit=0.3, splits=splits)
    table = build_neighbors(
        small_store, [small_store], num_neighbors=4, name="leak", merge_overlaps=False, filters=filters
    )
    rows = np.arange(small_store.num_rows)
    a, b = plain.ids(rows, 4), table.ids(rows, 4)
    is_heldout = np.isin(small_store.row_documents(), split_documents(small_store, splits)["valid"])
    moved = (
        a[~is_heldout] - b[~is_heldout]
    )  # 1: the filter searches deeper and met the chunk before a document's last one
    assert np.isin(moved, (0, 1)).all() and (moved != 0).mean() < 0.01
    assert (a[is_heldout] != b[is_heldout]).any()
    for wrong in ({"leak_limit": 1.0}, {"near_duplicates": -0.1}, {"least_shared": 1.0}):
        with pytest.raises(UsageError, match="cannot be used"):
            Filters(**wrong)


def test_neighbors_that_share_few_tokens_and_the_order_of_the_others(small_store: Store) -> None:
    rows, least = np.arange(small_store.num_rows), 0.5

    def build(name: str, filters: Filters, k: int = 8) -> np.ndarray:
        table = build_neighbors(small_store, [small_store], num_neighbors=k, name=name, filters=filters)
        assert (table.manifest["retriever"].get("filters") is not None) == filters.is_on
        return table.ids(rows, k)

    def shares_of(ids: np.ndarray) -> np.ndarray:
        """By sets of tokens: -1 = missing."""
        chunks = []
        for row in rows:
            tokens, lengths = small_store.rows(int(row), int(row) + 1)
            chunks.append(set(tokens[0, : lengths[0]].tolist()))
        return np.array(
            [[-1 if i < 0 else len(chunks[row] & chunks[i]) / len(chunks[row]) for i in ids[row]] for row in rows]
        )

    plain, above = build("all of 16", Filters(), 16), build("above", Filters(least_shared=least))
    ranked = build("ranked", Filters(reranks=True))
    both = build("both", Filters(least_shared=least, reranks=True))
    found = shares_of(plain)
    assert (found[found >= 0] < least).any() and (np.diff(found[:, :8], axis=1) > 0).any()
    for row in rows:
        expected = [i for i, share in zip(plain[row], found[row]) if i >= 0 and share >= least][:8]
        assert above[row][above[row] >= 0].tolist() == expected, "the retriever's order is kept"
    for ids in (ranked, both):
        shares = shares_of(ids)
        assert (np.diff(shares, axis=1) <= 0).all(), "missing ones are last"
        assert (shares[:, 0] == np.where(found.max(1) < least, shares[:, 0], found.max(1))).all()
    kept = shares_of(both)
    assert (kept[kept >= 0] >= least).all() and (kept < 0).sum() > (shares_of(ranked) < 0).sum()


def test_weights_of_databases(small_store: Store, tmp_path: Path) -> None:
    """A database with a large weight comes first, and a weight that cannot be is refused."""
    other = prepare(
        [write_corpus(tmp_path / "c.jsonl", 10, seed=3)], tmp_path / "s", str(small_store.folder), chunk_size=16
    )
    shares = []
    for number, weights in enumerate(([1.0, 1.0], [1.0, 50.0])):
        table = build_neighbors(other, [small_store, other], num_neighbors=4, name=f"w{number}", weights=weights)
        ids = table.ids(np.arange(other.num_rows), 1)
        shares.append(float((ids >= small_store.num_rows).mean()))
    assert shares[1] > max(0.9, shares[0])
    for wrong in ([1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")]):
        with pytest.raises(UsageError, match="one number above 0"):
            build_neighbors(other, [small_store, other], name="no", weights=wrong)


def test_hybrid(small_store: Store) -> None:
    building = Building(embedder="hash")
    table = build_neighbors(small_store, [small_store], "hybrid", 4, building=building)
    assert table.manifest["retriever"]["fusion"] == [1.0, 1.0]
    assert table.folder.name == "hybrid"
    assert (table.ids(np.arange(small_store.num_rows), 1) >= 0).mean() > 0.9


def test_the_kth_io_call_of_a_whole_build_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embed, index and neighbors: a typed error at every k, nothing half-published, and the same bytes afterwards."""
    source = write_corpus(tmp_path / "c.jsonl", 6)
    base = prepare([source], tmp_path / "base", vocab_size=300, chunk_size=16)
    build_neighbors(base, [base], "hash", 2)
    whole = {path.relative_to(base.folder): path.read_bytes() for path in base.folder.rglob("*") if path.is_file()}
    for k in range(1000):
        work = tmp_path / f"k{k}"
        store = prepare([source], work, vocab_size=300, chunk_size=16)
        real, count = os.fsync, 0
        error = None
        with monkeypatch.context() as patch:

            def failing(descriptor: int, k: int = k, real: object = real) -> None:
                nonlocal count
                count += 1
                if count == k + 1:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                real(descriptor)  # type: ignore[operator]

            patch.setattr(os, "fsync", failing)
            try:
                build_neighbors(store, [store], "hash", 2)
            except RetroError as found:
                error = found
        if error is None:
            assert k > 8
            break
        if not (work / "neighbors" / "hash" / "manifest.json").exists():  # it is where only the last fsync failed
            build_neighbors(store, [store], "hash", 2)
        found_files = {path.relative_to(work): path.read_bytes() for path in work.rglob("*") if path.is_file()}
        assert found_files == whole


def test_a_database_of_another_tokenizer_is_refused_before_it_is_indexed(small_store: Store, tmp_path: Path) -> None:
    """Two stores prepared apart have two tokenizers of one size: nothing but the fingerprint tells."""
    source = write_corpus(tmp_path / "c.jsonl", 6, seed=3)
    other = prepare([source], tmp_path / "s", vocab_size=300, chunk_size=16)
    assert other.vocab_size == small_store.vocab_size
    wide = prepare([source], tmp_path / "w", str(small_store.folder), chunk_size=32)
    for store, what in ((other, "tokenizer"), (wide, "chunk_size")):
        with pytest.raises(StoreError, match=f"{small_store.folder} has {what} .*\n.*{store.folder} has"):
            build_neighbors(small_store, [store], "hash", 2, name=f"far-{what}")
        assert not (store.folder / "index").exists()
        with pytest.raises(StoreError, match=f"{store.folder} has {what}"):
            Retriever([small_store]).search_rows(store, 0, 1, 1, [None])
        assert not (small_store.folder / "neighbors" / f"far-{what}").exists()


def write_texts(path: Path, texts: list[str], name: str, end: str) -> Path:
    rows = ({"id": f"{name}{n}", "title": f"{name} {n}", "text": text + end} for n, text in enumerate(texts))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("retriever", ["bm25", "hash", "hybrid"])
@pytest.mark.parametrize("case", ["two stores", "one store", "two old stores"])
def test_no_neighbor_is_of_a_copy_of_the_own_document(tmp_path: Path, case: str, retriever: str) -> None:
    """Random words: whatever a neighbor states of what follows its chunk, it has from a copy."""
    texts = random_texts(12)
    once = write_texts(tmp_path / "once.jsonl", texts, "a", "")
    again = write_texts(tmp_path / "again.jsonl", texts, "b", "\r\n\n")
    if case == "one store":
        query = prepare([once, again], tmp_path / "s", vocab_size=400, chunk_size=16)
        databases = [query]
    else:
        query = prepare([once], tmp_path / "s", vocab_size=400, chunk_size=16)
        databases = [query, prepare([again], tmp_path / "t", str(query.folder), chunk_size=16)]
    if "old" in case:
        for store in databases:
            as_version_0(store.folder)
        query, *others = (Store(store.folder) for store in databases)
        databases = [query, *others]
    table = build_neighbors(query, databases, retriever, 6, building=Building(embedder="hash"))
    rows = np.arange(query.num_rows)
    ids = table.ids(rows, 6)
    contents = np.concatenate([store.contents_of(np.arange(store.num_rows)) for store in databases])
    own = query.contents_of(rows)[:, None]
    assert not ((contents[ids] == own) & (ids >= 0)).any()
    assert (ids[:, 2] >= 0).mean() > 0.9, "others are found, each once"
    places = np.concatenate(
        [np.arange(store.num_rows) - store.documents[store.row_documents(), 0] for store in databases]
    )
    for row in ids:
        found = row[row >= 0]
        assert len({(contents[i], places[i]) for i in found}) == len(found)
    report = quality(table)
    assert report["mean_next_overlap"] < 0.05
    sequences = Sequences(query, np.arange(query.num_documents), 64, table, 2)
    ceiling, count = copy_ceiling(sequences)
    assert ceiling < 0.05
    assert repeated_share(sequences) == 0
    assert "WARNING" not in describe_ceiling(ceiling, count, repeated_share(sequences))


def test_near_copies_are_a_warning_that_names_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One word more in each copy: only what it states tells, and the option that it names leaves them out."""
    texts = random_texts(30)
    once = write_texts(tmp_path / "once.jsonl", texts, "a", "")
    again = write_texts(tmp_path / "again.jsonl", texts, "b", " more")
    store = prepare([once, again], tmp_path / "s", vocab_size=400, chunk_size=16)
    said, shares = [], []
    for options in ([], ["--near-duplicates", ".8", "--leak-limit", ".3", "--name", "clean"]):
        assert main(["neighbors", str(store.folder), "--k", "4", "--json", *options]) == 0
        out, error = capsys.readouterr()
        said.append(error)
        shares.append(json.loads(out)["repeated_share"])
    assert "WARNING: the neighbors state what follows: duplicates?" in said[0]
    assert "--near-duplicates .8 --leak-limit .3" in said[0]
    assert "WARNING" not in said[1]
    assert shares[0] > 0.5 > 0.05 > shares[1]


def test_held_out_copies_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = random_texts(20)
    store = prepare([write_texts(tmp_path / "c.jsonl", texts + texts, "d", "")], tmp_path / "s", vocab_size=400)
    assert main(["neighbors", str(store.folder), "--retriever", "hash", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["neighbors", str(store.folder), "--retriever", "hash", "--name", "again"]) == 0
    (held_out,) = split_documents(store, "98,2,0")["valid"]
    assert f"held-out documents are also among those trained on: d{held_out} d {held_out}" in capsys.readouterr().err


def test_text_that_shares_no_word_is_not_blamed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What reads words otherwise, or needs none, is named."""
    path = tmp_path / "c.jsonl"
    path.write_text("".join(f'{{"text": "{" ".join(f"w{n}x{i}" for i in range(9))}"}}\n' for n in range(9)))
    store = prepare([path], tmp_path / "s", vocab_size=300, chunk_size=128)
    build_neighbors(store, [store], reporter=Reporter("text"))
    said = capsys.readouterr().err
    assert "100.0% of the chunks have no neighbor" in said
    for word in ("script or language", "--stemmer", "--stop-words", "--retriever hash"):
        assert word in said
    build_neighbors(store, [store], "hash", reporter=Reporter("text"))
    assert "--stemmer" not in capsys.readouterr().err
    (tmp_path / "one.txt").write_text("the river and the stone " * 40)
    one = prepare([tmp_path / "one.txt"], tmp_path / "one", vocab_size=300, chunk_size=16)
    build_neighbors(one, [one], reporter=Reporter("text"))
    assert "one document only" in capsys.readouterr().err
