"""What is recorded and made to fail: each workload writes something that is published, and can say whether it is whole.

`python workloads.py CALLS.SO`, preloaded with it, is a server of runs: a line of JSON a run on standard input, its result
on standard output. Each runs in a fork, so that it costs no new start.
"""

import contextlib
import copy
import functools
import gc
import io
import json
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from ctypes import CDLL
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers import write_corpus
from reliability import simulator, training
from training_helpers import PLAIN, settings

from retro_engine.config import Config, load_config
from retro_engine.data import files
from retro_engine.data.corpus import Document
from retro_engine.data.prepare import prepare
from retro_engine.data.store import Store
from retro_engine.errors import RetroError, typed
from retro_engine.generate.encode_store import encode_store
from retro_engine.generate.open_model import open_model
from retro_engine.library import codes
from retro_engine.library.documents import HashEmbedder
from retro_engine.library.importer import Importer
from retro_engine.library.library import Library
from retro_engine.model.encoding_file import EncodingFile
from retro_engine.progress import Reporter
from retro_engine.retrieval.index import VectorIndex
from retro_engine.retrieval.index_build import build_index
from retro_engine.retrieval.neighbors import build_neighbors
from retro_engine.train import checkpoint, loop
from retro_engine.train.loop import train

Say = Callable[[str], None]
codes.MIN_CHUNKS = 8  # so that Faiss writes a file as well
loop.peak_flops = lambda device, dtype: 1e12  # every process would measure it for seconds


@dataclass(frozen=True)
class Place:
    """The folder whose calls are recorded, and what is read from elsewhere: a store, a checkpoint whose encodings are kept, a
    plain decoder."""

    root: Path
    store: Path
    encoder: Path
    decoder: Path


class Workload:
    """`act` goes on where another, that was killed or failed, has ended."""

    def begin(self, place: Place) -> None:
        """What is there before."""

    def act(self, place: Place, say: Say) -> None:
        raise NotImplementedError

    def check(self, place: Place, said: tuple[str, ...]) -> None:
        """Raises AssertionError, or whatever else, where something acknowledged is lost or something torn is read."""
        raise NotImplementedError

    def outcome(self, place: Place) -> Any:
        """What is the same to the bit, however often it was interrupted."""


# A live library

STEPS: list[dict[str, str | None]] = [
    {"a": "river stone amber", "b": "lantern orchard " * 40},
    {"c": "harbor winter", "b": "copper thistle meadow"},
    {"a": None},
    {"d": "falcon ember " * 60, "e": "willow granite"},
    {"c": "cedar tide"},
    {"d": None},
]


def _after(count: int) -> dict[str, str]:
    found: dict[str, str | None] = {}
    for step in STEPS[:count]:
        found |= step
    return {name: text for name, text in found.items() if text is not None}


def take(library: Library, step: dict[str, str | None]) -> None:
    added = [Document(name, f"Title {name}", text) for name, text in step.items() if text is not None]
    gone = [name for name, text in step.items() if text is None]
    if added:
        library.add(added)
    if gone:
        library.delete(gone)


def opened(place: Place) -> Library:
    return Library(place.root / "new" / "deep" / "library", delta_chunks=10**9)  # nothing is merged unasked


def make_library(place: Place) -> None:
    tokenizer = Store(place.store).tokenizer
    Library.create(place.root / "new" / "deep" / "library", tokenizer, 8, 4, HashEmbedder(tokenizer))


def texts_of(library: Library) -> dict[str, str]:
    found = {}
    for entry in library.entries():
        document = library.get(entry.id)
        assert document is not None
        assert document.title == entry.title == f"Title {entry.id}"
        found[document.id] = document.text
    return found


def _is_seen(library: Library) -> None:
    """What is there is found, and nothing else."""
    library.verify()
    for name, text in texts_of(library).items():
        assert name in {hit.document for hit in library.search(text.split()[0], 100)}, name


class LibraryCreate(Workload):
    def act(self, place: Place, say: Say) -> None:
        from retro_engine.library.file import is_made

        if not is_made(place.root / "new" / "deep" / "library"):
            make_library(place)
        say("made")

    def check(self, place: Place, said: tuple[str, ...]) -> None:
        if said:
            with opened(place) as library:
                assert library.version == 0


