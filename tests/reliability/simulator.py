"""A library that lives: random options, operations, failing calls, kills and restarts, against a dict; all drawn from a seed.

`live` is one life of it, in a fork of workloads.py's server: it ends with a kill, or with `close`, and says what has to be
there after it. `schedule` lets threads take turns at random places of the library's own code, and says what each has seen.
"""

import errno
import itertools
import random
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from helpers import WORDS
from reliability.linearizable import DELETE, READ, WRITE, Operation

from retro_engine.data.corpus import Document
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import typed
from retro_engine.library.documents import HashEmbedder
from retro_engine.library.filters import read_filter
from retro_engine.library.library import Library

Rows = dict[str, list[Any]]  # id -> title, text, year
Fail = Callable[[int, int, int], None]  # the n-th call from now on, with this error, of these kinds
NAMESPACES, IDS = ("default", "other"), [f"d{number}" for number in range(8)]
NUMBERS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EINTR, -1)
KILL, ALL_CALLS, NEVER = -2, 1 + 2 + 4 + 8 + 16 + 32 + 64, (0, 0, 0)


@dataclass(frozen=True)
class Options:
    chunk_size: int
    stride: int
    delta_chunks: int
    embeds: bool

    @classmethod
    def drawn(cls, rng: random.Random) -> "Options":
        size = rng.choice([4, 8, 16])
        return cls(
            size, rng.choice([size, size // 2, max(1, size - 3)]), rng.choice([4, 12, 40, 10**9]), rng.random() < 0.5
        )

    def make(self, folder: Path, tokenizer: Tokenizer) -> None:
        embedder = HashEmbedder(tokenizer) if self.embeds else None
        Library.create(folder, tokenizer, self.chunk_size, self.stride, embedder)


@dataclass(frozen=True)
class Change:
    """What is called, the namespace that it changes, what will be there, and what the call answers."""

    act: Callable[[], int]
    namespace: str
    then: Rows
    answer: int


class Life:
    """Operations on an open library, and on a dict of what must be in it."""

    def __init__(self, library: Library, known: dict[str, Rows], options: Options, rng: random.Random):
        self.library, self.known, self.options, self.rng = library, known, options, rng
        self.count, self.version = 0, library.version

    def change(self) -> Change:
        """One that is drawn."""
        rng, namespace = self.rng, self.rng.choice(NAMESPACES)
        now = dict(self.known[namespace])
        kind = rng.choice(["add"] * 5 + ["delete"] * 2 + ["reset"] * (rng.random() < 0.1))
        if kind == "reset":
            return Change(lambda: self.library.reset(namespace), namespace, {}, len(now))
        if kind == "delete":
            names = rng.sample(IDS, rng.randint(1, 3))
            then = {name: row for name, row in now.items() if name not in names}
            return Change(lambda: self.library.delete(names, namespace), namespace, then, len(now) - len(then))
        rows = {}
        for name in rng.sample(IDS, rng.randint(1, 3)):
            text = " ".join(rng.choice(WORDS) for _ in range(rng.choice([1, 5, 30, 60])))
            rows[name] = [f"Title {rng.randrange(9)}", text, rng.choice([None, rng.randrange(3)])]
        documents = [_document(name, row) for name, row in rows.items()]
        return Change(lambda: self.library.add(documents, namespace), namespace, now | rows, self.version + 1)

    def step(self) -> None:
        """One operation that succeeds."""
        self.count += 1
        what = self.rng.choices(["change", "search", "merge", "all", "vacuum", "list"], [50, 25, 6, 3, 1, 15])[0]
        if what == "change":
            change = self.change()
            found = change.act()
            assert found == change.answer, (found, change.answer)
            self.known[change.namespace] = change.then
            self.version += 1
        elif what == "search":
            self.search(self.rng.choice(NAMESPACES))
        elif what == "list":
            self.check(self.rng.choice(NAMESPACES))
        elif what == "vacuum":
            self.library.vacuum()
        else:
            self.library.merge(is_all=what == "all")
        assert self.library.version == self.version, what

    def search(self, namespace: str) -> None:
        """Of a word: exactly those that have it; of vectors: nothing that is not there. With a filter: of those alone."""
        rng, rows = self.rng, self.known[namespace]
        word, year = rng.choice(WORDS), rng.choice([None, None, 0, 1])
        where = None if year is None else read_filter({"type": "eq", "key": "year", "value": year})
        rows = {name: row for name, row in rows.items() if year is None or row[2] == year}
        more = " ".join(rng.choice(WORDS) for _ in range(rng.randrange(3)))
        for mode, text, k in [
            *(
                (mode, f"{word} {more}", rng.randint(1, 40))
                for mode in ("lexical", "dense", "hybrid")[: 1 + 2 * self.options.embeds]
            ),
            ("lexical", word, 500),
        ]:
            hits = self.library.search(text, k, mode, namespace, where=where)
            assert len({(hit.document, hit.chunk) for hit in hits}) == len(hits) <= k
            assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
            for hit in hits:
                assert hit.document in rows, (mode, hit.document)
                assert hit.text.strip() in rows[hit.document][1], (mode, hit.document)
            if k == 500:
                assert {hit.document for hit in hits} == {n for n, row in rows.items() if word in row[1].split()}, word

    def check(self, namespace: str) -> None:
        rows = self.known[namespace]
        page = self.rng.randint(1, 10)
        names: list[str] = []
        while entries := self.library.entries(namespace, names[-1] if names else "", page):
            names += [entry.id for entry in entries]
        assert names == sorted(rows), (namespace, names, sorted(rows))
        for name in self.rng.sample(names, min(2, len(names))):
            assert self.library.get(name, namespace) == _document(name, rows[name]), (namespace, name)

    def holds(self, namespace: str, rows: Rows) -> bool:
        return {entry.id: self.library.get(entry.id, namespace) for entry in self.library.entries(namespace)} == {
            name: _document(name, row) for name, row in rows.items()
        }


def _document(name: str, row: list[Any]) -> Document:
    return Document(name, row[0], row[1], metadata={} if row[2] is None else {"year": row[2]})


def _settled(life: Life, namespace: str, rows: list[Rows]) -> None:
    """Of what may be there, what is."""
    found = [row for row in rows if life.holds(namespace, row)]
    assert found, f"{namespace} holds neither what was there nor what was to be"
    life.known[namespace] = found[0]


def _fails(life: Life, fail: Fail) -> bool:
    """A change during which a call fails: it is done, or a typed error says that it is not. Returns whether one was raised."""
    life.count += 1
    change = life.change()
    namespace, then = change.namespace, change.then
    fail(life.rng.randint(1, 40), life.rng.choice(NUMBERS), ALL_CALLS)
    met: Exception | None = None
    try:
        change.act()
    except Exception as error:
        met = error
    fail(*NEVER)
    before, life.version = life.version, life.library.version
    assert life.version - before in ((1,) if met is None else (0, 1))
    if met is None:
        life.known[namespace] = then
        return False
    known = typed(met)
    if known is None or not known.do:
        raise met
    _settled(life, namespace, [life.known[namespace], then])
    return True


def live(folder: Path, tokenizer: Tokenizer, request: dict[str, Any], fail: Fail) -> dict[str, Any]:
    """Life `number` of the library of `seed`; `known`: what is there, `maybe`: what else a killed change may have left."""
    options = Options.drawn(random.Random(request["seed"]))
    rng = random.Random(f"{request['seed']} {request['number']}")
    known: dict[str, Rows] = request["known"] or {name: {} for name in NAMESPACES}
    if not request["number"]:
        options.make(folder, tokenizer)
    library = Library(folder, delta_chunks=options.delta_chunks)
    life, raised = Life(library, known, options, rng), 0
    where = f"seed {request['seed']}, life {request['number']}"
    try:
        if request["maybe"]:
            namespace, rows = request["maybe"]
            _settled(life, namespace, [known[namespace], rows])
        for namespace in NAMESPACES:
            assert life.holds(namespace, known[namespace]), f"lost: {namespace}"
        library.verify()
        while life.count < request["steps"]:
            if rng.random() < 0.15:
                raised += _fails(life, fail)
            else:
                life.step()
        change = life.change()
    except Exception as error:
        raise AssertionError(f"{where}, operation {life.count}: {options}: {error!r}") from error
    answer: dict[str, Any] = {"known": known, "count": life.count, "raised": raised, "maybe": None}
    if rng.random() < 0.3:
        library.close()
    elif rng.random() < 0.7:

        def die() -> None:
            fail(rng.randint(1, 60), KILL, ALL_CALLS)
            change.act()

        answer |= {"maybe": [change.namespace, change.then], "last": die}
    return answer  # else the process ends as it is


# Threads


class Turns:
    """One of the threads goes on at a time, and another one from a drawn function call of the library's code on. A thread that
    does not get its turn for a while takes it: whoever has it waits for a lock."""

    def __init__(self, rng: random.Random, count: int):
        self.rng, self.alive = rng, set(range(count))
        self.turns = [threading.Event() for _ in range(count)]
        self.turns[0].set()

    def run(self, me: int, act: Callable[[], None]) -> None:
        def point(frame: FrameType, event: str, argument: object) -> None:
            if "/library/" in frame.f_code.co_filename and self.rng.random() < 0.03:
                self.give(me, self.rng.choice(sorted(self.alive)))

        self.turns[me].wait(0.05)
        sys.settrace(point)
        try:
            act()
        finally:
            sys.settrace(None)
            self.alive.discard(me)
            if self.alive:
                self.turns[min(self.alive)].set()

    def give(self, me: int, other: int) -> None:
        if other != me:
            self.turns[me].clear()
            self.turns[other].set()
            self.turns[me].wait(0.005)


def schedule(folder: Path, tokenizer: Tokenizer, request: dict[str, Any]) -> dict[str, Any]:
    """Threads that add, replace, delete and read a few documents; the operations on each, and its text at the end."""
    rng = random.Random(f"threads {request['seed']}")
    options = Options.drawn(rng)
    options.make(folder, tokenizer)
    clock, count = itertools.count(), rng.randint(2, 4)
    histories: dict[str, list[Operation]] = {name: [] for name in IDS[:3]}
    turns, failures = Turns(rng, count), list[BaseException]()
    with Library(folder, delta_chunks=options.delta_chunks) as library:

        def work(me: int) -> None:
            own = random.Random(f"{request['seed']} {me}")
            for number in range(request["steps"]):
                name, kind = own.choice(IDS[:3]), own.choice([READ, READ, WRITE, DELETE, "merge"])
                begin, value = next(clock), None
                if kind == "merge":
                    library.merge(is_all=own.random() < 0.3)
                    continue
                if kind == WRITE:
                    value = f"{own.choice(WORDS)} {me} {number}"
                    library.add([Document(name, "", value)])
                elif kind == DELETE:
                    value = "yes" if library.delete([name]) else "no"
                else:
                    found = library.get(name)
                    value = None if found is None else found.text
                histories[name].append(Operation(begin, next(clock), kind, value))

        def caught(me: int) -> None:
            try:
                work(me)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=turns.run, args=(me, lambda me=me: caught(me))) for me in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    with Library(folder) as library:
        library.verify()
        for name, history in histories.items():
            found = library.get(name)
            text = None if found is None else found.text
            history.append(Operation(next(clock), next(clock), READ, text))
    return {"histories": [[asdict(each) for each in history] for history in histories.values()]}
