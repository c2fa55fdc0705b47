"""The engine: the same tokens alone and together, at its own chunk boundaries, cancelled, refused, reused."""

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from helpers import small_config, small_model

from retro_engine.data.store import Store
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import StoppedError, StoreError, UsageError
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
        Request(PROMPTS[3], 50, sampling=sampled),
        Request(PROMPTS[4], 25, neighbors=[]),
        Request(PROMPTS[1], 30, retrieved_length=20, refresh="never"),
        Request(PROMPTS[0], 8, sampling=Sampling(repetition_penalty=1.3, min_tokens=4), pad_prompt=False),
    ]


def test_alone_in_a_batch_and_in_the_plain_generator(generator: Generator, engine: Engine) -> None:
    alone = [generator.generate_all([request])[0] for request in requests()]
    assert [out.tokens for out in generator.generate_all(requests())] == [out.tokens for out in alone]
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
    for request, out in zip(mixed, generator.generate_all(mixed)):
        alone = generator.generate_all([request])[0]
        assert out.logprobs is not None
        assert alone.logprobs is not None
        for one, other in zip(out.logprobs, alone.logprobs, strict=True):
            assert one.token == other.token
            assert one.logprob == pytest.approx(other.logprob, abs=1e-9)


class SlowSource:
    """A retriever that waits for `gate` wherever a text has `word`, and fails for "broken"."""

    def __init__(self, source: Retriever, word: str = "falcon"):
        self.source, self.word, self.gate = source, word, threading.Event()
        self.name, self.coding = source.name, source.coding
        self.version = "1"
        self.asked: list[str] = []

    def neighbors(
        self, texts: Sequence[str], k: int, retrieved_length: int, mode: str | None = None, where: Any = None
    ) -> list[Found]:
        self.asked += texts
        if any("broken" in text for text in texts):
            raise StoreError("the store is damaged", "a checksum differs", "build it again")
        if any(self.word in text for text in texts):
            assert self.gate.wait(30)
        return self.source.neighbors(texts, k, retrieved_length)


@pytest.fixture
def slow(generator: Generator, small_store: Store) -> Generator:
    return Generator(generator.model, small_store.tokenizer, SlowSource(Retriever([small_store])))


def test_others_go_on_while_one_retrieves(generator: Generator, slow: Generator) -> None:
    assert isinstance(slow.retriever, SlowSource)
    with Engine(slow, retrieval_threads=2) as engine:
        waiting = engine.submit(Request("falcon", 20))
        done = engine.submit(Request("river", 20)).result()
        assert not waiting.is_done
        assert done.tokens == generator.generate("river", 20).tokens
        slow.retriever.gate.set()
        assert waiting.result().tokens == generator.generate("falcon", 20).tokens


def test_a_sequence_waits_at_its_own_chunk_boundary(generator: Generator, small_store: Store) -> None:
    """The neighbors of its second chunk are late: it stands, the other goes on, and both are what they are alone."""
    expected = generator.generate("river", 40)
    word = small_store.tokenizer.decode(expected.tokens[:M])
    source = SlowSource(Retriever([small_store]), word)
    slow = Generator(generator.model, small_store.tokenizer, source)
    with Engine(slow, retrieval_threads=2) as engine:
        first = engine.submit(Request("river", 40))
        other = engine.submit(Request("tide ember", 60)).result()
        assert not first.is_done
        assert len(first.sequence.produced) == M
        source.gate.set()
        assert first.result().tokens == expected.tokens
        assert other.tokens == generator.generate("tide ember", 60).tokens


def test_one_that_fails_ends_alone(slow: Generator) -> None:
    events: list[Event] = []
    with Engine(slow) as engine:
        good = engine.submit(Request("river", 40))
        bad = engine.submit(Request("broken", 5))
        heard = engine.submit(Request("broken", 5), events.append)

        def refuse(event: Event) -> None:
            raise RuntimeError("the reader is gone")

        deaf = engine.submit(Request("tide", 40, neighbors=[]), refuse)
        with pytest.raises(StoreError, match="a checksum differs"):
            bad.result()
        with pytest.raises(StoreError):
            list(bad)
        with pytest.raises(StoreError):
            heard.result()
        assert isinstance(events[-1].error, StoreError)
        with pytest.raises(RuntimeError, match="reader is gone"):
            deaf.result()
        assert len(good.result().tokens) == 40 or good.result().finish_reason == "stop"
        assert engine.stats()["running"] == 0


