"""Other processes encode what this one would, in its order; one that dies is said."""

import multiprocessing
from collections import deque
from pathlib import Path

import pytest

from retro_engine.data.corpus import Document
from retro_engine.data.encoding import encoded
from retro_engine.data.prepare import prepare
from retro_engine.data.store import Store
from retro_engine.errors import OutOfResourceError


def test_processes_encode_the_same_in_the_same_order_until_one_dies(small_store: Store) -> None:
    tokenizer = small_store.tokenizer
    batches = [
        [Document(f"{n}", "", f"{n} " * n + "stone, amber é", "f") for n in range(b, 2 * b)] for b in range(1, 9)
    ]
    here = list(encoded(tokenizer, iter(batches)))
    there = encoded(tokenizer, iter(batches), workers=2)
    for documents, ids in here[:3]:
        found, found_ids = next(there)
        assert found == documents and [row.tolist() for row in found_ids] == ids
    for worker in multiprocessing.active_children():
        worker.kill()
    with pytest.raises(OutOfResourceError, match="a process that encodes died"):
        deque(there)


def test_a_store_is_the_same_whatever_the_number_of_processes(small_store: Store, tmp_path: Path) -> None:
    source, tokenizer = tmp_path / "c.txt", str(small_store.folder / "tokenizer.json")
    source.write_text("river stone\n\namber lantern, é\n" * 3000)
    stores = [prepare([source], tmp_path / str(count), tokenizer, workers=count) for count in (1, 2)]
    assert stores[0].fingerprint == stores[1].fingerprint and stores[0].num_documents > 1
