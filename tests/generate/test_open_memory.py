"""A memory beside a model that decodes: the same tokens alone, together and drafted; what cannot be read is refused."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import small_model
from torch import Tensor

from retro_engine.data.store import Store
from retro_engine.errors import MissingInputError, UsageError
from retro_engine.generate.engine import Engine
from retro_engine.generate.explain import explain
from retro_engine.generate.generator import Generator
from retro_engine.generate.open_memory import open_beside
from retro_engine.generate.request import Request
from retro_engine.generate.sampling import Sampling
from retro_engine.memory.next_token import MemoryBeside
from retro_engine.memory.ngram_memory import build_ngram_memory
from retro_engine.model.retro import RetroModel
from retro_engine.retrieval.search import Retriever


@pytest.fixture(scope="module")
def folder(small_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_ngram_memory(small_store, tmp_path_factory.mktemp("memory") / "ngram").folder


@pytest.fixture(scope="module")
def beside(folder: Path, small_store: Store) -> MemoryBeside:
    return open_beside(str(folder), "0.4", Path("run"), small_store.tokenizer)


@pytest.fixture(scope="module")
def model(small_store: Store) -> RetroModel:
    return small_model(vocab_size=small_store.vocab_size, chunk_size=16, encoder_seq_length=64, seed=3)


def requests() -> list[Request]:
    sampled = Sampling(greedy=False, seed=5)
    return [
        Request("river", 20),
        Request("Document doc7. river stone", 24, neighbors=["river stone copper", "tide"]),
        Request("tide ember", 20, sampling=sampled, neighbors=[]),
        Request("falcon " * 9, 12, logprobs=0, echo=True),
    ]


def test_tokens_are_the_same_together_and_drafted(model: RetroModel, small_store: Store, beside: MemoryBeside) -> None:
    """Retrieved, given and no neighbors; drafts are checked against what the memory says too."""
    source = Retriever([small_store])
    apart = Generator(model, small_store.tokenizer, source, drafts=False, beside=beside)
    alone = [apart.generate_all([request])[0] for request in requests()]
    plain = Generator(model, small_store.tokenizer, source)
    assert [out.tokens for out in plain.generate_all(requests())] != [out.tokens for out in alone]
    together = Generator(model, small_store.tokenizer, source, beside=beside)
    for _ in range(2):  # the second time from the prefix cache
        with Engine(together, max_batch=3) as engine:
            found = [stream.result() for stream in [engine.submit(request) for request in requests()]]
        assert [out.tokens for out in found] == [out.tokens for out in alone]
    for one, other in zip(found[3].logprobs or [], alone[3].logprobs or [], strict=True):
        assert one.logprob == (None if other.logprob is None else pytest.approx(other.logprob, abs=1e-3))


def test_a_draft_and_a_stop_string_end_where_they_would(
    model: RetroModel, small_store: Store, beside: MemoryBeside
) -> None:
    text = small_store.tokenizer.decode(small_store.rows(0, 1)[0][0].tolist())
    asked = Request(text, 40, neighbors=[text])
    single = Generator(model, small_store.tokenizer, drafts=False, beside=beside).generate_all([asked])[0]
    drafting = Generator(model, small_store.tokenizer, beside=beside)
    assert drafting.generate_all([asked])[0].tokens == single.tokens
    stop = single.text[len(single.text) // 2 :][:3]
    ended = drafting.generate_all([replace(asked, stop=(stop,))])[0]
    assert ended.text == single.text[: single.text.find(stop)] and ended.finish_reason == "stop"


def test_the_memory_sees_the_text_and_no_padding(model: RetroModel, small_store: Store) -> None:
    seen: list[list[int]] = []

    def beside(logits_V: Tensor, tokens: Sequence[int]) -> Tensor:
        seen.append([*tokens])
        return logits_V

    generator = Generator(model, small_store.tokenizer, beside=beside)  # type: ignore[arg-type]
    out = generator.generate_all([Request("river stone", 40, neighbors=["tide"], sampling=Sampling(min_tokens=40))])[0]
    whole = small_store.tokenizer.encode("river stone") + out.tokens
    assert seen[0] == whole[: len(whole) - 40]
    assert seen[-1] == whole[:-1][-32:]


def test_what_cannot_be_read_is_refused(
    folder: Path, small_store: Store, beside: MemoryBeside, model: RetroModel, tmp_path: Path
) -> None:
    tokenizer, run = small_store.tokenizer, tmp_path / "run"
    for name, weights, error, said in (
        (str(folder), None, UsageError, "has no weights"),
        (str(folder), "1.5", UsageError, "from 0 to 1"),
        (str(folder), "nan", UsageError, "from 0 to 1"),
        (str(folder), str(tmp_path / "none.json"), MissingInputError, "none.json"),
        ("knn", "0.3", UsageError, "cannot be read while decoding"),
        (str(tmp_path), "0.3", MissingInputError, "is not a ngram"),
    ):
        with pytest.raises(error, match=said):
            open_beside(name, weights, run, tokenizer)
    with pytest.raises(UsageError, match="cannot be told"):
        explain(Generator(model, tokenizer, beside=beside), "river", " stone", ["tide"])
