"""Documents that are added are encoded before they are asked for, as long as there is room."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import small_model

from retro_engine.data.corpus import Document
from retro_engine.data.store import Store
from retro_engine.library.library import Library
from retro_engine.model.encodings import Encodings
from retro_engine.retrieval.search import Retriever
from retro_engine.serve import encode_ahead
from retro_engine.serve.encode_ahead import EncodeAhead
from retro_engine.serve.service import ServiceOptions, open_service
from retro_engine.train.checkpoint import publish_model

GREEDY = {"greedy": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
TEXT = (
    "river stone amber lantern orchard harbor winter copper thistle meadow falcon ember willow granite cedar tide " * 2
)


def until(is_true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_is_added_to_a_server_is_encoded_and_read(
    small_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_ahead, "EVERY_S", 0.01)
    for name, crossing in (("alone", []), ("query", [0])):
        model = small_model(
            vocab_size=small_store.vocab_size, chunk_size=16, encoder_seq_length=64, enc_cross_attention=crossing
        )
        publish_model(tmp_path / name, model.float(), small_store.tokenizer, {"imported": "here"}, GREEDY)
    service = open_service(ServiceOptions(run=str(tmp_path / "query"), library=str(tmp_path / "other"), stores=[]))
    assert service.ahead is None
    service.close()
    Library.create(tmp_path / "library", small_store.tokenizer, 16, 8)
    with Library(tmp_path / "library") as library:
        library.add([Document("old", "", f"before anybody looked {TEXT}")])
    service = open_service(ServiceOptions(run=str(tmp_path / "alone"), library=str(tmp_path / "library"), stores=[]))
    opened, ahead, encodings = service.library, service.ahead, service.generator.encodings
    assert opened is not None and ahead is not None and encodings is not None
    opened.delete(["old"])
    opened.add([Document(f"d{number}", "", f"document {number} says {TEXT}") for number in range(3)])
    until(lambda: ahead.seen == opened.version)
    found = encodings.stats.hits + encodings.stats.misses
    assert found == opened.statistics()["namespaces"]["default"]["chunks"], "all that came, and nothing that was there"
    opened.add([Document("d1", "", f"another {TEXT}")])
    until(lambda: ahead.seen == opened.version)
    before = replace(encodings.stats)
    assert before.hits + before.misses > found
    service.generator.generate(TEXT, 20)
    assert encodings.stats.misses == before.misses and encodings.stats.hits > before.hits, (
        "as retrieval hands them over"
    )
    service.close()


def test_nothing_is_forgotten_for_it(small_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_ahead, "EVERY_S", 0.01)
    model = small_model(vocab_size=small_store.vocab_size, chunk_size=16, encoder_seq_length=64, enc_cross_attention=[])
    encodings = Encodings(model, 10 * 32 * 2 * 2 * 24 * 8)  # ten neighbors
    tokens, lengths = Retriever([small_store]).loader.gather(np.arange(8), 32)
    read = torch.from_numpy(tokens), torch.from_numpy(lengths)
    encodings.of(*read)
    Library.create(tmp_path / "library", small_store.tokenizer, 16)
    with Library(tmp_path / "library") as library:
        ahead = EncodeAhead(library, encodings, model.config.r)
        library.add([Document(f"d{number}", "", f"document {number} says {TEXT}") for number in range(9)])
        until(lambda: ahead.seen == library.version)
        ahead.close()
    before = encodings.stats.hits
    encodings.of(*read)
    assert encodings.stats.hits == before + 8