class LibraryAdd(Workload):
    """Adds, replacements and deletions."""

    def begin(self, place: Place) -> None:
        make_library(place)

    def act(self, place: Place, say: Say) -> None:
        with opened(place) as library:
            for number in range(_done(texts_of(library)), len(STEPS)):
                take(library, STEPS[number])
                say(str(number + 1))

    def check(self, place: Place, said: tuple[str, ...]) -> None:
        with opened(place) as library:
            known = int(said[-1]) if said else 0
            assert texts_of(library) in [_after(number) for number in range(known, len(STEPS) + 1)][:2]
            _is_seen(library)


def _done(texts: dict[str, str]) -> int:
    return next(number for number in reversed(range(len(STEPS) + 1)) if _after(number) == texts)


class LibraryMerge(Workload):
    """Segments of deltas, one segment of several, and a file without what was deleted."""

    def begin(self, place: Place) -> None:
        make_library(place)
        with opened(place) as library:
            for step in STEPS[:3]:
                take(library, step)

    def act(self, place: Place, say: Say) -> None:
        with opened(place) as library:
            for number in range(_done(texts_of(library)), len(STEPS)):
                library.merge()
                say("merged")
                take(library, STEPS[number])
                say(str(number + 1))
            library.merge(is_all=True)
            library.vacuum()
            say("whole")

    def check(self, place: Place, said: tuple[str, ...]) -> None:
        numbers = [int(word) for word in said if word.isdigit()]
        with opened(place) as library:
            known = numbers[-1] if numbers else 3
            assert texts_of(library) in [_after(number) for number in range(known, len(STEPS) + 1)][:2]
            _is_seen(library)


class LibraryImport(Workload):
    """A stream that is kept in the library until its job is done."""

    def begin(self, place: Place) -> None:
        make_library(place)

    def act(self, place: Place, say: Say) -> None:
        rows = [{"id": name, "title": f"Title {name}", "text": text} for name, text in _after(2).items()]
        with opened(place) as library, Importer(library) as importer:
            importer.recover()
            if not importer.jobs():
                importer.start(io.BytesIO("".join(json.dumps(row) + "\n" for row in rows).encode()))
                say("taken")
            job = importer.wait(importer.jobs()[0].number)
            if job.state == "failed":
                raise FailedJobError(job.reason, "", "import it again")
            if texts_of(library) == _after(2):
                say("done")

    def check(self, place: Place, said: tuple[str, ...]) -> None:
        with opened(place) as library, Importer(library) as importer:
            if said:
                importer.recover()
                job = importer.wait(importer.jobs()[0].number)
                assert job.state == "done", job
            assert texts_of(library) in ([_after(2)] if said else [{}, _after(2)])
            _is_seen(library)


class FailedJobError(RetroError):
    """A job says of itself why it failed."""

    exit_code = 5


class LibraryReset(Workload):
    def begin(self, place: Place) -> None:
        LibraryMerge().begin(place)
        with opened(place) as library:
            library.merge()

    def act(self, place: Place, say: Say) -> None:
        with opened(place) as library:
            library.reset()
            say("empty")

    def check(self, place: Place, said: tuple[str, ...]) -> None:
        with opened(place) as library:
            assert texts_of(library) in ([{}] if said else [{}, _after(3)])
            _is_seen(library)


# A run

STEP = ["trainer.max_steps=2", "exp_manager.checkpoint_every_n_steps=1", "trainer.limit_val_batches=0"]


