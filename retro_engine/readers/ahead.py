"""A question and its passages, found before a model is there: in a process of its own beside the one that opens it.

Half of a command's time is imports: of what searches in the one process, of what answers in the other. The other process is
forked, so only where nothing has started threads yet.
"""

import contextlib
import multiprocessing
import os
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from retro_engine.data.checkpoint_files import COMPLETE
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import RetroError, UsageError
from retro_engine.library.live import LiveRetriever
from retro_engine.progress import Reporter
from retro_engine.readers.documents import Documents, Synced
from retro_engine.readers.places import home
from retro_engine.readers.reader_file import Reader, ReadingSettings
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
class Searched:
    """What was found for a question, in the documents as they are now; `why`: where that is nothing."""

    found: Found
    synced: Synced
    why: str


def search(documents: Documents, question: str, reading: ReadingSettings) -> Searched:
    """Raises what `Documents.opened` and a search raise."""
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
    kept = sorted((home() / "opened" / reader.name).glob(f"*-{reader.key}"))  # readers/kept.py
    tokenizer = next((folder for folder in kept if (folder / COMPLETE).is_file()), None)
    return (
        None if tokenizer is None or not _can_fork() else Ahead(tokenizer, reader, inputs, question, reporter, format)
    )


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
    found = None
    with contextlib.suppress(RetroError, OSError, KeyboardInterrupt):
        reading = reader.reading
        made = Tokenizer.load(tokenizer)
        documents = Documents(inputs, made, reading.chunk_size, reading.stride, reporter, format=format)
        found = search(documents, question, reading)
    to.send(found)
