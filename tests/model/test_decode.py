"""Decoding a batch of prompts: each row as it is alone, and as a full pass over everything."""

import pytest
import torch
from helpers import small_config, small_inputs, small_model

from retro_engine.model.decode import decode
from retro_engine.model.retro import RetroModel


def test_a_batch_is_its_rows_and_a_full_pass() -> None:
    model = small_model(seed=5)
    prompts = [[3, 4, 5], [7, 8, 9, 10, 11, 12, 13], [1]]
    _, neighbors = small_inputs(model, batch=3, n=4)
    neighbors, lengths = neighbors[:, 0], torch.tensor([[8, 8], [8, 3], [0, 5]])
    together = decode(model, prompts, neighbors, lengths, 6, [], 0)
    for row, prompt in enumerate(prompts):
        alone = decode(model, [prompt], neighbors[row : row + 1], lengths[row : row + 1], 6, [], 0)[0]
        assert together[row] == alone
        pad = -len(prompt) % 4
        tokens = [0] * pad + prompt
        first = len(tokens) // 4 - 1
        for token in alone:
            chunks = len(tokens) // 4
            every = lengths[row].expand(1, chunks, -1).clone()
            every[:, :first] = 0
            documents = torch.tensor([[-1] * pad + [0] * (len(tokens) - pad)])
            given = neighbors[row].expand(1, chunks, -1, -1)
            assert int(model(torch.tensor([tokens]), given, every, documents)[0, -1].argmax()) == token
            tokens.append(token)


def test_stops_and_retrieval_off() -> None:
    model = small_model(seed=5)
    answer = decode(model, [[3, 4, 5]], None, None, 6, [], 0)[0]
    place = next(i for i in range(1, 6) if answer[i] not in answer[:i])
    assert decode(model, [[3, 4, 5]], None, None, 6, [answer[place]], 0)[0] == answer[:place]
    off = torch.zeros(1, 2, dtype=torch.long)
    assert decode(model, [[3, 4, 5, 6]], torch.zeros(1, 2, 8, dtype=torch.long), off, 4, [], 0) == decode(
        model, [[3, 4, 5, 6]], None, None, 4, [], 0
    )
    plain = RetroModel(small_config(retrieval=False)).eval()
    assert len(decode(plain, [[3]], torch.zeros(1, 2, 8, dtype=torch.long), None, 3, [], 0)[0]) == 3
    with pytest.raises(ValueError, match="empty"):
        decode(model, [[3], []], None, None, 2, [], 0)
