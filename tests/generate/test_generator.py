"""Generation: equal to recomputing everything, neighbors that act from the prompt's last token on, attribution."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import small_config, small_model, write_corpus
from tokenizer_helpers import llama2

from retro_engine.data.chat_files import ChatFiles
from retro_engine.data.prepare import prepare
from retro_engine.data.store import Store
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import StoreError, UsageError
from retro_engine.generate.decoding_batch import DecodingBatch
from retro_engine.generate.generator import Generator, encode_neighbors
from retro_engine.generate.request import Generation, Request
from retro_engine.generate.sampling import Sampling
from retro_engine.memory.mixture import Mixture
from retro_engine.memory.next_token import MemoryBeside
from retro_engine.memory.ngram_memory import build_ngram_memory
from retro_engine.model.decoding import decode
from retro_engine.model.retro import RetroModel
from retro_engine.retrieval.search import Found, Retriever

M = 16


@pytest.fixture(scope="module")
def generator(small_store: Store) -> Generator:
    model = small_model(vocab_size=small_store.vocab_size, chunk_size=M, encoder_seq_length=64, seed=3)
    return Generator(model, small_store.tokenizer, Retriever([small_store]))


def recomputed(generator: Generator, prompt: str, count: int, texts: list[str] | None = None) -> list[int]:
    """Greedy generation by a full pass over everything at every step."""
    model, tokenizer, retriever = generator.model, generator.tokenizer, generator.retriever
    assert retriever is not None
    ids = tokenizer.encode(prompt)
    pad = -len(ids) % M
    tokens = [tokenizer.pad_id] * pad + ids
    prompt_chunks = len(tokens) // M
    for _ in range(count):
        chunks = len(tokens) // M
        if texts is None:
            keys = [tokenizer.decode(tokens[max(pad, u * M) : (u + 1) * M]) for u in range(chunks)]
            neighbors, lengths = retriever.loader.gather(retriever.search(keys, 2)[0], model.config.r)
        else:
            one, valid = encode_neighbors(tokenizer, texts, model.config.r)
            neighbors = np.repeat(one[None], chunks, 0)
            lengths = np.repeat(valid[None], chunks, 0)
            lengths[: prompt_chunks - 1] = 0
        documents = torch.tensor([[-1] * pad + [0] * (len(tokens) - pad)])
        with torch.no_grad():
            logits = model(
                torch.tensor([tokens]), torch.from_numpy(neighbors)[None], torch.from_numpy(lengths)[None], documents
            )
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[pad + len(ids) :]


@pytest.mark.parametrize("prompt", ["river", "Document doc7. river stone amber lantern", "orchard " * 40])
@pytest.mark.parametrize("texts", [None, ["river stone copper", "falcon ember", "tide"]])
def test_cached_generation_equals_recomputing(generator: Generator, prompt: str, texts: list[str] | None) -> None:
    generator.tokenizer.eod_id, kept = -1, generator.tokenizer.eod_id  # never ends early
    try:
        found = generator.generate(prompt, 40, neighbors=texts)
    finally:
        generator.tokenizer.eod_id = kept
    assert found.tokens == recomputed(generator, prompt, 40, texts)


def first_logits(generator: Generator, prompt: str, **options: Any) -> torch.Tensor:
    sequence = generator.open(Request(prompt, 4, **options))
    batch = DecodingBatch(generator.model, generator.tokenizer.pad_id, 1, sequence.total, sequence.neighbor_tokens)
    batch.join(sequence, generator.find(sequence, sequence.prompt_length))
    logits = batch.take_in()
    assert logits is not None
    return logits


def test_a_short_prompt_is_answered_with_given_neighbors(generator: Generator) -> None:
    """15 tokens, three given neighbors: removing them changes the first new token's logits."""
    prompt = "river stone am"
    assert len(generator.tokenizer.encode(prompt)) < M
    texts = ["river stone copper", "falcon ember", "tide"]
    base = first_logits(generator, prompt, neighbors=texts)
    assert (base - first_logits(generator, prompt, neighbors=[])).abs().max() > 1e-3
    assert (base - first_logits(generator, prompt, neighbors=texts[:2])).abs().max() > 1e-3
    torch.testing.assert_close(
        base, first_logits(generator, prompt, neighbors=[texts[2], texts[0], texts[1]]), rtol=0, atol=1e-10
    )
    unpadded = first_logits(generator, prompt, neighbors=texts, pad_prompt=False)
    torch.testing.assert_close(unpadded, first_logits(generator, prompt, neighbors=[]), rtol=0, atol=1e-10)
    out = generator.generate(prompt, 2, neighbors=texts, pad_prompt=False)
    assert f"the first retrieval happens at token {M}" in out.notes[0]


