"""A plain decoder that reads in front: as its prompt would, what is current, and by name not where it cannot."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import small_model

from retro_engine.data.corpus import Document
from retro_engine.data.store import Store
from retro_engine.errors import UsageError
from retro_engine.generate.generator import Generator
from retro_engine.generate.open_model import check_reading, read_in_front
from retro_engine.generate.request import Request
from retro_engine.library.library import Library
from retro_engine.library.live import LiveRetriever
from retro_engine.model.retro import RetroModel
from retro_engine.retrieval.search import Retriever

NEIGHBOR = "river stone amber lantern"


def decoder(store: Store, **values: Any) -> RetroModel:
    return small_model(vocab_size=store.vocab_size, retrieval=False, encoder_seq_length=16, **values)


@pytest.mark.parametrize(
    "positions",
    [
        {},
        {"position_embedding": "learned", "max_position_embeddings": 60},
        {"max_position_embeddings": 60},
        {"rotary_factors": [1.0, 2.0, 4.0, 8.0]},
    ],
    ids=str,
)
def test_it_continues_as_after_the_neighbor_in_its_prompt(small_store: Store, positions: dict[str, Any]) -> None:
    """Over several chunks: the same neighbor is read at the end of each."""
    tokenizer, model = small_store.tokenizer, decoder(small_store, **positions)
    ids = tokenizer.encode(NEIGHBOR)
    ask: dict[str, Any] = {"max_new_tokens": 9, "logprobs": 0}
    prompt = Request([tokenizer.sink_id, *ids, 7], is_chat=True, **ask)
    (wanted,) = Generator(model, tokenizer).generate_all([prompt])
    chunk_size = 1 if "position_embedding" in positions else 4  # a prompt that is padded has other learned positions
    read_in_front(model, tokenizer, chunk_size, {"num_neighbors": 1, "retrieved_length": len(ids)})
    generator = Generator(model, tokenizer)
    found, off = generator.generate_all([Request([7], neighbors=[NEIGHBOR], **ask), Request([7], **ask)])
    assert found.tokens == wanted.tokens
    assert [one.logprob for one in found.logprobs or []] == pytest.approx(
        [one.logprob for one in wanted.logprobs or []], abs=1e-5
    )
    model.config = decoder(small_store, **positions).config
    (alone,) = Generator(model, tokenizer).generate_all([Request([7], **ask)])
    assert off.tokens == alone.tokens, "with nothing to read it is the decoder that it was"


def test_what_it_reads_with(small_store: Store) -> None:
    model = decoder(small_store)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    read_in_front(model, small_store.tokenizer, small_store.chunk_size)
    c = model.config
    assert (c.chunk_size, c.r, c.num_neighbors, c.sink_id) == (16, 32, 2, small_store.tokenizer.sink_id)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model = decoder(small_store)
    read_in_front(model, small_store.tokenizer, 4, {"num_neighbors": 3, "retrieved_length": 5, "sink_id": None})
    assert model.config.first_position == 15


def test_what_cannot_read_is_refused(small_store: Store) -> None:
    tokenizer = small_store.tokenizer
    with pytest.raises(UsageError, match=r"trained with model\.reading=cross_attention"):
        read_in_front(small_model(vocab_size=tokenizer.vocab_size), tokenizer)
    for wrong, message in (
        ({"partial_chunk": "first"}, "partial_chunk=last"),
        ({"reset_attention": False}, "reset_attention=true"),
        ({"position_embedding": "learned", "max_position_embeddings": 17}, "17 positions"),
        ({"max_position_embeddings": 16}, "16 positions"),
    ):
        model = decoder(small_store, **wrong)
        with pytest.raises(UsageError, match=message):
            read_in_front(model, tokenizer)
        assert not model.config.retrieval
    with pytest.raises(UsageError, match="sink_id"):
        read_in_front(decoder(small_store), tokenizer, asked={"sink_id": 10**6})
    with pytest.raises(UsageError, match="in front or not at all"):
        check_reading(decoder(small_store), "behind")
    with pytest.raises(UsageError, match="cannot be read\n.*plain decoder"):
        Generator(decoder(small_store, chunk_size=16), tokenizer, Retriever([small_store]))
    reading = decoder(small_store, max_position_embeddings=30)
    read_in_front(reading, tokenizer)
    generator = Generator(reading, tokenizer)
    assert generator.generate([7], 8, neighbors=["river"]).tokens
    for neighbors, count in ((["river"], 13), (["river"] * 3, 8)):  # more of them stand farther in front
        with pytest.raises(UsageError, match="30 positions, "):
            generator.generate([7], count, neighbors=neighbors)


def test_a_document_that_was_replaced_is_not_read_again(small_store: Store, tmp_path: Path) -> None:
    tokenizer, model = small_store.tokenizer, decoder(small_store)
    Library.create(tmp_path / "library", tokenizer, 4)
    with Library(tmp_path / "library") as library:
        read_in_front(model, tokenizer, 4)
        generator = Generator(model, tokenizer, LiveRetriever(library))

        def texts() -> tuple[str, list[float | None]]:
            (out,) = generator.generate_all([Request("river", 5, logprobs=0)])
            return "".join(hit.text + hit.continuation for hit in out.neighbors), [
                one.logprob for one in out.logprobs or []
            ]

        library.add([Document("note", "", "river stone amber")])
        old, logprobs = texts()
        assert "stone" in old
        sequence = generator.open(Request("river", 5))
        searched = generator.find(sequence, sequence.prompt_length)
        library.add([Document("note", "", "river copper falcon")])
        again = generator.find(sequence, sequence.prompt_length)
        assert not np.array_equal(searched[-1].tokens_KR, again[-1].tokens_KR)
        new, other = texts()
        assert "copper" in new
        assert "stone" not in new
        assert other != logprobs
        fresh = Generator(model, tokenizer, LiveRetriever(library), neighbor_bytes=0)
        (exact,) = fresh.generate_all([Request("river", 5, logprobs=0)])
        assert other == pytest.approx([one.logprob for one in exact.logprobs or []], abs=1e-6)
        library.delete(["note"])
        assert texts()[0] == ""