class Checkpoint(Workload):
    """Two checkpoints, of which the second takes the first one's place."""

    more = [*PLAIN, *STEP, "exp_manager.keep_last_n=1"]

    def begin(self, place: Place) -> None:
        with self._ends_after(1):
            self._train(place)

    def act(self, place: Place, say: Say) -> None:
        waited, step = checkpoint.Saver.wait, [0]
        saved = checkpoint.Saver.save

        def save(saver: checkpoint.Saver, number: int, *rest: Any, **named: Any) -> None:
            saved(saver, number, *rest, **named)
            step[0] = number

        def wait(saver: checkpoint.Saver) -> None:
            waited(saver)
            if step[0]:
                say(str(step[0]))

        checkpoint.Saver.save, checkpoint.Saver.wait = save, wait  # type: ignore[method-assign]
        self._train(place)
        say("2")

    def _train(self, place: Place) -> None:
        train(of_run(place, *settings(Store(place.store), Path("run"), *self.more)), Reporter("quiet"))

    def outcome(self, place: Place) -> Any:
        last = checkpoint.folder_of(place.root / "new" / "run", 2)
        return files.sha256_file(last / next(iter(path.name for path in last.glob("*.safetensors"))))

    @contextlib.contextmanager
    def _ends_after(self, steps: int) -> Iterator[None]:
        before, self.more = self.more, [*self.more, f"trainer.max_steps={steps}"]
        yield
        self.more = before

    def check(self, place: Place, said: tuple[str, ...]) -> None:
        run = place.root / "new" / "run"
        found = checkpoint.complete_checkpoints(run, lambda text: None)
        for folder in found:
            checkpoint.verify(folder)
        assert found, "there was one"
        assert int(found[-1].name.rpartition("-")[2]) >= max(map(int, said), default=1)


class Adapters(Checkpoint):
    """The same with adapters beside frozen weights."""

    def _train(self, place: Place) -> None:
        lora = [
            *("model.chunk_size=16", "model.encoder_seq_length=64", "model.enc_num_layers=1", "model.lora.rank=2"),
            *("model.enc_cross_attention=[0]", "model.micro_batch_size=2", "model.data.splits_string='80,20,0'"),
            *("trainer.precision=32", f"model.data.store='{place.store}'", "model.data.neighbors=bm25", *STEP),
            *("exp_manager.create_tensorboard_logger=false", "exp_manager.keep_last_n=1", "model.reading=prefix"),
            *("model.sink_id=0", *self.more[len(Checkpoint.more) :], f"model.init_from='{place.decoder}'"),
        ]
        train(of_run(place, *lora), Reporter("quiet"))


@functools.cache
def _loaded(*overrides: str) -> Config:
    return load_config(overrides)


def of_run(place: Place, *overrides: str) -> Config:
    """Settings of a run there; reading them takes as long as a step, so that forks get those that were read before."""
    found = copy.deepcopy(_loaded(*overrides))
    found.exp_manager.exp_dir = str(place.root / "new" / "run")
    return found


# What is built


class Prepare(Workload):
    def begin(self, place: Place) -> None:
        write_corpus(place.root.with_name("corpus.jsonl"), 12)

    def act(self, place: Place, say: Say) -> None:
        out = place.root / "new" / "store"
        if not (out / "manifest.json").is_file():
            source = place.root.with_name("corpus.jsonl")
            prepare([source], out, str(place.store / "tokenizer.json"), chunk_size=16)
        Store(out).verify()
        say("made")

    def check(self, place: Place, said: tuple[str, ...]) -> None:
        out = place.root / "new" / "store"
        if said or (out / "manifest.json").is_file():
            Store(out).verify()

    def outcome(self, place: Place) -> Any:
        return Store(place.root / "new" / "store").fingerprint


class _OfStore(Workload):
    """Something beside a store, in its folder."""

    def begin(self, place: Place) -> None:
        shutil.copytree(place.store, place.root / "store", ignore=shutil.ignore_patterns("index", "neighbors", "*tmp"))

    def build(self, place: Place, store: Store) -> None:
        raise NotImplementedError

    def open(self, place: Place, store: Store) -> Any:
        """What was built. Raises where it is not there, or not whole."""
        raise NotImplementedError

    def is_there(self, place: Place) -> bool:
        raise NotImplementedError

    def act(self, place: Place, say: Say) -> None:
        store = Store(place.root / "store")
        self.build(place, store)
        self.open(place, store)
        say("made")

    def check(self, place: Place, said: tuple[str, ...]) -> None:
        store = Store(place.root / "store")
        store.verify()
        if said or self.is_there(place):
            self.open(place, store).verify()

    def outcome(self, place: Place) -> Any:
        return self.open(place, Store(place.root / "store")).manifest["fingerprint"]