def test_attribution(generator: Generator) -> None:
    out = generator.generate("Document doc7. river stone amber", 40)
    assert len(out.segments) == (len(out.tokens) - 1) // M + 1
    assert "".join(segment.text for segment in out.segments) == out.text == generator.tokenizer.decode(out.tokens)
    assert all(len(segment.neighbors) <= 2 for segment in out.segments)
    assert out.neighbors == out.segments[0].neighbors
    assert out.neighbors[0].document.startswith("d")
    off = generator.generate("river", 5, neighbors=[])
    assert off.neighbors == []


def test_long_and_empty_neighbors(generator: Generator) -> None:
    out = generator.generate("river", 2, neighbors=["stone " * 100, ""])
    assert "neighbor 1 is longer than 32 tokens" in out.notes[0]
    assert "neighbor 2 is empty" in out.notes[1]
    only_empty = generator.generate("river", 8, neighbors=[""])
    assert only_empty.tokens == generator.generate("river", 8, neighbors=[]).tokens


def test_what_cannot_be_generated(generator: Generator, small_store: Store) -> None:
    for options, message in (({"max_new_tokens": 0}, "max_new_tokens"), ({"retrieved_length": 33}, "retrieved_length")):
        with pytest.raises(UsageError, match=message):
            generator.generate("river", **options)
    with pytest.raises(UsageError, match="prompt is empty"):
        generator.generate("")
    with pytest.raises(StoreError, match="the model has tokenizer"):
        Generator(generator.model, Tokenizer.train(["x"], 300), generator.retriever)


def test_models_that_cannot(small_store: Store) -> None:
    plain = Generator(
        RetroModel(small_config(vocab_size=small_store.vocab_size, retrieval=False)), small_store.tokenizer
    )
    with pytest.raises(UsageError, match="plain decoder"):
        plain.generate("river", neighbors=["stone"])
    first = RetroModel(small_config(vocab_size=small_store.vocab_size, partial_chunk="first"))
    with pytest.raises(UsageError, match="partial_chunk=first"):
        Generator(first, small_store.tokenizer)


def test_a_plain_decoder_generates(small_store: Store) -> None:
    model = RetroModel(small_config(vocab_size=small_store.vocab_size, retrieval=False))
    out = Generator(model.eval(), small_store.tokenizer).generate("river", 5)
    assert 0 < len(out.tokens) <= 5
    assert out.segments[0].neighbors == []


def with_eod_far(generator: Generator, **options: Any) -> Request:
    return Request("river stone", 40, sampling=Sampling(min_tokens=40), **options)


def test_a_stop_string_may_span_tokens(generator: Generator) -> None:
    whole = generator.generate_all([with_eod_far(generator)])[0]
    tokens = [generator.tokenizer.decode([token]) for token in whole.tokens]
    place = next(i for i in range(4, 38) if tokens[i] and tokens[i + 1] and "\ufffd" not in tokens[i] + tokens[i + 1])
    stop = tokens[place][-1:] + tokens[place + 1][:1]
    cut = whole.text.index(stop)
    out = generator.generate_all([with_eod_far(generator, stop=("never there", stop, stop + "and more"))])[0]
    assert (out.text, out.finish_reason) == (whole.text[:cut], "stop")
    assert len(out.tokens) < 40
    assert "".join(segment.text for segment in out.segments) == out.text
    out = generator.generate_all([with_eod_far(generator, stop=("never there", whole.text[-2:] + "x"))])[0]
    assert (out.text, out.finish_reason) == (whole.text, "length")  # what was held is shown at the end
    for wrong in (("",), "text"):
        with pytest.raises(UsageError, match="stop="):
            Request("river", stop=wrong)  # type: ignore[arg-type]