def test_bit_equal_when_deterministic(small_store: Store) -> None:
    """fp32: tokens and log-probabilities to the last bit, alone or with others, from the prefix cache or not."""
    model = small_model(vocab_size=small_store.vocab_size, chunk_size=M, encoder_seq_length=64, seed=3).float()
    generator = Generator(model, small_store.tokenizer, Retriever([small_store]))
    asked = [
        Request(
            request.prompt, request.max_new_tokens, sampling=request.sampling, neighbors=request.neighbors, logprobs=2
        )
        for request in requests()
    ]
    with Engine(generator, deterministic=True) as engine:
        alone = [engine.submit(request).result() for request in asked]
        streams = [engine.submit(request) for request in asked]
        for one, stream in zip(alone, streams, strict=True):
            assert stream.result().tokens == one.tokens
            assert stream.result().logprobs == one.logprobs


def test_in_fp32_a_batch_changes_log_probabilities_by_less_than_1e_4(small_store: Store) -> None:
    model = small_model(vocab_size=small_store.vocab_size, chunk_size=M, encoder_seq_length=64, seed=3).float()
    generator = Generator(model, small_store.tokenizer, Retriever([small_store]))
    asked = [Request(request.prompt, 30, neighbors=request.neighbors, logprobs=0) for request in requests()[:6]]
    for request, out in zip(asked, generator.generate_all(asked)):
        alone = generator.generate_all([request])[0]
        assert out.tokens == alone.tokens
        for one, other in zip(out.logprobs or [], alone.logprobs or [], strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def never_ends(engine: Engine, count: int = 2000) -> Request:
    return Request("river", count, sampling=Sampling(min_tokens=count), neighbors=[])


def test_cancelling_frees_the_row_at_once(engine: Engine) -> None:
    running = [engine.submit(never_ends(engine)) for _ in range(4)]
    for stream in running:
        next(iter(stream))
    waiting = engine.submit(Request("river", 4))
    events = [engine.submit(never_ends(engine)) for _ in range(2)]
    assert engine.stats()["running"] == 4
    assert engine.stats()["cache_bytes"] > 0
    events[0].cancel()
    assert events[0].result().finish_reason == "cancelled"
    running[1].cancel()
    assert running[1].result().finish_reason == "cancelled"
    assert 0 < len(running[1].result().tokens) < 2000
    assert waiting.result().tokens  # it got the row
    for stream in (*running, events[1]):
        stream.cancel()
        stream.cancel()
        assert stream.result().finish_reason == "cancelled"
    stats = engine.stats()
    assert (stats["running"], stats["waiting"], stats["cache_bytes"]) == (0, 0, 0)
    assert stats["tokens_per_s"] > 0


def test_a_full_queue_is_refused(generator: Generator) -> None:
    with Engine(generator, max_batch=1, max_waiting=2) as engine:
        first = engine.submit(never_ends(engine))
        next(iter(first))
        rest = [engine.submit(never_ends(engine)) for _ in range(2)]
        with pytest.raises(BusyError, match="2 requests are waiting"):
            engine.submit(Request("river"))
    assert [stream.result().finish_reason for stream in (first, *rest)] == ["cancelled"] * 3
    with pytest.raises(StoppedError, match="closed"):
        engine.submit(Request("river"))


def test_what_is_refused(engine: Engine, generator: Generator) -> None:
    size = generator.model.config.vocab_size
    eod = generator.tokenizer.eod_id
    wrong = [
        (Request(""), "prompt is empty"),
        (Request([]), "prompt is empty"),
        (Request([1, size]), f"token {size} in the prompt"),
        (Request([-1]), "token -1 in the prompt"),
        (Request([True]), "token True in the prompt"),
        (Request([1, eod, 2]), "it ends a document"),
        (Request("river", 2048), "at most 2048"),
        (Request("orchard " * 3000, 1), "at most 2048"),
        (Request("river", neighbors=["stone"] * 9), "at most 256 are read"),
        (Request("river", retrieved_length=33), "retrieved_length=33"),
        (Request("river", add_bos=True), "no beginning-of-document token"),
    ]
    for request, message in wrong:
        with pytest.raises(UsageError, match=message):
            engine.submit(request)
    with pytest.raises(UsageError, match="max_batch=0"):
        Engine(generator, max_batch=0)


def test_events_joined_are_the_text(engine: Engine) -> None:
    sampled = Sampling(greedy=False, seed=1, temperature=2.0)
    for request in (*requests(), Request("river", 200, sampling=sampled, echo=True, logprobs=1)):
        stream = engine.submit(request)
        events = list(stream)
        out = stream.result()
        assert "".join(event.text for event in events) == out.text
        assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + [out.finish_reason]
        shown = [token for event in events for token in event.tokens]
        prompt = len(shown) - len(out.tokens)
        assert shown[prompt:] == out.tokens
        assert prompt == (out.prompt_tokens if request.echo else 0)
        assert "".join(segment.text for segment in out.segments) == out.text
        starts = [event for event in events if event.new_hits is not None]
        if out.segments[0].neighbors:
            assert [event.new_hits for event in starts] == [segment.neighbors for segment in out.segments]
        if request.logprobs is not None:
            entries = [entry for event in events for entry in event.logprobs or []]
            assert entries == out.logprobs
            assert [entry.token for entry in entries] == shown


def test_a_warm_prefix_is_not_computed_again(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    import retro_engine.generate.decoding_batch as module

    taken: list[int] = []
    prefill = module.prefill

    def counted(model: RetroModel, cache: object, tokens: torch.Tensor, *rest: object, **named: object) -> torch.Tensor:
        taken.append(tokens.shape[1])
        return prefill(model, cache, tokens, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "prefill", counted)
    piece = 4 * M
    long = generator.tokenizer.encode("orchard meadow " * 60)[: 3 * piece]
    with Engine(generator) as engine:
        for neighbors in (None, [], ["river stone"]):
            taken.clear()
            first = engine.submit(Request(long[: 3 * piece - 5], 20, neighbors=neighbors)).result()
            assert len(taken) == 3
            again = engine.submit(Request(long[: 3 * piece - 5], 20, neighbors=neighbors)).result()
            assert len(taken) == 3  # all of it was there
            assert again.tokens == first.tokens
        taken.clear()  # the same beginning, another end: two pieces are there
        other = [*long[: 2 * piece + 3], *reversed(long[: piece - 3])]
        out = engine.submit(Request(other, 5, neighbors=[])).result()
        assert taken == [piece]
        assert out.tokens == generator.generate(other, 5, neighbors=[]).tokens
        before = engine.stats()["prefix_tokens_reused"]
        out = engine.submit(Request(long, 5, neighbors=["river stone copper"])).result()  # other neighbors, read late
        assert engine.stats()["prefix_tokens_reused"] >= before
        assert out.tokens == generator.generate(long, 5, neighbors=["river stone copper"]).tokens


def test_the_prefix_cache_is_bounded(generator: Generator) -> None:
    with Engine(generator, prefix_bytes=200_000) as engine:
        for number in range(6):
            engine.submit(Request(f"tide {number} " * 30, 2, neighbors=[])).result()
            assert 0 < engine.stats()["prefix_bytes"] <= 200_000
        assert sum(piece.nbytes for piece in engine.prefixes._pieces.values()) == engine.prefixes.nbytes
    with Engine(generator, prefix_bytes=0) as engine:
        engine.submit(Request("river", 2)).result()
        assert engine.stats()["prefix_bytes"] == 0


def test_many_threads_submit_and_cancel(generator: Generator) -> None:
    """Whatever leaves when, the others' tokens are theirs."""
    expected = [generator.generate_all([request])[0].tokens for request in requests()]
    wrong: list[str] = []
    with Engine(generator, max_batch=3, retrieval_threads=2) as engine:

        def work(number: int) -> None:
            for turn in range(4):
                place = (number + turn) % len(expected)
                stream = engine.submit(requests()[place])
                if (number + turn) % 3 == 0:
                    time.sleep(0.002 * turn)
                    stream.cancel()
                    stream.result()
                elif stream.result().tokens != expected[place]:
                    wrong.append(f"{number} {turn}")

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert engine.stats()["running"] == 0
    assert wrong == []


def test_a_plain_decoder_and_learned_positions(small_store: Store) -> None:
    for overrides in (
        {"retrieval": False},
        {"position_embedding": "learned", "cca_bias_everywhere": True, "bias": True},
    ):
        config = small_config(vocab_size=small_store.vocab_size, encoder_seq_length=64, chunk_size=16, **overrides)
        model = RetroModel(config, torch.Generator().manual_seed(0)).double().eval()
        retriever = None if "retrieval" in overrides else Retriever([small_store])
        generator = Generator(model, small_store.tokenizer, retriever)
        asked = [Request(prompt, 20) for prompt in ("river", "tide ember", "a")]
        with Engine(generator) as engine:
            streams = [engine.submit(request) for request in asked]
            assert [s.result().tokens for s in streams] == [generator.generate_all([r])[0].tokens for r in asked]


def test_generation_is_not_half_done(generator: Generator) -> None:
    out = generator.generate_all([])
    assert out == []
    assert isinstance(generator.generate("river", 1), Generation)


def test_neighbors_of_many_choices_are_encoded_once(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    given, encoded = ["river stone copper", "falcon ember"], list[str]()
    backend = type(generator.tokenizer).encode_batch

    def noted(self: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        encoded.extend(texts)
        return backend(self, texts)

    ids = generator.tokenizer.encode(PROMPTS[1])
    alone = generator.generate_all([Request(ids, 6, neighbors=given)])[0]
    monkeypatch.setattr(type(generator.tokenizer), "encode_batch", noted)
    with Engine(generator, max_batch=4) as engine:
        streams = engine.submit_all([Request(ids, 6, neighbors=list(given)) for _ in range(5)], [None] * 5)
        assert [stream.result().tokens for stream in streams] == [alone.tokens] * 5
    assert [text for text in encoded if text in given] == given


def test_prompts_are_remembered_for_their_caller_alone(generator: Generator) -> None:
    """The time of an answer tells nobody what another has asked; unless the engine is told that callers share."""
    ids = generator.tokenizer.encode("orchard " * 70)

    def reused(engine: Engine, caller: str) -> int:
        before = engine.stats()["prefix_tokens_reused"]
        engine.submit(Request(ids, 2, neighbors=[], caller=caller)).result()
        return int(engine.stats()["prefix_tokens_reused"]) - before

    with Engine(generator) as engine:
        assert [reused(engine, name) for name in ("a", "b", "a", "b", "ab")] == [0, 0, len(ids), len(ids), 0]
    with Engine(generator, shares_prefixes=True) as engine:
        assert [reused(engine, name) for name in ("a", "b")] == [0, len(ids)]


def test_a_caller_leaves_a_row_and_a_queue_for_another(generator: Generator) -> None:
    long = [Request("river", 400, sampling=Sampling(min_tokens=400), neighbors=[], caller="a") for _ in range(7)]
    with Engine(generator, max_batch=3, max_waiting=4) as engine:
        held = [engine.submit(request) for request in long[:1]]
        held += engine.submit_all(long[1:4], [None] * 3)
        deadline = time.monotonic() + 20
        while engine.stats()["running"] < 2:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        with pytest.raises(BusyError):
            engine.submit_all(long[:4], [None] * 4)
        engine.submit(Request("tide", 3, neighbors=[], caller="b")).result()
        assert not any(stream.is_done for stream in held)
        assert engine.stats()["running"] == 2
        for stream in held:
            stream.cancel()
