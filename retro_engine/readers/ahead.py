"""What begins before a model is there, and goes on while PyTorch is imported.

A question's passages are found in a process of its own: half of a command's time is imports, of what searches in the one process, of
what answers in the other. It is forked, so only where nothing has started threads yet. After it, in a thread, the files that a
reader is opened from are compared with their hashes. What searches is imported where it is called: the other process does without.
"""

import contextlib
import multiprocessing
import os
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retro_engine.data.checkpoint_files import COMPLETE, opened
from retro_engine.errors import RetroError, UsageError
from retro_engine.progress import Reporter
from retro_engine.readers.bases import base_path
from retro_engine.readers.places import home, kept_type
from retro_engine.readers.reader_file import Reader, ReadingSettings

if TYPE_CHECKING:
    from retro_engine.library.file_states import Synced
    from retro_engine.readers.documents import Documents
    from retro_engine.retrieval.hit import Found

MOST_CHARACTERS = 2000  # of a question


def checked_question(question: str) -> str:
    """On one line. Raises UsageError for an empty or huge one."""
    if not isinstance(question, str) or not question.strip():
        raise UsageError("the question is empty", "there is nothing to answer", "ask for something")
    if len(question) > MOST_CHARACTERS:
        why = f"at most {MOST_CHARACTERS:,} are read"
        raise UsageError(f"the question has {len(question):,} characters", why, "ask one question, and shortly")
    if any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in question):
        raise UsageError("the question is not text", "it holds a NUL character or half of a surrogate pair")
    return " ".join(question.split())


@dataclass(frozen=True, kw_only=True)
class Comparing:
    """Files of a reader that are compared with their hashes meanwhile; results raise what `base_path` and `opened` raise."""

    base: Future[Path]
    kept: dict[Path, Future[Path]]  # folders of readers/kept.py


def compare(reader: Reader, base: str | Path | None, dtype: str | None) -> Comparing:
    """Begin with `base` (as of `base_path`), then with what was kept in `dtype`; where None is asked for and two types were kept, it is
    not known yet which is opened.
    """
    pool = ThreadPoolExecutor(1, "comparing")
    found = pool.submit(base_path, reader, base)
    folders = [folder for folder in _kept(reader) if dtype is None or folder.name.startswith(kept_type(dtype))]
    kept = {folder: pool.submit(opened, folder) for folder in folders} if len(folders) == 1 else {}
    pool.shutdown(wait=False)
    return Comparing(base=found, kept=kept)


@dataclass(frozen=True, kw_only=True)
class Searched:
    """What was found for a question, in the documents as they are now; `why`: where that is nothing."""

    found: "Found"
    synced: "Synced"
    why: str


def search(documents: "Documents", question: str, reading: ReadingSettings) -> Searched:
    """Raises what `Documents.opened` and a search raise."""
    from retro_engine.library.live import LiveRetriever

    with documents.opened() as (library, synced):
        retriever = LiveRetriever(library)
        found = retriever.search(question, reading.num_neighbors, retrieved_length=reading.retrieved_length)
        return Searched(found=found, synced=synced, why="" if found.hits else library.why_nothing(question))


class Ahead:
    """A search that has begun."""

    def __init__(self, *arguments: Any):
        """`arguments`: those of `_work` but the first."""
        self._from, to = multiprocessing.Pipe(duplex=False)
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=_work, args=(to, *arguments), daemon=True)
        self._process.start()
        to.close()

    def result(self) -> Searched | None:
        """None where it did not get there: whoever searches again meets what it met."""
        try:
            found: Searched | None = self._from.recv()  # of this process's own child
        except EOFError:
            found = None
        self._process.join()
        return found


def begin(
    reader: Reader, inputs: list[str], question: str, reporter: Reporter, format: str | None = None
) -> Ahead | None:
    """None where no process can be forked, or where the reader was never opened: its tokenizer is not there yet."""
    tokenizer = next(iter(_kept(reader)), None)
    return (
        None if tokenizer is None or not _can_fork() else Ahead(tokenizer, reader, inputs, question, reporter, format)
    )


def _kept(reader: Reader) -> list[Path]:
    """Whole folders of what opening it made."""
    found = sorted((home() / "opened" / reader.name).glob(f"*-{reader.key}"))
    return [folder for folder in found if (folder / COMPLETE).is_file()]


def _can_fork() -> bool:
    """Where there is a second core, and torch's threads are not there yet."""
    has_fork = "fork" in multiprocessing.get_all_start_methods()
    return has_fork and "torch" not in sys.modules and (os.cpu_count() or 1) > 1


def _work(
    to: Connection,
    tokenizer: Path,
    reader: Reader,
    inputs: list[str],
    question: str,
    reporter: Reporter,
    format: str | None,
) -> None:
    from retro_engine.data.tokenizer import Tokenizer
    from retro_engine.readers.documents import Documents

    found = None
    with contextlib.suppress(RetroError, OSError, KeyboardInterrupt):
        reading = reader.reading
        made = Tokenizer.load(tokenizer)
        documents = Documents(inputs, made, reading.chunk_size, reading.stride, reporter, format=format)
        found = search(documents, question, reading)
    to.send(found)
