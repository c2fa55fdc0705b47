"""Hostile files with repaired checksums: whoever wrote them, a typed error or an answer, in time and in memory.

Each value of each manifest, setting and header is replaced by each of a list of hostile ones, and all fingerprints on the
way are made right again. A sample here; all of them with RETRO_CAMPAIGN=1.
"""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apsw
import numpy as np
import pytest

from retro_engine.data import array_file, files, manifests
from retro_engine.data.corpus import Document
from retro_engine.data.loader import NeighborLoader
from retro_engine.data.neighbor_table import NeighborTable
from retro_engine.data.store import Store
from retro_engine.errors import RetroError, StoreError
from retro_engine.generate.encode_store import encode_store
from retro_engine.generate.open_model import open_model
from retro_engine.generate.sampling import Sampling
from retro_engine.library.documents import HashEmbedder
from retro_engine.library.library import Library
from retro_engine.library.search import dense, lexical
from retro_engine.library.segment_files import open_segment
from retro_engine.library.segments import View
from retro_engine.memory.ngram_memory import NgramMemory, build_ngram_memory, ngram_folder
from retro_engine.model.encoding_file import EncodingFile
from retro_engine.model.retro import RetroModel
from retro_engine.model.weights import read_config
from retro_engine.retrieval.analyzer import Analyzer
from retro_engine.retrieval.index import VectorIndex
from retro_engine.retrieval.index_build import build_index
from retro_engine.retrieval.left_out import LeftOut
from retro_engine.retrieval.lexical import Bm25Index
from retro_engine.retrieval.quality import quality
from retro_engine.retrieval.vectors import Vectors
from retro_engine.train import checkpoint

