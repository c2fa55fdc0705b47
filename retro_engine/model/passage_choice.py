"""Which of several passages answers a question: that of which a reader says least that it does not hold the answer.

A model that was taught to say so (data/question_groups.py) is asked of each passage alone, in one batch and for one token; read
together, passages that are alike draw it to a wrong one. Letters: K passages, R tokens of one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from retro_engine.model.decoding import decode, greedy
from retro_engine.model.prefix import Encode
from retro_engine.model.retro import RetroModel


def absence(
    model: RetroModel,
    prompt: Sequence[int],
    passages_KR: Tensor,
    lengths_K: Tensor,
    absent_id: int,
    pad_id: int,
    encode: Encode | None = None,
) -> Tensor:
    """[k] log-probabilities of `absent_id`, with which the answer that there is none begins, after the prompt behind each
    passage alone. `encode` as of `decode`, whose errors it raises.
    """
    found: list[Tensor] = []

    def noted(logits_KV: Tensor) -> Tensor:
        found.append(torch.log_softmax(logits_KV.float(), -1)[:, absent_id])
        return greedy(logits_KV)

    prompts = [prompt] * len(passages_KR)
    decode(
        model,
        prompts,
        neighbors_BKR=passages_KR[:, None],
        lengths_BK=lengths_K[:, None],
        max_new_tokens=1,
        stop_ids=[],
        pad_id=pad_id,
        choose=noted,
        encode=encode,
    )
    return found[0]
