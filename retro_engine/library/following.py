"""Files that a library follows: what is new or changed is read, what is gone is deleted, all else is left as it is.

One idea for two keepers: `retro ask` keeps what was read of each file beside a library of its own (readers/documents.py), `sync`
keeps it in the library, in the transactions that the documents are written in, so that a kill leaves nothing half known. A file
that is one document has its path as its id, a row its file's and its place: what a file held is known when it has changed.
"""

import errno
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import apsw

from retro_engine.data import files
from retro_engine.data.corpus import Document, Reader, in_batches
from retro_engine.data.identity import file_id
from retro_engine.data.inputs import SetAside, check_file, find_files, shown
from retro_engine.errors import MissingInputError, StoreError, UsageError
from retro_engine.library import extension
from retro_engine.library.documents import MAX_DOCUMENT_BYTES, check_document, check_namespace
from retro_engine.library.file_states import UNREAD, FileState, Synced, state_of
from retro_engine.library.importer import BATCH_CHARACTERS, BATCH_DOCUMENTS
from retro_engine.library.library import DEFAULT, Library
from retro_engine.progress import Reporter

FRESH_NS = 2_000_000_000  # a file that changed so shortly before it was read may change again unseen
GONE = (errno.ENOENT, errno.ENOTDIR)
MOST_ASIDE = 100  # reasons kept of a file; all are counted
Found = dict[str, tuple[Path, os.stat_result]]  # files by their names
Say = Callable[[str, str], None]  # source and reason of what is set aside


def look(inputs: Sequence[str | Path], root: Path, say: Say, of_any_kind: bool = False) -> tuple[Found, list[str]]:
    """The files that are there now, by their names from `root`; and names of what could not be looked into."""
    paths, passed_over = find_files(inputs, of_any_kind)
    faults = [row for row in passed_over if row.is_fault]
    for row in faults:
        say(row.source, row.reason)
    found, unread = {}, [file_id(Path(row.source), root) for row in faults]
    for path in paths:
        try:
            found[file_id(path, root)] = path, check_file(path)
        except MissingInputError as error:  # since it was found
            say(shown(path), error.what if _is_gone(error) else f"{error.what}: {error.why}")
            unread += [] if _is_gone(error) else [file_id(path, root)]
    return found, unread


def changed(known: Mapping[str, FileState], found: Found) -> list[str]:
    """Files that are new, or whose size or time is another one."""
    return [
        name
        for name, (_, stat) in found.items()
        if name not in known or (known[name].size, known[name].modified) != (stat.st_size, stat.st_mtime_ns)
    ]


def gone(known: Mapping[str, FileState], found: Found, unread: Sequence[str]) -> list[str]:
    """Files that were read and are no longer there; not those in what could not be looked into."""
    return [name for name in known if name not in found and not _is_under(name, unread)]


@dataclass(frozen=True)
class Change:
    """What a file's reading, or its end, changes; `state` None: it is forgotten."""

    name: str
    state: FileState | None
    good: Sequence[Document]
    deleted: Sequence[str]