IS_CAMPAIGN = bool(os.environ.get("RETRO_CAMPAIGN"))
SAMPLE = 25  # mutations of a file, where all are not tried
SECONDS, MEMORY = (
    4.0 if IS_CAMPAIGN else 8.0,
    1 << 30,
)  # of one mutation; what is promised is 2 s on a machine of its own
GONE = object()
HOSTILE: list[Any] = [
    *(None, True, False, -1, 0, 1, 65_536, 1 << 31, (1 << 63) - 1, 1 << 63, -(1 << 63), 1 << 200),
    *(0.5, -0.0, 1e308, float("nan"), float("inf"), "", "a", "..", "../../x", "/dev/zero", "a\0b", "\ud800", "0" * 64),
    *(
        "x" * 100_000,
        "IVF9999999999,Flat",
        [],
        {},
        [None],
        {"a": 1},
        [[[[[[[[[[[[0]]]]]]]]]]]],
        {"../x": "0" * 64},
        GONE,
    ),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a table, indexes, vectors and a memory, a library with a segment, a checkpoint and its encodings of the store."""
    from helpers import small_config, write_corpus

    from retro_engine.data.prepare import prepare
    from retro_engine.retrieval.neighbors import build_neighbors

    folder = tmp_path_factory.mktemp("made")
    store = prepare([write_corpus(folder / "corpus.jsonl", 12)], folder / "store", vocab_size=300, chunk_size=16)
    build_neighbors(store, [store], "bm25", num_neighbors=3)
    build_index(store, "hash", store.folder / "index" / "hash", "IVF2,Flat")
    build_index(store, "hash", store.folder / "index" / "flat", "Flat")
    Library.create(folder / "library", store.tokenizer, 8, 4, HashEmbedder(store.tokenizer))
    with Library(folder / "library") as library:
        library.add([Document(f"d{i}", "A title", f"river stone amber number{i}x") for i in range(6)])
        library.merge()
        library.add([Document("late", "", "a late quarry"), Document("d1", "", "another text")])
    model = RetroModel(small_config(vocab_size=store.vocab_size, chunk_size=16, enc_cross_attention=[]))
    sampling = {"greedy": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    checkpoint.publish_model(folder / "checkpoint", model, store.tokenizer, {"imported": "here"}, sampling)
    encode_store(open_model(folder / "checkpoint"), store, folder / "encodings")
    build_ngram_memory(store, ngram_folder(store))
    return folder


@contextlib.contextmanager
def bounded(what: object) -> Iterator[None]:
    """The block ends in time, takes no more memory than it may, and raises nothing but our errors."""

    def too_late(*_: object) -> None:
        raise AssertionError(f"{what} takes longer than {SECONDS} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, too_late)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    except RetroError as error:
        str(error).encode()  # it can be printed
    except AssertionError:
        raise
    except BaseException as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error!s:.300}") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def use_store(folder: Path) -> None:
    store = Store(folder)
    store.summary()
    ids = np.array([0, store.num_rows - 1, -1])
    for is_native in (None, False):
        NeighborLoader([store], is_native).gather(ids, 20)
    assert store.tokenizer.vocab_size == store.vocab_size
    assert len(store.row_documents()) == len(store.rows(0, store.num_rows)[0]) == store.num_rows
    for document in {0, store.num_documents - 1}:
        store.name(document)
        store.continuation(store.document_rows(document)[0])
    next(store.texts())
    store.verify()


def use_table(folder: Path) -> None:
    table = NeighborTable(folder, Store(folder.parent.parent))
    ids = table.ids(np.arange(table.query.num_rows), table.num_neighbors)
    for chunk in ids[ids >= 0][:4]:
        table.locate(int(chunk))
    table.summary()
    quality(table, 10)
    table.verify()


def use_bm25(folder: Path) -> None:
    index = Bm25Index(folder, Store(folder.parent.parent))
    index.search(["river stone amber", "nothing"], 5)
    index.frequencies(Analyzer().query("river"))
    index.summary()
    index.verify()


def use_vector_index(folder: Path) -> None:
    index = VectorIndex(folder, Store(folder.parent.parent))
    left_out = LeftOut.of(np.arange(index.num_chunks, dtype=np.int32)).for_queries(np.zeros(3, np.int32))
    index.search_vectors(index.vectors.rows(0, 3), 5, left_out)
    index.summary()
    index.verify()


def use_vectors(folder: Path) -> None:
    vectors = Vectors(folder, Store(folder.parent.parent))
    vectors.take(np.arange(3))
    vectors.summary()
    vectors.verify()


def use_segment(folder: Path) -> None:
    with apsw_of(folder.parent.parent) as connection:
        ((settings,),) = list[Any](connection.execute("SELECT value FROM settings WHERE name = 'fingerprint'"))
    mark = str(files.read_json(folder / "manifest.json").get("fingerprint", ""))
    view = View.whole(open_segment(folder, json.loads(settings), mark))
    lexical((view,), Analyzer().query("river stone amber"), 5)
    if view.part.all_vectors(1) is not None:
        dense((view,), np.ones(256, np.float32), 5)
    view.without([2]).document(0)
    view.alive_keys()


def use_library(folder: Path) -> None:
    for is_read_only in (True, False):
        with Library(folder, is_read_only=is_read_only) as library:
            for mode in ("lexical", "hybrid"):
                for hit in library.search("river stone quarry", 5, mode):
                    assert isinstance(hit.document, str)
            for entry in library.entries():
                document = library.get(entry.id)
                assert document is None or isinstance(document.text, str)
            library.statistics()
            library.verify()
            if not is_read_only:
                library.add([Document("new", "", "a new text")])
                library.merge(is_all=True)
                assert library.search("new", 3)


def use_checkpoint(folder: Path) -> None:
    checkpoint.verify(checkpoint.find_checkpoint(folder))
    assert checkpoint.read_trainer(folder)["step"] >= 0
    Sampling(**checkpoint.read_generation(folder))
    read_config(folder)


def use_encodings(folder: Path) -> None:
    encoded = EncodingFile(folder)
    tokens, lengths = NeighborLoader([Store(folder.parent / "store")]).gather(np.arange(4), 32)
    for row, length in zip(tokens, lengths):
        encoded.find(row[:length].tobytes())
    encoded.summary()
    encoded.verify()


@contextlib.contextmanager
def apsw_of(folder: Path) -> Iterator[apsw.Connection]:
    connection = apsw.Connection(str(folder / "documents.sqlite"))
    try:
        yield connection
    finally:
        connection.close()


def use_ngram(folder: Path) -> None:
    memory = NgramMemory(folder)
    memory.without(memory.parts[0].contents[:2])[0].guesses(np.array([7, 9, 1 << 20, 7, 9]))
    memory.summary()
    memory.verify()


Path_ = tuple[Any, ...]


def places(value: Any, here: Path_ = ()) -> Iterator[Path_]:
    """Where every value of some JSON is."""
    if here:
        yield here
    for name, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*here, name))


def changed(body: Any, place: Path_, value: Any) -> Any:
    """A copy with another value at a place."""
    out = json.loads(json.dumps(body))
    inner = out
    for name in place[:-1]:
        inner = inner[name]
    if value is GONE:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return out


def mutations(body: Any, seed: str) -> Iterator[tuple[object, Any]]:
    """What was changed, and the whole with it."""
    every = [(place, value) for place in places(body) for value in HOSTILE]
    for place, value in every if IS_CAMPAIGN else random.Random(seed).sample(every, min(SAMPLE, len(every))):
        yield f"{seed} {place} = {value!r:.40}", changed(body, place, value)


def replaced(path: Path, raw: bytes) -> None:
    path.unlink()
    path.write_bytes(raw)


USERS: dict[str, Callable[[Path], None]] = {
    "store": use_store,
    "store/neighbors/bm25": use_table,
    "store/index/bm25": use_bm25,
    "store/index/hash": use_vector_index,
    "store/index/flat": use_vector_index,
    "store/embeddings/hash": use_vectors,
    "library/segments/00000001": use_segment,
    "library": use_library,
    "checkpoint": use_checkpoint,
    "encodings": use_encodings,
    "store/memory/ngram": use_ngram,
}


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "copy")


def test_what_is_made_is_used(copy: Path) -> None:
    """Else the tests below would only see one early error."""
    for name, use in USERS.items():
        use(copy / name)


@pytest.mark.parametrize("name", [name for name in USERS if name not in ("library", "checkpoint")])
def test_manifests(copy: Path, name: str) -> None:
    path = copy / name / "manifest.json"
    body = json.loads(path.read_text())
    del body["fingerprint"]
    for what, content in mutations(body, name):
        with bounded(what):
            with contextlib.suppress(RecursionError, UnicodeEncodeError):
                replaced(path, json.dumps({**content, "fingerprint": files.fingerprint(content)}).encode())
            USERS[name](copy / name)


@pytest.mark.parametrize("name", ["trainer.json", "generation_config.json", "config.json", "COMPLETE"])
def test_checkpoints(copy: Path, name: str) -> None:
    folder = copy / "checkpoint"
    whole = json.loads((folder / "COMPLETE").read_text())
    for what, content in mutations(json.loads((folder / name).read_text()), name):
        replaced(folder / name, json.dumps(content).encode())
        if name != "COMPLETE":
            replaced(folder / "COMPLETE", json.dumps({**whole, name: files.sha256_file(folder / name)}).encode())
        with bounded(what):
            use_checkpoint(folder)


def test_settings_of_a_library(copy: Path) -> None:
    folder = copy / "library"
    with apsw_of(folder) as connection:
        rows: list[Any] = connection.execute("SELECT name, value FROM settings").fetchall()
    settings = {name: json.loads(value) for name, value in rows if name != "fingerprint"}
    raw = (folder / "documents.sqlite").read_bytes()
    for what, content in mutations(settings, "settings"):
        replaced(folder / "documents.sqlite", raw)
        with apsw_of(folder) as connection:
            connection.execute("DELETE FROM settings")
            for name, value in {**content, "fingerprint": files.fingerprint(content)}.items():
                connection.execute("INSERT INTO settings VALUES (?, ?)", (name, json.dumps(value)))
        with bounded(what):
            use_library(folder)


VALUES: list[Any] = [
    None,
    -1,
    0,
    1 << 62,
    -(1 << 63),
    0.5,
    "",
    "00000001",
    "default",
    "\0",
    b"",
    b"\xff" * 7,
    b"\xff" * 1024,
]


def test_rows_of_a_library(copy: Path) -> None:
    """Every column of every table, of types that SQLite does not check when it reads."""
    folder = copy / "library"
    raw = (folder / "documents.sqlite").read_bytes()
    tables = ("counter", "namespaces", "documents", "segments")
    with apsw_of(folder) as connection:
        columns = [(t, row[1]) for t in tables for row in list[Any](connection.execute(f"PRAGMA table_info({t})"))]
    every = [(table, column, value) for table, column in columns for value in VALUES]
    for table, column, value in every if IS_CAMPAIGN else random.Random(0).sample(every, 60):
        replaced(folder / "documents.sqlite", raw)
        try:
            hostile_row(folder, table, column, value)
        except apsw.Error:
            continue  # a key cannot be that
        with bounded(f"{table}.{column} = {value!r:.40}"):
            use_library(folder)


def hostile_row(folder: Path, table: str, column: str, value: Any) -> None:
    """Put a value into the last row of a table, past its type, and make its checksums right."""
    with apsw_of(folder) as connection:
        ((sql,),) = list[Any](connection.execute("SELECT sql FROM sqlite_schema WHERE name = ?", (table,)))
        connection.execute("PRAGMA writable_schema = ON")
        loose = sql.replace(") STRICT", ")").replace(" NOT NULL", "")
        connection.execute("UPDATE sqlite_schema SET sql = ? WHERE name = ?", (loose, table))
    with apsw_of(folder) as connection:
        connection.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = (SELECT max(rowid) FROM {table})", (value,))
        if table == "documents" and not column.endswith("_crc"):
            names = "namespace || char(0) || id || char(0) || title || char(0)"
            parts = ", ".join(f"CAST({part} AS BLOB)" for part in (names, "tokens", "vectors", "text"))
            for key, *raws in list[Any](connection.execute(f"SELECT key, {parts} FROM documents")):
                start, tokens, vectors, text = (raw or b"" for raw in raws)
                marks = zlib.crc32(tokens, zlib.crc32(start)), zlib.crc32(vectors), zlib.crc32(text, zlib.crc32(start))
                connection.execute(
                    "UPDATE documents SET tokens_crc = ?, vectors_crc = ?, text_crc = ? WHERE key = ?", (*marks, key)
                )
    with apsw_of(folder) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("UPDATE sqlite_schema SET sql = ? WHERE name = ?", (sql, table))


def hostile_arrays(raw: bytes, rng: np.random.Generator) -> Iterator[tuple[object, bytes]]:
    """Headers and values of an array file changed, and its checksums right."""
    fields = list(array_file.HEADER.unpack(raw[:128]))
    values = raw[128 : 128 + fields[8]]
    numbers = (0, 1, 2, 1 << 20, 1 << 31, 1 << 40, (1 << 47) + 1, (1 << 63) + 1, (1 << 64) - 1)
    for place in (6, 7, 8):
        for number in numbers:
            yield f"header {place} = {number}", packed([*fields[:place], number, *fields[place + 1 :]], values)
    yield "no columns", packed([*fields[:6], 1 << 40, 0, 0, *fields[9:]], b"")
    for code in (b"u1", b"u2", b"u4", b"i4", b"i8", b"O", b"\xff\xff", b""):
        yield f"code {code!r}", packed([*fields[:5], code, *fields[6:]], values)
    for fill in (b"\xff" * len(values), bytes(len(values)), bytes(rng.integers(0, 256, len(values), np.uint8))):
        yield f"values {fill[:4]!r}", packed(fields, fill)


def packed(fields: list[Any], values: bytes) -> bytes:
    blocks = [values[start : start + array_file.BLOCK] for start in range(0, len(values), array_file.BLOCK)]
    head = array_file.HEADER.pack(*fields[:-4], len(blocks), *fields[-3:-1], 0)[:-4]
    return (
        head + struct.pack("<I", zlib.crc32(head)) + values + b"".join(struct.pack("<I", zlib.crc32(b)) for b in blocks)
    )


@pytest.mark.parametrize("part", ["tokens", "lengths", "rows", "documents", "names", "ids", "values", "index"])
def test_array_files(copy: Path, part: str) -> None:
    name = {"ids": "store/neighbors/bm25", "values": "encodings", "index": "encodings"}.get(part, "store")
    path = copy / name / ("index.bin" if part == "index" else f"{part}-00000.bin")
    for what, raw in hostile_arrays(path.read_bytes(), np.random.default_rng(0)):
        replaced(path, raw)
        with bounded(f"{part}: {what}"):
            USERS[name](copy / name)


def hostile_npy(raw: bytes) -> Iterator[tuple[object, bytes]]:
    end = raw.index(b"\n") + 1
    head, values = raw[10:end].decode(), raw[end:]
    shape = head[head.index("(") : head.index(")") + 1]
    for other in (
        "(-1,)",
        "(0,)",
        "(4611686018427387904,)",
        "()",
        "(1, 2, 3, 4)",
        "('a',)",
        "(None,)",
        "(True,)",
        "(1e9,)",
    ):
        yield f"shape {other}", raw[:8] + npy_head(head.replace(shape, other)) + values
    for descr in ("'|O'", "'<f8'", "'>i4'", "[('a', '<i4')]", "'<U9999999'", "None", "7", "'" + "(" * 200 + "'"):
        yield (
            f"type {descr:.20}",
            raw[:8] + npy_head(head.replace(head.split("'descr': ")[1].split(", 'f")[0], descr)) + values,
        )
    yield "no header", raw[:8] + npy_head("{}") + values
    yield "deep header", raw[:8] + npy_head("(" * 5000) + values
    for fill in (b"\xff" * len(values), bytes(len(values)), b"\x7f" * len(values), os.urandom(len(values))):
        yield f"values {fill[:4]!r}", raw[:end] + fill
    yield "cut", raw[:-3]


def npy_head(text: str) -> bytes:
    return struct.pack("<H", len(text)) + text.encode()


@pytest.mark.parametrize("name", [name for name in USERS if name.count("/") == 2])
def test_npy_files_and_vocabularies(copy: Path, name: str) -> None:
    """Each with the SHA-256 that the manifest gives made right."""
    folder = copy / name
    body = json.loads((folder / "manifest.json").read_text())
    del body["fingerprint"]
    rng = random.Random(name)
    for path in sorted(folder.glob("*.npy")) + sorted(folder.glob("vocabulary.json")):
        whole = path.read_bytes()
        if path.suffix == ".npy":
            every = list(hostile_npy(whole))
        else:
            words = {**json.loads(whole), "other": 0}
            texts = [
                "[]",
                "{}",
                "7",
                "[" * 100_000,
                json.dumps(words),
                '{"a": "b"}',
                '{"a": 1e400}',
                '{"a": -1}',
                "\xff",
            ]
            every = [(text[:20], text.encode("latin-1")) for text in texts]
        for what, raw in every if IS_CAMPAIGN else rng.sample(every, min(8, len(every))):
            replaced(path, raw)
            content = {**body, "files": {**body["files"], path.name: files.sha256_file(path)}}
            replaced(
                folder / "manifest.json", json.dumps({**content, "fingerprint": files.fingerprint(content)}).encode()
            )
            with bounded(f"{path.name}: {what}"):
                USERS[name](folder)
        replaced(path, whole)


@pytest.mark.parametrize("name", USERS)
def test_what_is_no_file(copy: Path, name: str) -> None:
    """A pipe would be waited for, a device never ends."""
    folder = copy / name
    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in (".lock", "README.md")]
    if name == "library":
        paths += [folder / f"documents.sqlite{end}" for end in ("-wal", "-shm", "-journal")] + [folder / ".lock"]
    for path in paths:
        raw = path.read_bytes() if path.exists() else None
        for make in (os.mkfifo, os.mkdir, lambda p: os.symlink("/dev/zero", p), bind):
            path.unlink(missing_ok=True)
            make(path)
            with bounded(f"{path.name} {files.kind_of(path)}"):
                USERS[name](folder)
            path.rmdir() if files.kind_of(path) == "a folder" else path.unlink()
        if raw is not None:
            path.write_bytes(raw)
    USERS[name](folder)


def bind(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


def test_fields_that_are_refused_are_named(copy: Path) -> None:
    path = copy / "store" / "manifest.json"
    body = json.loads(path.read_text())
    del body["fingerprint"]
    content = changed(body, ("shards", 0, "rows"), -7)
    replaced(path, json.dumps({**content, "fingerprint": files.fingerprint(content)}).encode())
    with pytest.raises(StoreError, match=r"store\.shards\[0\]\.rows is -7, not a whole number of 0 to"):
        Store(copy / "store")


def test_a_writer_says_all_that_it_writes(made: Path) -> None:
    for path in made.rglob("manifest.json"):
        body = json.loads(path.read_text())
        names = body.keys() - {"kind", "version", "fingerprint"}
        manifests.check_names(body["kind"], {name: body[name] for name in names})
        with pytest.raises(AssertionError, match="not described"):
            manifests.check_names(body["kind"], {"more": 1})
