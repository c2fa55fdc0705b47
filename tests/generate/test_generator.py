"""Generation: equal to recomputing everything, neighbors that act from the prompt's last token on, attribution."""

import numpy as np
import pytest
import torch
from helpers import small_config, small_model

from retro_engine.data.store import Store
from retro_engine.errors import StoreError, UsageError
from retro_engine.generate.generator import Generator, encode_neighbors
from retro_engine.generate.sampling import Sampling, choose
from retro_engine.model.retro import RetroModel
from retro_engine.retrieval.search import Retriever

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


def first_logits(generator: Generator, prompt: str, **options: object) -> torch.Tensor:
    notes: list[str] = []
    steps = generator._steps(
        prompt, 4, options.get("neighbors"), None, None, bool(options.get("pad_prompt", True)), notes
    )  # type: ignore[arg-type]
    return next(steps).logits_V


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
    for number, segment in enumerate(out.segments):  # the padded prompt ends a chunk
        assert segment.text == generator.tokenizer.decode(out.tokens[number * M : (number + 1) * M])
    assert all(len(segment.neighbors) <= 2 for segment in out.segments)
    assert out.neighbors == out.segments[0].neighbors
    assert out.neighbors[0].document.startswith("d")
    off = generator.generate("river", 5, neighbors=[])
    assert off.neighbors == []


def test_long_and_empty_neighbors(generator: Generator) -> None:
    out = generator.generate("river", 2, neighbors=["stone " * 100, ""])
    assert "neighbor 1 is longer than 32 tokens" in out.notes[0]
    only_empty = generator.generate("river", 8, neighbors=[""])
    assert only_empty.tokens == generator.generate("river", 8, neighbors=[]).tokens


def test_what_cannot_be_generated(generator: Generator, small_store: Store) -> None:
    for options, message in (({"max_new_tokens": 0}, "max_new_tokens"), ({"retrieved_length": 33}, "retrieved_length")):
        with pytest.raises(UsageError, match=message):
            generator.generate("river", **options)
    with pytest.raises(UsageError, match="prompt is empty"):
        generator.generate("")
    from retro_engine.data.tokenizer import Tokenizer

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


def test_sampling() -> None:
    logits = torch.tensor([0.0, 3.0, 2.0, -1.0])
    draw = lambda **options: {  # noqa: E731
        choose(logits, Sampling(greedy=False, **options), torch.Generator().manual_seed(seed)) for seed in range(200)
    }
    assert choose(logits, Sampling(), torch.Generator()) == 1
    assert draw(temperature=1.0) == {0, 1, 2, 3}
    assert draw(top_k=2) == {1, 2}
    assert draw(top_p=0.5) == {1}
    assert draw(top_p=0.9) == {1, 2}
    assert draw(temperature=1e-3) == {1}
    same = [choose(logits, Sampling(greedy=False), torch.Generator().manual_seed(5)) for _ in range(5)]
    assert len(set(same)) == 1
    for wrong in ({"temperature": 0}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}):
        with pytest.raises(UsageError, match=f"inference.{next(iter(wrong))}"):
            Sampling(**wrong)
