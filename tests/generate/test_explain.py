"""What a neighbor was worth equals the difference of two full passes."""

import pytest
import torch
from helpers import small_model

from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import UsageError
from retro_engine.generate.explain import explain
from retro_engine.generate.generator import Generator, encode_neighbors

IDS = [40 + 7 * place % 90 for place in range(20)]


@pytest.fixture(scope="module")
def generator() -> Generator:
    tokenizer = Tokenizer.train(["river stone amber lantern " * 20], 300)
    return Generator(small_model(vocab_size=tokenizer.vocab_size), tokenizer)


def test_it_is_the_difference_of_full_passes(generator: Generator) -> None:
    """A prompt of whole chunks: the plain forward pass with and without each neighbor says the same."""
    tokenizer, model = generator.tokenizer, generator.model
    prompt, text = IDS[:8], IDS[8:15]
    neighbors = ["amber lantern river", "stone", ""]
    found = explain(generator, prompt, text, neighbors)
    tokens_KR, lengths_K = map(torch.from_numpy, encode_neighbors(tokenizer, neighbors, model.config.r))
    chunks = (len(prompt) + len(text) - 1) // model.config.chunk_size

    def score(keep: list[int]) -> float:
        lengths = torch.zeros(1, chunks, 3, dtype=torch.long)
        for index in keep:
            lengths[:, 1:, index] = lengths_K[index]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *text[:-1]]]), tokens_KR.expand(1, chunks, -1, -1), lengths)
        rows = logits[0, len(prompt) - 1 :].log_softmax(-1)
        return float(rows[torch.arange(len(text)), text].sum())

    everything = score([0, 1, 2])
    assert found.logprob == pytest.approx(everything, abs=1e-4)
    assert found.logprob_without == pytest.approx(score([]), abs=1e-4)
    for index in range(3):
        without = score([other for other in range(3) if other != index])
        assert found.removed[index] == pytest.approx(everything - without, abs=1e-4)
    assert found.removed[2] == pytest.approx(0, abs=1e-6)  # an empty text is not read
    assert abs(found.removed[0]) > 1e-3


def test_prompts_of_any_length_and_no_neighbors(generator: Generator) -> None:
    ids = IDS
    for length in (1, 3, 4, 7, 9):
        found = explain(generator, ids[:length], ids[length : length + 3], ["amber", "stone river"])
        assert len(found.removed) == 2
        assert found.logprob < 0
        assert explain(generator, ids[:length], ids[length : length + 3], []).removed == []
    for prompt, text in (([], ids), (ids, [])):
        with pytest.raises(UsageError, match="empty"):
            explain(generator, prompt, text, ["a"])
