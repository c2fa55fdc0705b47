"""What each neighbor did: the change of a text's log-probability, token by token, when one neighbor is taken away.

The text is read after the prompt as generation would write it: the prompt is padded on the left so that its last token
ends a chunk, and the neighbors act from that token on. Letters: K neighbors, R tokens per neighbor, T tokens of the text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retro_engine.config import ModelConfig
from retro_engine.errors import UsageError
from retro_engine.generate.decoding_batch import PIECE_CHUNKS
from retro_engine.generate.generator import Generator, encode_neighbors
from retro_engine.library.filters import Filter
from retro_engine.model.decode_cache import new_cache
from retro_engine.model.decode_prefix import read_in_front
from retro_engine.model.decoding import prefill
from retro_engine.model.retro import RetroModel
from retro_engine.retrieval.hit import Hit

PIECE_NEIGHBOR_TOKENS = 8192  # encoded at once, where a chunk has no more
POSITIONS = 32  # whose logits are made fp64 at once


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Log-probabilities (nats) of the text's tokens with all neighbors, with each one removed, and with none."""

    pieces: list[str]  # [T] the text of each token
    neighbors: list[Hit]  # [K]
    log_probs_T: np.ndarray
    without_KT: np.ndarray
    off_T: np.ndarray

    @property
    def token_changes(self) -> np.ndarray:
        """[K, T] what each neighbor adds to each token, given the others: above 0 where it makes the token likelier."""
        return self.log_probs_T - self.without_KT

    @property
    def changes(self) -> np.ndarray:
        """[K] the same summed over the text."""
        return self.token_changes.sum(1)

    def summary(self) -> dict[str, Any]:
        """JSON-ready: the text's log-probability with all and with no neighbors, each token's, and each neighbor's change."""
        return {
            "log_prob": float(self.log_probs_T.sum()),
            "log_prob_off": float(self.off_T.sum()),
            "tokens": [
                {"text": piece, "log_prob": float(on), "log_prob_off": float(off)}
                for piece, on, off in zip(self.pieces, self.log_probs_T, self.off_T)
            ],
            "neighbors": [
                {**hit.to_json(), "change": float(change), "token_changes": [float(value) for value in row]}
                for hit, change, row in zip(self.neighbors, self.changes, self.token_changes)
            ],
        }


def explain(
    generator: Generator,
    prompt: str,
    text: str,
    neighbors: Sequence[str] | None = None,
    num_neighbors: int | None = None,
    check: Callable[[], None] = lambda: None,
    where: Filter | None = None,
) -> Explanation:
    """How much each of `neighbors` (texts; None = retrieved for the prompt's last chunk, among documents that match `where`)
    changes `text` after `prompt`.

    `check` is called again and again and ends the work by raising. Raises UsageError for an empty prompt or text, for a plain decoder, and where there is no neighbor to explain.
    """
    model, tokenizer = generator.model, generator.tokenizer
    if generator.beside is not None:
        why = "beside a memory a neighbor is worth other than it is to the model alone"
        raise UsageError("what neighbors are worth cannot be told", why, "ask a server without --memory")
    if not model.config.retrieval:
        raise UsageError("there is nothing to explain", "this model is a plain decoder (model.retrieval=false)")
    prompt_ids = tokenizer.encode(prompt)
    text_ids, offsets = tokenizer.encode_after(prompt, text)
    for name, ids in (("prompt", prompt_ids), ("text", text_ids)):
        if not ids:
            raise UsageError(f"the {name} is empty", "a text after a prompt is explained")
    R = model.config.r
    if neighbors is not None:
        hits = [Hit.given(number, given) for number, given in enumerate(neighbors)]
        tokens_KR, lengths_K = encode_neighbors(tokenizer, neighbors, R)
    else:
        count = num_neighbors or model.config.num_neighbors
        hits, tokens_KR, lengths_K = _retrieved(generator, prompt_ids, count, where)
    if not hits:
        raise UsageError("there are no neighbors", "none were given and none were found", "--neighbors TEXT")
    choices_VK, pad_id = removed_lengths(lengths_K), tokenizer.pad_id
    rows = text_log_probs(model, prompt_ids, text_ids, tokens_KR, lengths_VK=choices_VK, pad_id=pad_id, check=check)
    pieces = [text[start:end] for start, end in offsets]
    return Explanation(pieces=pieces, neighbors=hits, log_probs_T=rows[0], without_KT=rows[1:-1], off_T=rows[-1])


