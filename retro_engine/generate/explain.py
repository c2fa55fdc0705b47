"""What each neighbor was worth: the change of a text's log-probability when it is removed.

Letters: B variants, T tokens, M chunk length, K neighbors, R tokens per neighbor, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from retro_engine.errors import UsageError
from retro_engine.generate.generator import Generator, encode_neighbors


@dataclass(frozen=True)
class Explanation:
    """Natural log-probabilities of a text after a prompt."""

    logprob: float  # with every neighbor
    logprob_without: float  # with none
    removed: list[float]  # for each neighbor: what is lost without it, log p(all) - log p(all but this)


def explain(generator: Generator, prompt: Sequence[int], text: Sequence[int], neighbors: Sequence[str]) -> Explanation:
    """Score `text` after `prompt` with all neighbors, with none, and without each; in one batch of K + 2.

    The neighbors are read from the prompt's last token on, as in generation with given neighbors.
    Raises UsageError for an empty prompt or text, or a plain decoder.
    """
    model = generator.model
    if not prompt or not text:
        raise UsageError("the prompt or the text is empty", "there is nothing to score")
    if model.encoder is None:
        raise UsageError("neighbors were given", "this model is a plain decoder (model.retrieval=false)")
    c, device = model.config, model.embedding.weight.device
    if not neighbors:
        nothing = explain(generator, prompt, text, [""]).logprob_without
        return Explanation(nothing, nothing, [])
    K, M = len(neighbors), c.chunk_size
    tokens_KR, lengths_K = map(torch.from_numpy, encode_neighbors(generator.tokenizer, neighbors, c.r))
    pad = -len(prompt) % M
    ids = [generator.tokenizer.pad_id] * pad + [*prompt, *text[:-1]]
    learned = c.max_position_embeddings or c.encoder_seq_length
    if c.position_embedding == "learned" and len(ids) > learned:
        raise UsageError(f"{len(ids)} tokens", f"the model has {learned} positions", "use shorter texts")
    chunks, first = len(ids) // M, (pad + len(prompt)) // M - 1  # the chunk that the prompt's last token ends
    is_read = torch.ones(K + 2, K, dtype=torch.bool)  # the variants: all, none, all but one
    is_read[1] = False
    is_read[torch.arange(2, K + 2), torch.arange(K)] = False
    lengths = (lengths_K * is_read)[:, None].repeat(1, chunks, 1)
    lengths[:, :first] = 0
    batch = torch.tensor(ids, device=device).expand(K + 2, -1)
    is_token = (torch.arange(len(ids), device=device) >= pad).expand(K + 2, -1)
    given = tokens_KR.expand(K + 2, chunks, -1, -1).to(device)
    with torch.no_grad():
        cache = model.new_cache(K + 2, len(ids))
        logits_BTV = model.step(batch, cache, given, lengths.to(device), is_token if pad else None)
    scored = logits_BTV[:, -len(text) :].float().log_softmax(-1)
    target = torch.tensor(list(text), device=device).expand(K + 2, -1)[..., None]
    everything, nothing, *without = scored.gather(-1, target).sum((1, 2)).tolist()
    return Explanation(everything, nothing, [everything - value for value in without])
