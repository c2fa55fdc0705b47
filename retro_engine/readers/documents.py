"""A user's own files as a live library that follows them: read once, and again where they changed.

HOME/documents/KEY/ belongs to the paths that were named, as absolute ones, and to how the texts are cut: library/ (a live
library) and files.json (version 1: STATE), which says of each file what was read. It is made anew where the two do not fit,
which a kill between their writes leaves. Who changes them takes turns; who only searches waits for nobody but a writer.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from retro_engine.data import files, manifests
from retro_engine.data.corpus import Reader as FileReader
from retro_engine.data.identity import file_id
from retro_engine.data.inputs import checked_inputs
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import MissingInputError, StoreError, UnavailableError
from retro_engine.library.documents import MAX_DOCUMENT_BYTES
from retro_engine.library.file_states import FILE_STATE, FileState, Synced, state_of
from retro_engine.library.following import Follower, Found, changed, gone, look
from retro_engine.library.library import Library
from retro_engine.progress import Reporter
from retro_engine.readers.places import home, in_turn, make_private, patiently

STATE_FILE, VERSION = "files.json", 1
TRIES = 20  # to find files, state and library of one time while others write
STATE = manifests.fields(
    {
        "version": manifests.whole(VERSION, VERSION),
        "library": manifests.COUNT,  # its version
        "files": manifests.mapping(manifests.text(), FILE_STATE),
    }
)


@dataclass(kw_only=True)
class State:
    library: int = 0
    files: dict[str, FileState] = field(default_factory=dict)


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
        format: str | None = None,
    ):
        """`folder`: where the library is kept (None: under `places.home`); `format`: what all files are (None: their suffixes say)."""
        self.inputs, self.tokenizer = checked_inputs(inputs), tokenizer
        self.chunk_size, self.stride = chunk_size, chunk_size if stride is None else stride
        self.reporter = reporter or Reporter("quiet")
        paths = sorted({os.path.abspath(one) for one in self.inputs})
        self.file_reader = FileReader(max_document_bytes=MAX_DOCUMENT_BYTES, format=format)
        told = [tokenizer.fingerprint, self.chunk_size, self.stride, [os.fsencode(p).hex() for p in paths]]
        key = json.dumps(told if format is None else [*told, format])
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
            state, (found, unread) = self._state(), self._look()
            if state is None or not is_right or changed(state.files, found) or gone(state.files, found, unread):
                state, read, removed = self._follow()
                num_read, num_removed = num_read + read, num_removed + removed
            if not any(one.documents for one in state.files.values()):
                raise MissingInputError("there is no document to read", _reasons(state), "name other files")
            with self._searchable() as library:
                is_right = library is not None and library.version == state.library
                if library is not None and is_right:
                    yield library, Synced.of(state.files.values(), num_read, num_removed)
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

    def _look(self) -> tuple[Found, list[str]]:
        return look(self.inputs, Path(os.sep), self._tell, self.file_reader.format is not None)

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
        known = {name: state_of(one, STATE_FILE) for name, one in values["files"].items()}
        return State(library=values["library"], files=known)

    def _follow(self) -> tuple[State, int, int]:
        """Read what changed, forget what is gone; what there is now, and the numbers of both."""
        with in_turn(self.folder, self.reporter.say):
            state, (found, unread) = self._state(), self._look()
            with self._writable(state) as (library, fits):
                if state is None or not fits:
                    library.reset()
                    state = State()
                follower = Follower(library, state.files, self.reporter, self._tell)
                follower.reader = self.file_reader
                removed = sorted(gone(state.files, found, unread))
                try:
                    follower.forget(removed)
                    num_read = follower.read(changed(state.files, found), found)
                    if num_read:
                        library.merge()  # else the words of what is in no segment are read at each opening
                finally:  # who is stopped has read what it read
                    state.library = library.version
                    self._publish(state)
        return state, num_read, len(removed)

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

    def _tell(self, source: str, reason: str) -> None:
        """Once for as long as this is open."""
        if (source, reason) not in self._told:
            self._told.add((source, reason))
            self.reporter.say(f"set aside: {source}: {reason}")


def _reasons(state: State) -> str:
    aside = Synced.of(state.files.values()).aside
    if not aside:
        return "no file of a kind that is read is there"
    more = f", and {len(aside) - 1:,} more" if len(aside) > 1 else ""
    return f"{aside[0].source}: {aside[0].reason}{more}"


def short(name: str) -> str:
    """A document's name for people: from the working folder where it lies in there."""
    here = file_id(Path(os.getcwd()), Path(os.sep)).rstrip("/") + "/"
    return name.removeprefix(here)