class Follower:
    """Brings a library up to date with files; `known` is what was read of them, and is kept up to date too."""

    def __init__(
        self, library: Library, known: dict[str, FileState], reporter: Reporter, say: Say, namespace: str = DEFAULT
    ):
        self.library, self.known, self.reporter, self.say = library, known, reporter, say
        self.namespace = namespace
        self.reader = Reader(max_document_bytes=MAX_DOCUMENT_BYTES)
        self.put_off: list[SetAside] = []  # files of which is kept what they held
        self._changes: list[Change] = []  # that are not written yet
        self.root: str | None = None  # of the folder in whose name the library itself keeps `known`
        self.check: Callable[[], None] = lambda: None  # called before each file; ends the work by raising

    def forget(self, names: Iterable[str]) -> int:
        """Delete what files held; how many files."""
        forgotten = list(names)
        for name in forgotten:
            self._queue(name, None, deleted=self.known[name].ids(name))
        self._flush()
        return len(forgotten)

    def read(self, names: Sequence[str], found: Found) -> int:
        """Read files that changed; how many had another content."""
        num_read = 0
        total = sum(found[name][1].st_size for name in names)
        with self.reporter.progress("reading documents", total, "bytes") as meter:
            for name in names:
                self.check()
                path, stat = found[name]
                old = self.known.get(name)
                try:
                    now = FileState(size=stat.st_size, modified=_trusted(stat), sha256=files.sha256_file(path))
                except (OSError, StoreError) as error:
                    why = f"it cannot be read: {getattr(error, 'strerror', None) or error}"
                    self._put_off(name, SetAside(shown(path), why), _is_gone(error))
                    meter.advance(stat.st_size)
                    continue
                if old is not None and old.sha256 == now.sha256:
                    self._queue(name, replace(old, size=now.size, modified=now.modified))
                else:
                    self._read_file(name, path, now)
                    num_read += 1
                meter.advance(stat.st_size)
            self._flush()
        return num_read

    def _read_file(self, name: str, path: Path, now: FileState) -> None:
        """In batches; until the last is written, what is kept says that the file is to be read again, and what it held
        before stays where nothing has taken its place.
        """
        old = self.known.get(name)
        rows_before = 0 if old is None else old.last_row or 0
        state, aside, written, last = UNREAD, list[SetAside](), set[str](), 0
        rows = self.reader.read([path])
        batches = in_batches(rows, BATCH_CHARACTERS, BATCH_DOCUMENTS)
        batch: list[Document | SetAside] | None = next(batches, [])
        while batch is not None:
            fault = next((row for row in batch if isinstance(row, SetAside) and row.is_unread), None)
            if fault is not None:
                self._put_off(name, fault, is_gone=False, begun=state if written else None)
                return
            good = _usable(batch, name, aside)
            batch = next(batches, None)
            written.update(row.id for row in good)
            last = max([last, *(int(row.id.rpartition(":")[2]) for row in good if row.path is None)])
            state = replace(state, num_aside=len(aside), aside=_kept(aside), documents=state.documents + len(good))
            if batch is None:
                state = replace(state, last_row=last or None, size=now.size, modified=now.modified, sha256=now.sha256)
                pending = [] if old is None else [one for one in old.ids(name) if one not in written]
                self._queue(name, state, good, pending)
            else:
                state = replace(state, last_row=max(last, rows_before) or None)
                self._queue(name, state, good)
        for one in aside[:MOST_ASIDE]:
            self.say(one.source, one.reason)

    def _put_off(self, name: str, fault: SetAside, is_gone: bool, begun: FileState | None = None) -> None:
        """A file that cannot be read now is read the next time; what it held stays, unless it has gone.

        `begun`: what is kept of it since some of it was written: neither what was known of it nor what it is now.
        """
        self.say(fault.source, fault.reason)
        old = self.known.get(name)
        if old is None or is_gone or begun is not None:
            state = begun or UNREAD
            state = replace(state, num_aside=state.num_aside + 1, aside=[*_kept([fault]), *state.aside][:MOST_ASIDE])
            self._queue(name, state, deleted=old.ids(name) if old is not None and is_gone else [])
            return
        self.put_off.append(fault)
        if old.modified:
            self._queue(name, replace(old, modified=0))

    def _queue(
        self, name: str, state: FileState | None, good: Sequence[Document] = (), deleted: Sequence[str] = ()
    ) -> None:
        """Documents, deletions and what is known of a file then: written with those of other files, a disk's fsync for all."""
        self._changes.append(Change(name, state, good, deleted))
        size = sum(len(document.text) for change in self._changes for document in change.good)
        if len(self._changes) >= BATCH_DOCUMENTS or size >= BATCH_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        """Who is stopped here knows of all that may be there."""
        changes, self._changes = self._changes, []
        good = [document for change in changes for document in change.good]
        deleted = [identifier for change in changes for identifier in change.deleted]
        if good or deleted or (changes and self.root is not None):
            for change in changes:
                old = self.known.get(change.name)
                rows = max((one.last_row or 0 for one in (old, change.state) if one is not None), default=0)
                self.known[change.name] = replace(UNREAD, last_row=rows or None)
            batch = self.library.chunker.prepare(good) if good else None
            self.library.write(self.namespace, batch, deleted, partial(self._keep, changes))
        for change in changes:
            if change.state is None:
                del self.known[change.name]
            else:
                self.known[change.name] = change.state

    def _keep(self, changes: Sequence[Change], connection: apsw.Connection) -> None:
        """In the library, where it keeps them itself."""
        if self.root is None:
            return
        for change in changes:
            values = None if change.state is None else asdict(change.state)
            extension.keep_state(connection, self.root, self.namespace, change.name, values)


def _usable(batch: Sequence[Document | SetAside], name: str, aside: list[SetAside]) -> list[Document]:
    """The documents of a batch under their names; the rest goes to `aside`."""
    good = []
    for row in batch:
        if isinstance(row, SetAside):
            aside.append(row)
            continue
        try:
            check_document(named := _named(row, name))
            good.append(named)
        except UsageError as error:
            aside.append(SetAside(row.source, f"{error.what}: {error.why}"))
    return good