class Build(_OfStore):
    """An index of words and a neighbor table."""

    def build(self, place: Place, store: Store) -> None:
        if not self.is_there(place):
            build_neighbors(store, [store], "bm25", 4)

    def open(self, place: Place, store: Store) -> Any:
        from retro_engine.data.neighbor_table import NeighborTable

        return NeighborTable(store.folder / "neighbors" / "bm25", store)

    def is_there(self, place: Place) -> bool:
        return (place.root / "store" / "neighbors" / "bm25" / "manifest.json").is_file()


class Vectors(_OfStore):
    """Vectors and a Faiss index of them."""

    def build(self, place: Place, store: Store) -> None:
        build_index(store, "hash", store.folder / "index" / "hash", "IVF4,SQ8")

    def open(self, place: Place, store: Store) -> Any:
        return VectorIndex(store.folder / "index" / "hash", store, "hash")

    def is_there(self, place: Place) -> bool:
        return (place.root / "store" / "index" / "hash" / "manifest.json").is_file()


class Encodings(_OfStore):
    def build(self, place: Place, store: Store) -> None:
        encode_store(open_model(place.encoder), store, place.root / "encodings")

    def open(self, place: Place, store: Store) -> Any:
        return EncodingFile(place.root / "encodings")

    def is_there(self, place: Place) -> bool:
        return (place.root / "encodings" / "manifest.json").is_file()


WORKLOADS: dict[str, Workload] = {
    "create": LibraryCreate(), "add": LibraryAdd(), "merge": LibraryMerge(), "import": LibraryImport(),
    "reset": LibraryReset(), "checkpoint": Checkpoint(), "adapters": Adapters(), "prepare": Prepare(),
    "build": Build(), "vectors": Vectors(), "encodings": Encodings(),
}  # fmt: skip


# The server of runs


def _run(request: dict[str, Any], calls: CDLL) -> dict[str, Any]:
    """One run, in a fork: what was raised, and how many calls there were."""
    place, workload = Place(*map(Path, request["place"])), WORKLOADS[request["workload"]]
    what = request["what"]
    if what == "begin":
        place.root.mkdir(parents=True)
        workload.begin(place)
        return {}
    if what == "train":
        return training.train(request)
    said: list[str] = []

    def say(text: str) -> None:
        calls.calls_mark(text.encode())
        said.append(text)

    calls.calls_root(os.fsencode(place.root))
    if what == "live":
        return simulator.live(place.root / "library", Store(place.store).tokenizer, request, calls.calls_fail)
    if what == "schedule":
        return simulator.schedule(place.root / "library", Store(place.store).tokenizer, request)
    if request.get("log"):
        calls.calls_record(os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
    calls.calls_fail(*request.get("fail", (0, 0, 0)))
    result: dict[str, Any] = {}
    try:
        workload.act(place, say)
    except Exception as error:
        known = typed(error)
        result = {"raised": type(error).__name__, "is_typed": known is not None, "text": str(known or error)}
        result |= {"exit_code": known.exit_code if known else 1, "has_remedy": bool(known and known.do)}
        result["trace"] = traceback.format_exc()
    count = calls.calls_count()
    calls.calls_fail(0, 0, 0)
    return {**result, "said": said, "count": count}


def _warm(request: dict[str, Any]) -> None:
    """Do it once where nothing is recorded: what is imported and compiled for it is then there in every fork."""
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder, "root"), *map(Path, request["place"][1:]))
        place.root.mkdir()
        WORKLOADS[request["workload"]].begin(place)
        WORKLOADS[request["workload"]].act(place, lambda text: None)


def serve() -> None:
    calls, warm = CDLL(sys.argv[1]), set()
    for line in sys.stdin:
        request = json.loads(line)
        if request["workload"] not in warm:
            _warm(request)
            warm.add(request["workload"])
            gc.freeze()  # a fork does not copy what the collector would touch
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            try:
                answer = _run(request, calls)
            except BaseException:
                answer = {"raised": "the test's own", "is_typed": False, "text": traceback.format_exc()}
            last = answer.pop("last", None)
            with os.fdopen(writing, "w") as out:
                json.dump(answer, out)
            if last is not None:
                last()
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as answers:
            found = answers.read()
        _, status = os.waitpid(child, 0)
        print(found or json.dumps({"raised": f"ended with {status}", "is_typed": False, "text": ""}), flush=True)


if __name__ == "__main__":
    serve()