def test_log_probabilities(generator: Generator) -> None:
    """Those of a full pass: of the chosen token, the likeliest, and with echo of the prompt."""
    request = with_eod_far(generator, neighbors=[], logprobs=3, echo=True)
    out = generator.generate_all([request])[0]
    ids = generator.tokenizer.encode("river stone") + out.tokens
    assert out.logprobs is not None
    assert [entry.token for entry in out.logprobs] == ids
    assert out.text == generator.tokenizer.decode(ids)
    assert out.prompt_tokens == len(ids) - 40
    with torch.no_grad():
        exact = generator.model(torch.tensor([ids]))[0].log_softmax(-1)
    assert out.logprobs[0].logprob is None
    for place, entry in enumerate(out.logprobs[1:]):
        assert entry.logprob == pytest.approx(float(exact[place, entry.token]), abs=1e-9)
        best = exact[place].topk(3)
        assert [token for token, _, _ in entry.top] == best.indices.tolist()
        assert [value for _, _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-9)
        assert entry.text == generator.tokenizer.decode([entry.token])
    padded = generator.generate_all([with_eod_far(generator, logprobs=0, echo=True)])[
        0
    ]  # neighbors act from its last token on
    assert padded.logprobs is not None
    assert [e.logprob for e in padded.logprobs[1:4]] == pytest.approx(
        [e.logprob for e in out.logprobs[1:4]], abs=1e-6
    )  # other positions
    assert generator.generate_all([with_eod_far(generator)])[0].logprobs is None


def test_a_prompt_of_token_ids_is_the_same_prompt(generator: Generator) -> None:
    ids = generator.tokenizer.encode("river stone amber")
    assert generator.generate(ids, 12) == generator.generate("river stone amber", 12)