def _named(document: Document, name: str) -> Document:
    """With an id that only this place in the files has: a file's, or a row's in it."""
    if document.path is not None:
        return replace(document, id=name)
    title = document.title or ("" if document.id == document.source else document.id)
    return replace(document, id=f"{name}:{document.source.rpartition(':')[2]}", title=title)


def _kept(aside: Sequence[SetAside]) -> list[list[str]]:
    """As much of what is set aside as is kept of a file."""
    return [[one.source[: 1 << 12], one.reason[: 1 << 12]] for one in aside[:MOST_ASIDE]]


def _is_gone(error: BaseException) -> bool:
    """Whether a file is no longer there; what cannot be read may be there as it was."""
    cause = error.__cause__ if isinstance(error, MissingInputError) else error
    return isinstance(cause, OSError) and cause.errno in GONE


def _trusted(stat: os.stat_result) -> int:
    """The time by which a file is known to be unchanged; 0 where it changed just now."""
    return stat.st_mtime_ns if stat.st_mtime_ns < time.time_ns() - FRESH_NS else 0


def sync(
    library: Library,
    folder: str | Path,
    namespace: str = DEFAULT,
    reporter: Reporter | None = None,
    check: Callable[[], None] = lambda: None,
) -> Synced:
    """Make a namespace hold what a folder's files hold now, beside what else is in it. `check` is called before each file
    and ends the work by raising; what was written stays, and the next time goes on.

    Raises MissingInputError for a folder that has vanished, or lost all of its files: that is no wish to delete them.
    """
    follower, root = _follower(library, folder, namespace, reporter or Reporter("quiet"))
    known, follower.check = follower.known, check
    if not os.path.isdir(folder):
        kept = f"; what was read of it stays: {len(known):,} files" if known else ""
        raise MissingInputError(f"{shown(folder)} is no folder", f"a folder is followed{kept}", _wanted(known))
    found, unread = look([folder], library.folder.resolve().parent, follower.say)
    if known and not found:
        raise MissingInputError(
            f"{shown(folder)} holds no file of a kind that is read",
            f"it held {len(known):,}: they are not taken for deleted (is it mounted?)",
            _wanted(known),
        )
    _check_alone(library, root, namespace)
    library.file.extend()
    num_removed = follower.forget(gone(known, found, unread))
    num_read = follower.read(changed(known, found), found)
    done, put_off = Synced.of(known.values(), num_read, num_removed), follower.put_off
    return replace(done, num_aside=done.num_aside + len(put_off), aside=[*done.aside, *put_off])


def forget(library: Library, folder: str | Path, namespace: str = DEFAULT) -> int:
    """Delete what was read of a folder, and follow it no more; the number of files."""
    follower, _ = _follower(library, folder, namespace, Reporter("quiet"))
    if not follower.known:
        raise MissingInputError(
            f"{shown(folder)} is not followed", f"by {library.folder}", "retro docs sync follows it"
        )
    return follower.forget(list(follower.known))


def _follower(library: Library, folder: str | Path, namespace: str, reporter: Reporter) -> tuple[Follower, str]:
    """With what the library knows of a folder."""
    check_namespace(namespace)
    root, path = file_id(Path(folder), library.folder.resolve().parent), library.file.path
    known: dict[str, FileState] = {}
    if library.file.is_extended:
        with library.file.reader() as connection:
            rows = extension.states(connection, path, root, namespace)
        try:
            known = {name: state_of(values, name) for name, values in rows.items()}
        except ValueError as error:
            raise StoreError(f"{path} is damaged", str(error), "restore it from a copy") from error
    follower = Follower(
        library, known, reporter, lambda source, why: reporter.say(f"set aside: {source}: {why}"), namespace
    )
    follower.root = root
    return follower, root


def _wanted(known: Mapping[str, FileState]) -> str:
    return "bring it back, or retro docs sync LIBRARY DIR --forget" if known else "name a folder"


def _check_alone(library: Library, root: str, namespace: str) -> None:
    """Raises UsageError for a folder within a followed one, or around it: each would delete what the other reads."""
    if not library.file.is_extended:
        return
    with library.file.reader() as connection:
        for other in extension.roots(connection, namespace):
            if other != root and (_is_under(other, [root]) or _is_under(root, [other])):
                raise UsageError(
                    f"{root} cannot be followed", f"{other} is, and holds the same files", "follow one of them"
                )


def _is_under(name: str, folders: Iterable[str]) -> bool:
    return any(name == folder or folder == "." or name.startswith(f"{folder.rstrip('/')}/") for folder in folders)
