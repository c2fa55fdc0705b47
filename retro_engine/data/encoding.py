"""Batches of documents -> their token ids, in the order of the documents, whoever encodes them: the tokenizer's threads in
this process, or other processes, which need no lock of this one's interpreter.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import numpy as np

from retro_engine.data.corpus import Document
from retro_engine.data.processes import end_with_parent, threads_each
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import OutOfResourceError

Encoded = tuple[list[Document], Sequence[Sequence[int] | np.ndarray]]
AHEAD = 2  # batches a process, so that none waits for the next

_tokenizer: Tokenizer | None = None  # a worker's


def encoded(tokenizer: Tokenizer, batches: Iterable[list[Document]], workers: int = 1) -> Iterator[Encoded]:
    """Each batch with its documents' ids. One worker is a thread here: the library uses every core, and no lock.

    Raises what a worker raises, and OutOfResourceError when one is gone.
    """
    if workers == 1:
        with ThreadPoolExecutor(1) as pool:
            yield from _in_order(batches, lambda texts: pool.submit(tokenizer.encode_batch, texts), 1)
        return
    context = get_context("spawn")
    with threads_each(max(1, len(os.sched_getaffinity(0)) // workers)):
        processes = ProcessPoolExecutor(workers, context, _open, (tokenizer.json,))
        try:
            yield from _in_order(batches, lambda texts: processes.submit(_encode, texts), AHEAD * workers)
        except BrokenProcessPool as error:
            raise OutOfResourceError(
                "a process that encodes died",
                "something killed it; usually there was no memory left",
                "the same command goes on after the last finished shard; --workers 1 needs the least memory",
            ) from error
        finally:
            processes.shutdown(cancel_futures=True)


def _in_order(batches, submit, ahead: int) -> Iterator[Encoded]:  # type: ignore[no-untyped-def]
    waiting: deque[tuple[list[Document], Future]] = deque()  # type: ignore[type-arg]
    for batch in batches:
        waiting.append((batch, submit([document.text for document in batch])))
        if len(waiting) > ahead:
            documents, found = waiting.popleft()
            yield documents, found.result()
    for documents, found in waiting:
        yield documents, found.result()


def _open(serialized: str) -> None:
    """In a worker, once."""
    global _tokenizer
    end_with_parent()
    _tokenizer = Tokenizer(serialized)


def _encode(texts: list[str]) -> list[np.ndarray]:
    assert _tokenizer is not None
    return [np.array(ids, np.int32) for ids in _tokenizer.encode_batch(texts)]