def test_beginning_of_document(generator: Generator, small_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no beginning-of-document token"):
        generator.generate_all([Request("river", add_bos=True)])
    monkeypatch.setattr(generator.tokenizer, "bos_id", 7)
    ids = [7, *generator.tokenizer.encode("river")]
    assert generator.generate_all([Request("river", 9, add_bos=True)])[0].tokens == generator.generate(ids, 9).tokens


def test_minimum_length_and_repetition_penalty(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    base = generator.generate("river", 30, neighbors=[])
    monkeypatch.setattr(generator.tokenizer, "eod_id", base.tokens[3])  # now it ends there
    early = generator.generate("river", 30, neighbors=[])
    assert early.tokens == base.tokens[: base.tokens.index(base.tokens[3])]
    assert early.finish_reason == "stop"
    late = generator.generate("river", 30, Sampling(min_tokens=12), neighbors=[])
    assert len(late.tokens) >= 12
    assert base.tokens[3] not in late.tokens
    with pytest.raises(UsageError, match="min_tokens=31"):
        generator.generate("river", 30, Sampling(min_tokens=31))
    strong = generator.generate("river", 30, Sampling(repetition_penalty=1e6, min_tokens=30), neighbors=[])
    assert len(set(strong.tokens)) > len(set(base.tokens))


def test_given_neighbors_that_the_prompt_holds_are_passed_over(generator: Generator) -> None:
    texts = ["river stone copper", "falcon ember", "tide"]
    logits = lambda **options: first_logits(generator, "river", **options)  # noqa: E731
    assert torch.equal(logits(neighbors=texts, passed_over=1), logits(neighbors=texts[1:]))
    assert torch.equal(logits(neighbors=texts, passed_over=1, num_neighbors=1), logits(neighbors=texts[1:2]))
    assert torch.equal(logits(neighbors=texts, num_neighbors=2), logits(neighbors=texts[:2]))
    assert (
        "3 neighbors were given, 1 are read"
        in generator.generate_all([Request("river", 2, neighbors=texts, num_neighbors=1)])[0].notes
    )
    all_four = generator.generate_all([Request("river stone", 1, num_neighbors=4)])[0].neighbors
    assert (
        generator.generate_all([Request("river stone", 1, num_neighbors=2, passed_over=2)])[0].neighbors == all_four[2:]
    )


def test_refresh_never_keeps_the_prompts_neighbors(generator: Generator) -> None:
    out = generator.generate_all([Request("river", 50, sampling=Sampling(min_tokens=50), refresh="never")])[0]
    assert all(segment.neighbors == out.neighbors for segment in out.segments)
    fresh = generator.generate_all([Request("river", 50, sampling=Sampling(min_tokens=50))])[0]
    assert out.tokens[:M] == fresh.tokens[:M]
    assert any(segment.neighbors != fresh.neighbors for segment in fresh.segments)
    with pytest.raises(UsageError, match="refresh=often"):
        Request("river", refresh="often")


def test_text_is_never_half_a_character() -> None:
    tokenizer = Tokenizer.train(["a"], 258)  # bytes alone: every character beyond ASCII is several tokens
    text = "h\u00e9llo \u65e5\u672c\u8a9e \U0001f600!"
    ids = tokenizer.encode(text)
    model = RetroModel(small_config(vocab_size=tokenizer.vocab_size, retrieval=False)).eval()
    for stop, expected in (((), text), (("\u8a9e \U0001f600",), text[: text.index("\u8a9e")]), (("\u00e9",), "h")):
        sequence = Generator(model, tokenizer).open(Request("a", len(ids), stop=stop))
        shown = []
        for token in ids:
            if sequence.finish_reason is None:
                event = sequence.accept(torch.eye(tokenizer.vocab_size)[token])
                shown += [] if event is None else [event.text]
        assert "".join(shown) == expected == sequence.text
        assert not any("\ufffd" in piece for piece in shown)
    sequence = Generator(model, tokenizer).open(Request("a", 2))
    for token in tokenizer.encode("\u65e5")[:2]:  # and ends in the middle
        sequence.accept(torch.eye(tokenizer.vocab_size)[token])
    assert sequence.generation().text == "\ufffd"


def test_a_source_in_other_chunks_is_refused(generator: Generator, small_store: Store, tmp_path: Path) -> None:
    """Its neighbors would be of half the length that the model was trained on."""
    store = prepare([write_corpus(tmp_path / "c.jsonl", 4)], tmp_path / "s", str(small_store.folder), chunk_size=8)
    with pytest.raises(StoreError, match="the model has chunk_size 16\n.*has 8"):
        Generator(generator.model, small_store.tokenizer, Retriever([store]))


def forced(generator: Generator, request: Request, tokens: list[int]) -> Generation:
    """What a request says where the model's choices are `tokens`."""
    sequence = generator.open(request)
    sequence.keep_found(Found(np.zeros((0, 1), np.int64), np.zeros(0, np.int64), []))
    for token in tokens:
        if sequence.finish_reason is None:
            logits = torch.full((generator.model.config.vocab_size,), -9.0)
            logits[token] = 9.0
            sequence.accept(logits)
    sequence.finish_reason = sequence.finish_reason or "cancelled"
    return sequence.generation()


@pytest.fixture
def llama() -> Generator:
    tokenizer = llama2()
    return Generator(small_model(retrieval=False, vocab_size=tokenizer.vocab_size), tokenizer)


def test_any_end_token_ends(llama: Generator) -> None:
    ids = llama.tokenizer.encode("The castle was")
    assert forced(llama, Request("The", 9), [*ids, 2, *ids]).finish_reason == "stop"
    llama.tokenizer.chat_files = ChatFiles(end_ids=(ids[1], 0))
    out = forced(llama, Request("The", 9), [*ids, 2, *ids])
    assert (out.text, out.finish_reason, out.tokens) == (" The", "stop", ids[:1])
    out = llama.generate("The", 12, Sampling(min_tokens=12))
    assert not {ids[1], 0, 2} & set(out.tokens)


@pytest.mark.parametrize("stop", ["<s>", "<s>\n"])
def test_a_special_token_as_a_stop(llama: Generator, stop: str) -> None:
    ids = llama.tokenizer.encode("The castle")
    out = forced(llama, Request("The", 9, stop=(stop,)), [*ids, 1, *ids])
    assert (out.text, out.finish_reason) == (" The castle", "stop")
    assert forced(llama, Request("The", 9), [*ids, 1, *ids]).text == " The castle The castle"


def test_the_space_of_the_first_word(llama: Generator) -> None:
    tokenizer = llama.tokenizer
    prompt, ids = "The castle", tokenizer.encode("The castle was built")[2:]
    assert forced(llama, Request(prompt, 9, logprobs=1), ids).text == " was built"
    out = forced(llama, Request(prompt, 9, logprobs=1, echo=True), ids)
    assert out.text == "The castle was built"
    assert [entry.text for entry in out.logprobs or []] == [" was", " built"]
    assert [entry.offset for entry in out.logprobs or []] == [10, 14]
    whole = llama.generate_all([Request(prompt, 6, logprobs=2, echo=True)])[0]
    assert whole.text.startswith(prompt)
    assert [entry.offset for entry in whole.logprobs or []][:3] == [0, 3, 10]


def test_a_prompt_that_ends_within_a_character(llama: Generator) -> None:
    ids = llama.tokenizer.encode("The é")
    assert forced(llama, Request(ids[:-1], 9, echo=True), ids[-1:]).text == "The é"
    assert forced(llama, Request(ids[:-1], 9), ids[-1:]).text == "é"


def test_end_tokens_between_the_turns_of_a_chat(llama: Generator) -> None:
    ids = [1, *llama.tokenizer.encode("The"), 2]
    with pytest.raises(UsageError, match="it ends a document"):
        llama.open(Request(ids))
    assert llama.open(Request(ids, is_chat=True)).tokens == ids
    assert llama.open(Request(ids, is_chat=True, add_bos=True)).tokens == ids  # which has it already


@pytest.mark.parametrize("prompt", ["river", "orchard " * 40], ids=["short", "long"])
@pytest.mark.parametrize("pads", [True, False])
def test_given_in_front_is_the_prompt_with_it(small_store: Store, prompt: str, pads: bool) -> None:
    """A plain decoder that is given one neighbor says what it says after the prompt `sink, neighbor, prompt`."""
    model = small_model(
        vocab_size=small_store.vocab_size, chunk_size=M, encoder_seq_length=64, seed=3, reading="prefix", sink_id=5
    )
    tokenizer, text = small_store.tokenizer, "stone amber lantern"
    ids = [5, *tokenizer.encode(text), *tokenizer.encode(prompt)]
    expected: list[int] = []
    off = RetroModel(replace(model.config, retrieval=False)).double().eval()
    off.load_state_dict(model.state_dict())
    for _ in range(M + 2):
        with torch.no_grad():
            expected.append(int(off(torch.tensor([ids + expected]))[0, -1].argmax()))
    generator = Generator(model, tokenizer)
    got = generator.generate_all([Request(prompt, M + 2, neighbors=[text], pad_prompt=pads)])[0]
    assert got.tokens == expected
    assert generator.encodings is not None
    assert (generator.encodings.stats.misses, generator.encodings.stats.hits) == (1, 0), "it is put there once"
    assert len(got.segments) == 1
    given = encoded(tokenizer, text, model.config.r)
    assert decode(model, [tokenizer.encode(prompt)], *given, M + 2, [], 0) == [expected]


def encoded(tokenizer: Tokenizer, text: str, R: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, lengths = encode_neighbors(tokenizer, [text], R)
    return torch.from_numpy(tokens)[None], torch.from_numpy(lengths)[None]


def test_a_memory_beside_the_model(generator: Generator, small_store: Store, tmp_path: Path) -> None:
    """Text goes on as the store's does; drafts change no token; log-probabilities are those with the memory, the prompt's too."""
    beside = MemoryBeside(build_ngram_memory(small_store, tmp_path / "memory"), Mixture.even(0.7))
    model, tokenizer = generator.model, generator.tokenizer
    prompt = small_store.text(3)[:40]
    request = Request(prompt, 24, neighbors=[], logprobs=1, echo=True)
    found = [
        Generator(model, tokenizer, drafts=drafts, beside=beside).generate_all([request])[0] for drafts in (True, False)
    ]
    assert found[0].tokens == found[1].tokens
    assert found[0].tokens != Generator(model, tokenizer).generate_all([request])[0].tokens
    logprobs = found[0].logprobs
    assert logprobs is not None
    tokens = [one.token for one in logprobs]
    with torch.no_grad():
        logits_NV = model(torch.tensor([tokens]))[0]
    for place in (0, 3, len(tokens) - 2):
        expected = beside(logits_NV[place], tokens[: place + 1])[tokens[place + 1]]
        assert logprobs[place + 1].logprob == pytest.approx(float(expected), abs=1e-3)