def explain_cost(config: ModelConfig, prompt_length: int, text_length: int, num_neighbors: int) -> int:
    """Tokens that an explanation computes, those of the neighbors of each chunk included; known before any work."""
    choices, read = num_neighbors + 2, config.chunk_size + text_length
    return prompt_length + choices * (read + read * num_neighbors * config.r // config.chunk_size)


def removed_lengths(lengths_K: np.ndarray) -> np.ndarray:
    """[K + 2, K]: all neighbors, each one removed, none."""
    K = len(lengths_K)
    keeps = np.concatenate((np.ones((1, K), bool), ~np.eye(K, dtype=bool), np.zeros((1, K), bool)))
    return np.where(keeps, lengths_K, 0)


@torch.no_grad()
def text_log_probs(
    model: RetroModel,
    prompt_ids: Sequence[int],
    text_ids: Sequence[int],
    tokens_KR: np.ndarray,
    lengths_VK: np.ndarray,
    pad_id: int,
    check: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """[V, T] nats of `text_ids` after `prompt_ids`, for each of V choices of valid tokens of the same neighbors.

    One choice at a time, and in pieces of some chunks, as generation takes prompts in: memory is that of a piece and of
    one sequence's cache. What comes before the prompt's last chunk is computed once. `check` is called before each piece
    and ends the work by raising. Raises UsageError where the model has too few learned positions.
    """
    config, device = model.config, model.device
    M = config.chunk_size
    pad = -len(prompt_ids) % M
    tokens = [pad_id] * pad + [*prompt_ids, *text_ids]
    first = pad + len(prompt_ids)
    most = config.most_tokens
    if most is not None and config.positions_in_front(tokens_KR.size) + len(tokens) > most:
        raise UsageError(
            f"prompt and text have {len(tokens)} tokens", f"the model has {most} positions", "shorten them"
        )
    given = torch.tensor([tokens], device=device)
    cache = new_cache(model, 1, len(tokens), tokens_KR.size)
    cache.clear(0, pad)
    shared = first - M  # the last chunk of the prompt is the first whose neighbors are read
    for start in range(0, shared, PIECE_CHUNKS * M):
        check()
        prefill(model, cache, given[:, start : min(start + PIECE_CHUNKS * M, shared)])
    piece = M * max(1, min(PIECE_CHUNKS, PIECE_NEIGHBOR_TOKENS // max(1, tokens_KR.size)))
    out = np.zeros((len(lengths_VK), len(text_ids)))
    for choice, lengths_K in enumerate(lengths_VK):
        cache.rewind(0, shared)
        keeps = lengths_K > 0
        neighbors_KR = torch.from_numpy(tokens_KR[keeps]).to(device)
        kept_K = torch.from_numpy(lengths_K[keeps]).to(device)
        if keeps.any() and cache.reads(0):
            read_in_front(cache, [0], neighbors_KR[None], kept_K[None])
        for start in range(shared, len(tokens) - 1, piece):
            check()
            stop = min(start + piece, len(tokens) - 1)
            L = stop // M - start // M if keeps.any() else 0
            neighbors = neighbors_KR.expand(1, L, -1, -1) if L else None
            lengths = kept_K.expand(1, L, -1) if L else None
            logits_TV = prefill(model, cache, given[:, start:stop], neighbors, lengths)[0]
            begin = max(start, first - 1)  # the logits before are of the prompt's own tokens
            if begin < stop:
                values = _log_probs(logits_TV[begin - start :], given[0, begin + 1 : stop + 1])
                out[choice, begin + 1 - first : stop + 1 - first] = values.cpu().numpy()
    return out


def _log_probs(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """[T] fp64, from some positions at a time."""
    parts = [
        logits.double().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        for logits, targets in zip(logits_TV.split(POSITIONS), targets_T.split(POSITIONS))
    ]
    return torch.cat(parts)


def _retrieved(
    generator: Generator, prompt_ids: list[int], count: int, where: Filter | None
) -> tuple[list[Hit], np.ndarray, np.ndarray]:
    """The neighbors that generation would read after the prompt: hits, tokens [K, R], lengths [K]."""
    retriever = generator.retriever
    if retriever is None:
        raise UsageError(
            "there are no neighbors", "no text and no store to retrieve from was given", "--neighbors TEXT"
        )
    M, R = generator.model.config.chunk_size, generator.model.config.r
    (found,) = retriever.neighbors([generator.tokenizer.decode(prompt_ids[-M:])], count, R, where=where)
    is_found = found.lengths_K > 0
    return found.hits, found.tokens_KR[is_found], found.lengths_K[is_found]
