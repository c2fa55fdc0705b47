"""A user's own files as a live library that follows them: read once, and again where they changed.

HOME/documents/KEY/ belongs to the paths that were named, as absolute ones, and to how the texts are cut: library/ (a live
library) and files.json (version 1: STATE), which says of each file what was read. It is made anew where the two do not fit,
which a kill between their writes leaves. Who changes them takes turns; who only searches waits for nobody but a writer.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from retro_engine.data import files, manifests
from retro_engine.data.corpus import Document, Reader, in_batches
from retro_engine.data.identity import file_id
from retro_engine.data.inputs import SetAside, check_file, find_files, shown
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import MissingInputError, StoreError, UnavailableError, UsageError
from retro_engine.library.documents import MAX_DOCUMENT_BYTES, check_document
from retro_engine.library.importer import BATCH_CHARACTERS, BATCH_DOCUMENTS
from retro_engine.library.library import Library
from retro_engine.progress import Reporter
from retro_engine.readers.places import home, in_turn, make_private, patiently

STATE_FILE, VERSION = "files.json", 1
TRIES = 20  # to find files, state and library of one time while others write
FRESH_NS = 2_000_000_000  # a file that changed so shortly before it was read may change again unseen
MOST_ASIDE = 100  # reasons kept of a file; all are counted
STATE = manifests.fields(
    {
        "version": manifests.whole(VERSION, VERSION),
        "library": manifests.COUNT,  # its version
        "files": manifests.mapping(
            manifests.text(),
            manifests.fields(
                {
                    "size": manifests.COUNT,
                    "modified": manifests.whole(-manifests.MOST << 16, manifests.MOST << 16),
                    "sha256": manifests.FINGERPRINT,
                    "documents": manifests.COUNT,
                    "last_row": manifests.maybe(manifests.COUNT),
                    "num_aside": manifests.COUNT,
                    "aside": manifests.each(manifests.each(manifests.text(most=1 << 16))),
                }
            ),
        ),
    }
)


@dataclass(frozen=True, kw_only=True)
class FileState:
    """What was read of a file."""

    size: int
    modified: int  # ns; 0: its content has to be compared
    sha256: str
    documents: int = 0
    last_row: int | None = None  # of a file of rows, the place of the last; None = all of it is one document
    num_aside: int = 0
    aside: list[list[str]] = field(default_factory=list)  # source, reason

    def ids(self, name: str) -> list[str]:
        """All that its documents can be called."""
        return [name] if self.last_row is None else [f"{name}:{row}" for row in range(1, self.last_row + 1)]


@dataclass(kw_only=True)
class Synced:
    """What came of looking at the files."""

    num_files: int
    num_documents: int
    num_aside: int
    aside: list[SetAside]  # the first of each file
    num_read: int = 0  # files, this time
    num_removed: int = 0


@dataclass(kw_only=True)
class State:
    library: int = 0
    files: dict[str, FileState] = field(default_factory=dict)

    def synced(self) -> Synced:
        known = self.files.values()
        return Synced(
            num_files=len(known),
            num_documents=sum(one.documents for one in known),
            num_aside=sum(one.num_aside for one in known),
            aside=[SetAside(source, reason) for one in known for source, reason in one.aside],
        )


class Documents:
    """The files that `inputs` name (files, folders, patterns), searched as what they hold now."""

    def __init__(
        self,
        inputs: Sequence[str | Path],
        tokenizer: Tokenizer,
        chunk_size: int,
        stride: int | None = None,
        reporter: Reporter | None = None,
        folder: Path | None = None,
    ):
        """`folder`: where the library is kept (None: under `places.home`)."""
        if not inputs:
            raise UsageError("there are no documents", "", "name files or folders")
        self.inputs, self.tokenizer = [str(one) for one in inputs], tokenizer
        self.chunk_size, self.stride = chunk_size, chunk_size if stride is None else stride
        self.reporter = reporter or Reporter("quiet")
        paths = sorted({os.path.abspath(one) for one in self.inputs})
        key = json.dumps([tokenizer.fingerprint, self.chunk_size, self.stride, [os.fsencode(p).hex() for p in paths]])
        self.folder = folder or home() / "documents" / hashlib.sha256(key.encode()).hexdigest()[:24]
        self._told: set[tuple[str, str]] = set()

    @property
    def library_folder(self) -> Path:
        return self.folder / "library"

    @contextlib.contextmanager
    def opened(self) -> Iterator[tuple[Library, Synced]]:
        """The library, as the files are now, to search in.

        Raises MissingInputError where the files hold no document, UnavailableError where others write all the time.
        """
        make_private(self.folder.parent)
        make_private(self.folder)
        num_read = num_removed = 0
        is_right = True
        for _ in range(TRIES):
            state, found = self._state(), self._look()
            if state is None or not is_right or _changed(state, found) or state.files.keys() - found.keys():
                state, read, removed = self._follow()
                num_read, num_removed = num_read + read, num_removed + removed
            if not any(one.documents for one in state.files.values()):
                raise MissingInputError("there is no document to read", _reasons(state), "name other files")
            with self._searchable() as library:
                is_right = library is not None and library.version == state.library
                if library is not None and is_right:
                    yield library, replace(state.synced(), num_read=num_read, num_removed=num_removed)
                    return
        raise UnavailableError(f"{self.folder} changes all the time", "other processes write there", "try it again")

    @contextlib.contextmanager
    def _searchable(self) -> Iterator[Library | None]:
        """None where it cannot be read: it is made anew."""
        with contextlib.ExitStack() as stack:
            library: Library | None = None

            def take() -> None:
                nonlocal library
                library = stack.enter_context(Library(self.library_folder, is_read_only=True))

            with contextlib.suppress(StoreError, MissingInputError):
                patiently(take, self.library_folder, self.reporter.say)
            yield library

    def _look(self) -> dict[str, tuple[Path, os.stat_result]]:
        paths, passed_over = find_files(self.inputs)
        for row in passed_over:
            if row.is_fault:
                self._tell(row.source, row.reason)
        found = {}
        for path in paths:
            with contextlib.suppress(MissingInputError):  # it has gone since
                found[file_id(path, Path(os.sep))] = path, check_file(path)
        return found

    def _state(self) -> State | None:
        path = self.folder / STATE_FILE
        try:
            values = files.read_object(path, most=files.MOST_JSON_BYTES)
            STATE(values, STATE_FILE)
        except MissingInputError:
            return None
        except ValueError:
            self.reporter.say(f"{path} is damaged: the documents are read anew")
            return None
        names = FileState.__dataclass_fields__
        known = {name: FileState(**{n: one[n] for n in names}) for name, one in values["files"].items()}
        return State(library=values["library"], files=known)

    def _follow(self) -> tuple[State, int, int]:
        """Read what changed, forget what is gone; what there is now, and the numbers of both."""
        with in_turn(self.folder, self.reporter.say):
            state, found = self._state(), self._look()
            with self._writable(state) as (library, fits):
                if state is None or not fits:
                    library.reset()
                    state = State()
                changed, gone = _changed(state, found), sorted(state.files.keys() - found.keys())
                try:
                    for name in gone:
                        library.delete(state.files.pop(name).ids(name))
                    num_read = self._read(library, state, changed, found)
                    if num_read:
                        library.merge()  # else the words of what is in no segment are read at each opening
                finally:  # who is stopped has read what it read
                    state.library = library.version
                    self._publish(state)
        return state, num_read, len(gone)

    def _publish(self, state: State) -> None:
        known = {name: vars(one) for name, one in sorted(state.files.items())}
        body = {"version": VERSION, "library": state.library, "files": known}
        files.publish(self.folder / STATE_FILE, [files.json_bytes(body)])

    @contextlib.contextmanager
    def _writable(self, state: State | None) -> Iterator[tuple[Library, bool]]:
        """The library, made where there is none, and whether it is the one that `state` tells of."""
        folder = self.library_folder
        with contextlib.ExitStack() as stack:
            library: Library | None = None

            def take() -> None:
                nonlocal library
                library = stack.enter_context(Library(folder))

            try:
                patiently(take, folder, self.reporter.say)
            except (StoreError, MissingInputError):
                files.remove_tree(folder)
                Library.create(folder, self.tokenizer, self.chunk_size, self.stride)
                take()
            assert library is not None
            yield library, state is not None and library.version == state.library

    def _read(
        self, library: Library, state: State, names: list[str], found: dict[str, tuple[Path, os.stat_result]]
    ) -> int:
        num_read = 0
        total = sum(found[name][1].st_size for name in names)
        with self.reporter.progress("reading documents", total, "bytes") as meter:
            for name in names:
                path, stat = found[name]
                old = state.files.get(name)
                now = _hashed(path, stat)
                if now.aside:
                    library.delete([] if old is None else old.ids(name))
                    state.files[name] = now
                    self._tell(*now.aside[0])
                elif old is not None and old.sha256 == now.sha256:
                    state.files[name] = replace(old, size=now.size, modified=now.modified)
                else:
                    if old is not None:
                        library.delete(old.ids(name))
                    for part in self._read_file(library, name, path):
                        state.files[name] = part
                    state.files[name] = replace(
                        state.files[name], size=now.size, modified=now.modified, sha256=now.sha256
                    )
                    num_read += 1
                meter.advance(stat.st_size)
        return num_read

    def _read_file(self, library: Library, name: str, path: Path) -> Iterator[FileState]:
        """What is there of a file after each batch, as something that is to be read again."""
        state, aside = FileState(size=0, modified=0, sha256="0" * 64), list[SetAside]()
        rows = Reader(max_document_bytes=MAX_DOCUMENT_BYTES).read([path])
        for batch in in_batches(rows, BATCH_CHARACTERS, BATCH_DOCUMENTS):
            good: list[Document] = []
            for row in batch:
                try:
                    if isinstance(row, Document):
                        good.append(_named(row, name))
                        check_document(good[-1])
                    else:
                        aside.append(row)
                except UsageError as error:
                    aside.append(SetAside(good.pop().source, f"{error.what}: {error.why}"))
            places = [int(row.id.rpartition(":")[2]) for row in good if row.path is None]
            last = max(places, default=0) or state.last_row
            kept = [[one.source[: 1 << 12], one.reason[: 1 << 12]] for one in aside[:MOST_ASIDE]]
            state = replace(state, last_row=last, num_aside=len(aside), aside=kept)
            state = replace(state, documents=state.documents + len(good))
            yield state  # before it is written: what is not there can be deleted too
            if good:
                library.add(good)
        for one in aside[:MOST_ASIDE]:
            self._tell(one.source, one.reason)
        yield state

    def _tell(self, source: str, reason: str) -> None:
        """Once for as long as this is open."""
        if (source, reason) not in self._told:
            self._told.add((source, reason))
            self.reporter.say(f"set aside: {source}: {reason}")


def _named(document: Document, name: str) -> Document:
    """With an id that only this place in the files has: a file's, or a row's in it."""
    if document.path is not None:
        return replace(document, id=name)
    title = document.title or ("" if document.id == document.source else document.id)
    return replace(document, id=f"{name}:{document.source.rpartition(':')[2]}", title=title)


def _changed(state: State, found: dict[str, tuple[Path, os.stat_result]]) -> list[str]:
    """Files that are new, or whose size or time is another one."""
    return [
        name
        for name, (_, stat) in found.items()
        if name not in state.files
        or (state.files[name].size, state.files[name].modified) != (stat.st_size, stat.st_mtime_ns)
    ]


def _hashed(path: Path, stat: os.stat_result) -> FileState:
    """A file before it is read; set aside, and looked at again the next time, where it cannot be."""
    try:
        return FileState(size=stat.st_size, modified=_trusted(stat), sha256=files.sha256_file(path))
    except (OSError, StoreError) as error:
        reason = f"it cannot be read: {getattr(error, 'strerror', None) or error}"
        return FileState(size=stat.st_size, modified=0, sha256="0" * 64, num_aside=1, aside=[[shown(path), reason]])


def _trusted(stat: os.stat_result) -> int:
    """The time by which a file is known to be unchanged; 0 where it changed just now."""
    return stat.st_mtime_ns if stat.st_mtime_ns < time.time_ns() - FRESH_NS else 0


def _reasons(state: State) -> str:
    aside = state.synced().aside
    if not aside:
        return "no file of a kind that is read is there"
    more = f", and {len(aside) - 1:,} more" if len(aside) > 1 else ""
    return f"{aside[0].source}: {aside[0].reason}{more}"


def short(name: str) -> str:
    """A document's name for people: from the working folder where it lies in there."""
    here = file_id(Path(os.getcwd()), Path(os.sep)).rstrip("/") + "/"
    return name.removeprefix(here)
