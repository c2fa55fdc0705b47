"""Texts that read shared passages in one packed pass, against prompts that hold them, and generation with given neighbors (float64)."""

from typing import Any

import pytest
import torch
from helpers import small_config

from retro_engine.model.decoding import decode
from retro_engine.model.retro import RetroModel

R = 7
POSITIONS: list[dict[str, Any]] = [
    {},
    {"position_embedding": "learned", "max_position_embeddings": 64},
    {"position_embedding": "none"},
    {"rotary_percentage": 0.5, "rotary_interleaved": True},
]


def reader(**overrides: Any) -> RetroModel:
    settings: dict[str, Any] = {"reading": "prefix", "sink_id": 3, "retrieved_length": R, "num_neighbors": 2}
    torch.manual_seed(0)
    return RetroModel(small_config(**{**settings, **overrides})).double().eval()


def passages(model: RetroModel, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return torch.randint(4, model.config.vocab_size, (len(lengths), R), generator=random), torch.tensor(lengths)


def texts(model: RetroModel, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [q, n] and document ids, which are -1 where there is none."""
    random = torch.Generator().manual_seed(2)
    tokens = torch.randint(4, model.config.vocab_size, (len(lengths), max(lengths)), generator=random)
    return tokens, torch.where(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None], 5, -1)


@pytest.mark.parametrize("sink_id", [None, 3])
@pytest.mark.parametrize("positions", POSITIONS, ids=str)
def test_one_passage_is_the_prompt_with_it(positions: dict[str, Any], sink_id: int | None) -> None:
    model = reader(sink_id=sink_id, num_neighbors=1, **positions)
    given, lengths = passages(model, [R, R, R])
    tokens, documents = texts(model, [5, 3])
    got = model(tokens, given, lengths, documents, reads=torch.tensor([[2], [0]]))
    sink = [] if sink_id is None else [sink_id]
    for row, (number, count) in enumerate(((2, 5), (0, 3))):
        prompt = torch.tensor([[*sink, *given[number].tolist(), *tokens[row, :count].tolist()]])
        torch.testing.assert_close(got[row, :count], model(prompt)[0, -count:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
def test_generation_reads_the_same(positions: dict[str, Any]) -> None:
    """The most likely next token after each text is what decoding with the same neighbors says first."""
    model = reader(**positions)
    given, lengths = passages(model, [R, 2, 5])
    tokens, documents = texts(model, [6, 3, 5])
    reads = torch.tensor([[0, 2], [1, -1], [2, 1]])
    logits = model(tokens, given, lengths, documents, reads=reads)
    counts = (documents >= 0).sum(1).tolist()
    said = [[int(logits[row, count - 1].argmax())] for row, count in enumerate(counts)]
    read_lengths = torch.where(reads < 0, 0, lengths[reads.clamp(min=0)])
    prompts = [tokens[row, :count].tolist() for row, count in enumerate(counts)]
    assert decode(model, prompts, given[reads.clamp(min=0)], read_lengths, 1, [], 0) == said


def test_a_text_is_not_changed_by_what_others_read() -> None:
    model = reader()
    given, lengths = passages(model, [R, 2, 5])
    tokens, documents = texts(model, [6, 3])
    both = model(tokens, given, lengths, documents, reads=torch.tensor([[0, 2], [1, -1]]))
    alone = model(tokens[:1], given[[0, 2]], lengths[[0, 2]], documents[:1], reads=torch.tensor([[0, 1]]))
    torch.testing.assert_close(both[0], alone[0], rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_prompts() -> None:
    """Of two questions on one passage: the sum of both prompts' gradients."""
    model = reader(num_neighbors=1)
    given, lengths = passages(model, [R])
    tokens, documents = texts(model, [5, 4])
    labels = torch.where(documents >= 0, tokens, -100)
    model(tokens, given, lengths, documents, labels, torch.tensor([[0], [0]])).backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for row, count in enumerate((5, 4)):
        prompt = torch.tensor([[3, *given[0].tolist(), *tokens[row, :count].tolist()]])
        wanted = torch.full_like(prompt, -100)
        wanted[0, -count:] = tokens[row, :count]
        model(prompt, labels=wanted).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-9, atol=1e-12)


def test_what_cannot_be_read_is_refused() -> None:
    model = reader()
    given, lengths = passages(model, [R, 2])
    tokens, documents = texts(model, [5])
    with pytest.raises(ValueError, match="passage 2 of 2"):
        model(tokens, given, lengths, documents, reads=torch.tensor([[2]]))
    with pytest.raises(ValueError, match="passage 0 of 2"):
        model(tokens, given, torch.tensor([R, 0]), documents, reads=torch.tensor([[0]]))
    with pytest.raises(ValueError, match="reading=prefix"):
        reader(reading="cross_attention", sink_id=None)(tokens, given, lengths, documents, reads=torch.tensor([[0]]))
