"""The engine: the same tokens alone and together, at its own chunk boundaries, cancelled, refused, reused."""

import threading
import time
from collections.abc import Iterator, Sequence

import pytest
import torch
from helpers import small_config, small_model

from retro_engine.data.store import Store
from retro_engine.errors import StoreError, StoppedError, UsageError
from retro_engine.generate.engine import BusyError, Engine, Event, Request
from retro_engine.generate.generator import Generator
from retro_engine.generate.request import Generation
from retro_engine.generate.sampling import Sampling
from retro_engine.model.retro import RetroModel
from retro_engine.retrieval.search import Found, Retriever

M = 16
PROMPTS = ["river", "Document doc7. river stone amber lantern", "orchard " * 40, "tide ember", "falcon " * 12]


@pytest.fixture(scope="module")
def generator(small_store: Store) -> Generator:
    model = small_model(vocab_size=small_store.vocab_size, chunk_size=M, encoder_seq_length=64, seed=3)
    return Generator(model, small_store.tokenizer, Retriever([small_store]))


@pytest.fixture(scope="module")
def engine(generator: Generator) -> Iterator[Engine]:
    with Engine(generator, max_batch=4) as engine:
        yield engine


def requests() -> list[Request]:
    """Mixed lengths; given, retrieved and no neighbors; sampled and greedy."""
    sampled = Sampling(greedy=False, seed=5, top_p=0.9)
    return [
        Request(PROMPTS[0], 40),
        Request(PROMPTS[1], 33, neighbors=["river stone copper", "falcon ember", "tide"]),
        Request(PROMPTS[2], 20, num_neighbors=1),
        Request(PROMPTS[3], 50, sampled),
        Request(PROMPTS[4], 25, neighbors=[]),
        Request(PROMPTS[1], 30, retrieved_length=20, refresh="never"),
        Request(PROMPTS[0], 8, Sampling(repetition_penalty=1.3, min_tokens=4), pad_prompt=False),
    ]


def test_alone_in_a_batch_and_in_the_plain_generator(generator: Generator, engine: Engine) -> None:
    alone = [generator.run([request])[0] for request in requests()]
    assert [out.tokens for out in generator.run(requests())] == [out.tokens for out in alone]
    for _ in range(2):  # the second time from the prefix cache
        streams = [engine.submit(request) for request in requests()]
        found = [stream.result() for stream in streams]
        assert [out.tokens for out in found] == [out.tokens for out in alone]
        assert [out.text for out in found] == [out.text for out in alone]
        assert [out.segments for out in found] == [out.segments for out in alone]


def test_logits_of_a_mixed_batch(generator: Generator) -> None:
    """fp64: within 1e-9 of those of each sequence alone."""
    options = {"logprobs": 5}
    mixed = [Request(request.prompt, 30, neighbors=request.neighbors, **options) for request in requests()[:5]]
    for request, out in zip(mixed, generator.run(mixed)):
        alone = generator.run([request])[0]
        assert out.logprobs is not None
        assert alone.logprobs is not None
        for one, other in zip(out.logprobs, alone.logprobs, strict=True):
            assert one.token == other.token
            assert one.logprob == pytest.approx(other.logprob, abs=1e-9)
