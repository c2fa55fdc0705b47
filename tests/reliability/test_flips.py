"""A bit is flipped in any byte of any published file: a typed error that names the folder, or the same answer.

Some bytes of each kind here; with RETRO_CAMPAIGN=1 every byte, up to 20,000 of a kind (MOST), and what is counted is printed.
"""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reliability.replay import Tree, tree_of
from reliability.runs import CAMPAIGN, SEED, counted
from reliability.workloads import WORKLOADS, Place, make_library, opened, take, texts_of

from retro_engine.data.checkpoint_files import find_checkpoint
from retro_engine.data.neighbor_table import NeighborTable
from retro_engine.data.store import Store
from retro_engine.errors import RetroError
from retro_engine.generate.open_model import open_model
from retro_engine.model.encoding_file import EncodingFile
from retro_engine.retrieval.index import VectorIndex
from retro_engine.retrieval.lexical import Bm25Index
from retro_engine.train import checkpoint

MOST, FEW = {"library": 5_000, "encodings": 2_000, "run": 10_000}, 25  # those that take longer; 20,000 of the others
QUERIES = ["river stone amber", "lantern orchard harbor"]
Answer = Callable[[Path], Any]


def of_store(folder: Path) -> Any:
    store = Store(folder)
    names = [store.name(document) for document in range(store.num_documents)]
    rows = [part.tobytes() for part in store.rows(0, store.num_rows)]
    store.verify()
    return store.tokenizer.json, names, rows, store.documents.tobytes(), store.row_documents().tobytes()


def of_table(folder: Path) -> Any:
    store = Store(folder)
    table = NeighborTable(folder / "neighbors" / "bm25", store)
    return table.ids(np.arange(store.num_rows), 4).tobytes()


def of_words(folder: Path) -> Any:
    return [part.tobytes() for part in Bm25Index(folder / "index" / "bm25", Store(folder)).search(QUERIES, 5)]


def of_vectors(folder: Path) -> Any:
    store = Store(folder)
    tokens, lengths = store.rows(0, 4)
    found = VectorIndex(folder / "index" / "hash", store, "hash").search(tokens, lengths, 5)
    return [part.tobytes() for part in found]


def of_library(folder: Path) -> Any:
    place = Place(folder, folder, folder, folder)
    with opened(place) as library:
        library.verify()
        return texts_of(library), library.version, library.search(QUERIES[0], 10, "hybrid")


def of_run(folder: Path) -> Any:
    found = find_checkpoint(folder)
    checkpoint.verify(found)
    opened = open_model(folder)
    weights = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in opened.model.state_dict().values()))
    return weights.hexdigest(), opened.tokenizer.json, checkpoint.read_generation(found)


def of_encodings(folder: Path) -> Any:
    found = EncodingFile(folder)
    found.verify()
    return found.summary()


def make_store(place: Place) -> Path:
    return Path(shutil.copytree(place.store, place.root / "store"))


def make_vectors(place: Place) -> Path:
    WORKLOADS["vectors"].begin(place)
    WORKLOADS["vectors"].act(place, lambda text: None)
    return place.root / "store"


def make_lived_in(place: Place) -> Path:
    make_library(place)
    with opened(place) as library:
        for texts in ({"a": "river stone amber", "b": "lantern orchard " * 20}, {"c": "harbor winter"}, {"a": None}):
            take(library, texts)
            library.merge()
    return place.root


def make_encodings(place: Place) -> Path:
    WORKLOADS["encodings"].begin(place)
    WORKLOADS["encodings"].act(place, lambda text: None)
    return place.root / "encodings"


def make_trained(place: Place, name: str) -> Path:
    WORKLOADS[name].begin(place)
    return place.root / "new" / "run"


KINDS: dict[
    str, tuple[Callable[[Place], Path], str, Answer]
] = {  # what makes it, where its own files lie, what it says
    "store": (make_store, "", of_store),
    "table": (make_store, "neighbors/bm25", of_table),
    "words": (make_store, "index/bm25", of_words),
    "vectors": (make_vectors, "index/hash", of_vectors),
    "library": (make_lived_in, "", of_library),
    "model": (lambda place: Path(shutil.copytree(place.encoder, place.root / "model")), "", of_run),
    "encodings": (make_encodings, "", of_encodings),
    "run": (lambda place: make_trained(place, "checkpoint"), "checkpoints", of_run),
    "adapters": (lambda place: make_trained(place, "adapters"), "checkpoints", of_run),
}
IN_SUITE = [name for name in KINDS if name not in ("run", "adapters")]  # those are trained


def put_back(folder: Path, tree: Tree) -> None:
    """What opening has made, or made again, is undone."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if str(path.relative_to(folder)) not in tree:
            path.rmdir() if path.is_dir() else path.unlink()
    for name, content in tree.items():
        path = folder / name
        if content is None:
            path.mkdir(exist_ok=True)
        elif not path.exists() or path.read_bytes() != content:
            path.unlink(missing_ok=True)
            path.write_bytes(content)


def _told(answer: Answer, folder: Path, where: str) -> tuple[str, Any]:
    """The error, or the answer. Raises AssertionError for an error that is untyped, or says that the system lacks something."""
    try:
        return "", answer(folder)
    except Exception as error:
        if isinstance(error, RetroError) and error.exit_code == 3:
            return str(error), None
        raise AssertionError(where) from error


@pytest.mark.parametrize("name", KINDS if CAMPAIGN else IN_SUITE)
def test_a_flipped_bit(name: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    make, under, answer = KINDS[name]
    place.root.mkdir()
    folder = make(place)
    expected, tree = answer(folder), tree_of(folder)
    own = {
        path: content
        for path, content in tree.items()
        if content and path.startswith(under) and (name != "store" or "/" not in path)
    }
    places = [(path, byte) for path, content in own.items() for byte in range(len(content))]
    rng = np.random.default_rng(SEED)
    chosen = rng.permutation(len(places))[: MOST.get(name, 20_000) if CAMPAIGN else FEW]
    num_told = 0
    for path, byte in (places[number] for number in chosen.tolist()):
        content = bytearray(own[path])
        bit = int(rng.integers(8))
        content[byte] ^= 1 << bit
        (folder / path).unlink()
        (folder / path).write_bytes(content)
        where = f"bit {bit} of byte {byte} of {path}, seed {SEED}"
        told, found = _told(answer, folder, where)
        num_told += bool(told)
        assert told or found == expected, where
        assert not told or str(folder) in told, f"{where}: {told}"
        if name == "library":
            put_back(folder, tree)
        else:
            (folder / path).unlink()
            (folder / path).write_bytes(own[path])
    assert num_told > len(chosen) / 6  # much of a library's file is free space
    with capsys.disabled():
        if CAMPAIGN:
            said = f"{len(chosen)} of {len(places)} bytes in {len(own)} files"
            print(counted(f"flips, {name}: {said}, {num_told} told, 0 untyped, 0 wrong"))
