"""Filters on documents' metadata: what matches, what is refused, and that a filtered search is one of those documents alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw
import pytest

from retro_engine.data.corpus import Document
from retro_engine.data.store import Store
from retro_engine.errors import StoreError, UsageError
from retro_engine.library import filters
from retro_engine.library.library import Library
from retro_engine.library.live import LiveRetriever
from retro_engine.retrieval.search import Retriever

ABOUT = {"year": 2024, "author": "Ada", "is_draft": False, "price": 1.5}


def asked(kind: str, key: str, value: Any) -> dict[str, Any]:
    return {"type": kind, "key": key, "value": value}


@pytest.mark.parametrize(
    ("kind", "key", "value", "matches"),
    [
        ("eq", "year", 2024, True), ("eq", "year", 2024.0, True), ("eq", "year", "2024", False), ("eq", "is_draft", False, True),
        ("eq", "is_draft", 0, False), ("ne", "author", "Bob", True), ("ne", "author", "Ada", False), ("ne", "lacks", 1, False),
        ("gt", "year", 2023, True), ("gte", "year", 2024, True), ("lt", "price", 1.5, False), ("lte", "price", 1.5, True),
        ("gt", "author", "Aba", True), ("gt", "author", 1, False), ("lt", "is_draft", 1, False), ("in", "author", ["Eve", "Ada"], True),
        ("in", "year", ["2024"], False), ("nin", "author", ["Eve"], True), ("nin", "author", ["Ada"], False), ("nin", "lacks", [1], False),
    ],
)  # fmt: skip
def test_comparisons(kind: str, key: str, value: Any, matches: bool) -> None:
    found = filters.read_filter(asked(kind, key, value))
    assert found.matches(ABOUT) is matches
    assert filters.read_filter(found.json) == found, "it can be sent on"


def test_joins() -> None:
    year, author = asked("eq", "year", 2024), asked("eq", "author", "Bob")
    assert filters.read_filter({"type": "or", "filters": [year, author]}).matches(ABOUT)
    both = filters.read_filter({"type": "and", "filters": [year, {"type": "or", "filters": [author]}]})
    assert not both.matches(ABOUT)
    assert both.names == {"year", "author"}


def deep(levels: int) -> dict[str, Any]:
    return asked("eq", "a", 1) if not levels else {"type": "and", "filters": [deep(levels - 1)]}


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ([], "an object"), ({}, "does not exist"), (asked("like", "a", "b"), "does not exist"), ({"type": "eq", "key": "a"}, "it has type, key, value"),
        ({**asked("eq", "a", 1), "b": 1}, "it has type, key, value"), (asked("eq", "", 1), "the name of a field"), (asked("eq", 1, 1), "the name of a field"),
        (asked("eq", "a", None), "cannot be used"), (asked("eq", "a", [1]), "cannot be used"), (asked("eq", "a", float("nan")), "cannot be used"),
        (asked("eq", "a", 1 << 70), "cannot be used"), (asked("in", "a", 1), "lists 1 to"), (asked("in", "a", []), "lists 1 to"),
        (asked("gt", "a", True), "have no order"), ({"type": "and", "filters": []}, "it has filters"), ({"type": "and"}, "it has type, filters"),
        (deep(6), "at most 5 deep"), ({"type": "or", "filters": [asked("eq", "a", n) for n in range(65)]}, "too many comparisons"),
    ],
)  # fmt: skip
def test_what_is_no_filter(value: Any, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        filters.read_filter(value)


def test_where() -> None:
    found = filters.where(["year=2024", "author=Ada", "is_draft=false"])
    assert found is not None
    assert found.matches(ABOUT)
    assert found.matches({**ABOUT, "year": "2024"}), "rows may have numbers as text"
    assert not found.matches({**ABOUT, "author": "Bob"})
    assert filters.where([]) is None
    assert [filters.scalar(text) for text in ("1_000", "nan", "1e3", "true", "")] == ["1_000", "nan", 1000.0, True, ""]
    for wrong in ("year", "=1"):
        with pytest.raises(UsageError, match="--where KEY=VALUE"):
            filters.where([wrong])


@pytest.mark.parametrize(
    "about", [{"a": None}, {"a": [1]}, {"a": "x" * 513}, {"": 1}, {"a" * 65: 1}, {"a": float("inf")}, {"a": "\0"}, {"a": "\ud800"}, {str(n): n for n in range(17)}]
)  # fmt: skip
def test_metadata_that_no_document_can_have(about: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="cannot be used"):
        filters.check_metadata(about)


def documents(count: int = 30) -> list[Document]:
    return [
        Document(
            f"d{n}", "", f"river stone {'amber ' * (n % 5)} lantern {n}", metadata={"half": n % 2, "name": f"n{n}"}
        )
        for n in range(count)
    ]


def test_a_filtered_search_is_that_of_the_documents_that_match(tmp_path: Path, small_store: Store) -> None:
    for name, rows in (("all", documents()), ("odd", [one for one in documents() if one.metadata["half"]])):
        Library.create(tmp_path / name, small_store.tokenizer, 16)
        with Library(tmp_path / name) as library:
            library.add(rows[: len(rows) // 2])
            library.merge()
            library.add([*rows[len(rows) // 2 :], Document("plain", "", "river stone, of no half")])
            library.delete(["plain"] if name == "odd" else [])
    odd = filters.read_filter(asked("eq", "half", 1))
    with Library(tmp_path / "all") as library, Library(tmp_path / "odd") as other:
        for text in ("amber lantern", "river stone 7", "zyzzyva"):
            hits = [(hit.document, pytest.approx(hit.score)) for hit in other.search(text, 8)]
            assert [(hit.document, hit.score) for hit in library.search(text, 8, where=odd)] == hits
        assert library.get("d3").metadata == {"half": 1, "name": "n3"}  # type: ignore[union-attr]
        assert library.entries(limit=1)[0].metadata == {"half": 0, "name": "n0"}
        assert library.metadata(["d3", "plain", "no"]) == {"d3": {"half": 1, "name": "n3"}}
        library.add([Document("d3", "", "river stone", metadata={"half": 0})])
        assert "d3" not in {hit.document for hit in library.search("river stone", 40, where=odd)}, "replaced, and seen"
        library.delete(["d5"])
        library.vacuum()
        library.verify()
        one = filters.read_filter(asked("eq", "name", "n7"))
        assert [hit.document for hit in library.search("river", 5, where=one)] == ["d7"]
        mixed = LiveRetriever(library, Retriever([small_store])).search("river stone", 5, where=one)
        assert [hit.document for hit in mixed.hits] == ["d7"], "a store's documents have no metadata"


def test_a_filter_that_nothing_matches_says_why(tmp_path: Path, small_store: Store) -> None:
    Library.create(tmp_path / "library", small_store.tokenizer, 16)
    with Library(tmp_path / "library") as library:
        library.add([Document("a", "", "river stone")])
        unknown = filters.read_filter(asked("ne", "author", "Ada"))
        assert library.search("river", 3, where=unknown) == []
        assert (
            library.why_nothing("river", where=unknown)
            == "no document has the field author (fields that documents have: none)"
        )
        library.add([Document("b", "", "river", metadata={"year": 1})])
        assert library.why_nothing("river", where=unknown).endswith("(fields that documents have: year)")
        later = filters.read_filter(asked("gt", "year", 1))
        assert library.why_nothing("river", where=later) == "no document matches the filter"
        assert library.unknown_fields(later) == ""
        same = filters.read_filter(asked("eq", "year", 1))
        assert library.why_nothing("zyzzyva", where=same) == "none of its words is in a document"


def test_a_library_of_before_is_one_until_it_has_metadata(tmp_path: Path, small_store: Store) -> None:
    """Its tables are those that programs of before made; damage in the new ones is seen."""
    Library.create(tmp_path / "library", small_store.tokenizer, 16)
    path = tmp_path / "library" / "documents.sqlite"

    def version() -> Any:
        connection = apsw.Connection(str(path))
        try:
            return connection.pragma("user_version")
        finally:
            connection.close()

    with Library(tmp_path / "library") as library:
        library.add([Document("a", "", "river")])
    assert version() == 2
    with Library(tmp_path / "library") as library:
        library.add([Document("b", "", "stone", metadata={"year": 1})])
        library.reset()
        library.add([Document("c", "", "stone", metadata={"year": 2})])
    assert version() == 3
    connection = apsw.Connection(str(path))
    assert connection.execute("SELECT count(*) FROM metadata").fetchall() == [(1,)], "a reset leaves none behind"
    connection.execute("""UPDATE metadata SET fields = '{"year": 3}'""")
    connection.close()
    with Library(tmp_path / "library", is_read_only=True) as library:
        for ask in (
            library.verify,
            lambda: library.get("c"),
            lambda: library.search("stone", where=filters.read_filter(asked("eq", "year", 3))),
        ):
            with pytest.raises(StoreError, match="the metadata of document"):
                ask()


def test_answers_are_kept_by_what_is_asked(tmp_path: Path, small_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """True, 1 and 1.0 are equal to Python; searches of several threads keep theirs one after the other."""
    monkeypatch.setattr("retro_engine.library.library.MOST_MATCHES", 2)
    Library.create(tmp_path / "library", small_store.tokenizer, 16)
    with Library(tmp_path / "library") as library:

        class Guarded(dict[Any, Any]):
            def __setitem__(self, key: Any, value: Any) -> None:
                assert library._matches_lock.locked()
                super().__setitem__(key, value)

            def __delitem__(self, key: Any) -> None:
                assert library._matches_lock.locked()
                super().__delitem__(key)

        library._matches = Guarded()
        library.add([Document(f"{value}", "", "river", metadata={"is": value}) for value in (True, 1, 2.5)])
        for _ in range(2):
            for value, names in ((True, ["True"]), (1, ["1"]), (1.0, ["1"]), (2.5, ["2.5"])):
                one = filters.read_filter(asked("eq", "is", value))
                assert [hit.document for hit in library.search("river", 3, where=one)] == names
                assert [hit.document for hit in library.search("river", 3, where=one)] == names, "as it was kept"
                assert len(library._matches) <= 2


@pytest.mark.parametrize(
    "ask",
    [
        lambda library: library.get("a").metadata == {},
        lambda library: [entry.metadata for entry in library.entries()] == [{}],
        lambda library: library.metadata(["a"]) == {},
        lambda library: library.search("river", 3, where=filters.read_filter(asked("eq", "year", 1))) == [],
    ],
)
def test_who_reads_sees_no_table_that_came_later(
    tmp_path: Path, small_store: Store, monkeypatch: pytest.MonkeyPatch, ask: Callable[[Library], bool]
) -> None:
    """A snapshot of before the tables for metadata: they are made after it was taken, and before it is asked."""
    Library.create(tmp_path / "library", small_store.tokenizer, 16)
    with Library(tmp_path / "library") as library:
        library.add([Document("a", "", "river")])
        version = library.file.version

        def overtaken(connection: apsw.Connection | None = None) -> int:
            found = version(connection)
            if connection is not None:
                library.file.extend()
            return found

        monkeypatch.setattr(library.file, "version", overtaken)
        assert not library.file.is_extended
        assert ask(library)
        assert library.file.is_extended
