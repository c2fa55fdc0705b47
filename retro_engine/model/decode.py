"""A batch of prompts answered together, each with given neighbors: cached, to the end of the longest answer.

Prompts are padded on the left to the same whole number of chunks, so that each one's last token ends a chunk and its
neighbors act from that token on. Letters: B prompts, M chunk length, K neighbors, R tokens per neighbor, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from retro_engine.model.retro import RetroModel


def greedy(logits_BV: Tensor) -> Tensor:
    return logits_BV.argmax(-1)


def decode(
    model: RetroModel,
    prompts: Sequence[Sequence[int]],
    neighbors_BKR: Tensor | None,
    lengths_BK: Tensor | None,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    choose: Callable[[Tensor], Tensor] = greedy,
) -> list[list[int]]:
    """The tokens after each prompt; the stop id that ended an answer is not in it.

    `neighbors_BKR` None = retrieval off; `choose` makes tokens [b] of logits [b, V]. Raises ValueError for an empty prompt.
    """
    if not all(prompts):
        raise ValueError("a prompt is empty: there is nothing to continue")
    device, M, B = model.embedding.weight.device, model.config.chunk_size, len(prompts)
    is_reading = neighbors_BKR is not None and model.encoder is not None
    longest = max(map(len, prompts))
    length = -(-longest // M) * M if is_reading else longest
    tokens = torch.full((B, length), pad_id)
    is_token = torch.zeros(B, length, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = torch.tensor(list(prompt))
        is_token[row, length - len(prompt) :] = True
    cache = model.new_cache(B, length + max_new_tokens)
    answers: list[list[int]] = [[] for _ in range(B)]
    is_open = torch.ones(B, dtype=torch.bool)
    block, block_is_token = tokens.to(device), is_token.to(device)
    for _ in range(max_new_tokens):
        chunks = (cache.length + block.shape[1]) // M - cache.length // M
        neighbors = lengths = None
        if is_reading and chunks:
            assert neighbors_BKR is not None
            neighbors = neighbors_BKR.to(device)[:, None].expand(-1, chunks, -1, -1)
            full = torch.full(neighbors_BKR.shape[:2], neighbors_BKR.shape[2]) if lengths_BK is None else lengths_BK
            lengths = full.to(device)[:, None].expand(-1, chunks, -1).clone()
            lengths[:, :-1] = 0  # the chunks before the prompt's last one have none
        with torch.no_grad():
            logits = model.step(block, cache, neighbors, lengths, block_is_token, last_only=True)[:, 0]
        chosen = choose(logits).cpu()
        for row, token in enumerate(chosen.tolist()):
            if is_open[row] and token in stop_ids:
                is_open[row] = False
            elif is_open[row]:
                answers[row].append(token)
        if not is_open.any():
            break
        block, block_is_token = chosen.to(device)[:, None], torch.ones(B, 1, dtype=torch.bool, device=device)
    return answers
