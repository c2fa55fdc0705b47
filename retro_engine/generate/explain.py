"""What each neighbor did: the change of a text's log-probability, token by token, when one neighbor is taken away.

The text is read after the prompt as generation would write it: the prompt is padded on the left so that its last token
ends a chunk, and the neighbors act from that token on. Letters: K neighbors, R tokens per neighbor, T tokens of the text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from retro_engine.errors import UsageError
from retro_engine.generate.generator import Generator, encode_neighbors
from retro_engine.model.retro import RetroModel
from retro_engine.retrieval.search import Hit


@dataclass(frozen=True)
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
                {**vars(hit), "change": float(change), "token_changes": [float(value) for value in row]}
                for hit, change, row in zip(self.neighbors, self.changes, self.token_changes)
            ],
        }


def explain(
    generator: Generator,
    prompt: str,
    text: str,
    neighbors: Sequence[str] | None = None,
    num_neighbors: int | None = None,
) -> Explanation:
    """How much each of `neighbors` (texts; None = retrieved for the prompt's last chunk) changes `text` after `prompt`.

    Raises UsageError for an empty prompt or text, for a plain decoder, and where there is no neighbor to explain.
    """
    model, tokenizer = generator.model, generator.tokenizer
    if model.encoder is None:
        raise UsageError("there is nothing to explain", "this model is a plain decoder (model.retrieval=false)")
    prompt_ids = tokenizer.encode(prompt)
    text_ids, offsets = tokenizer.encode_with_offsets(text)
    for name, ids in (("prompt", prompt_ids), ("text", text_ids)):
        if not ids:
            raise UsageError(f"the {name} is empty", "a text after a prompt is explained")
    R = model.config.r
    if neighbors is not None:
        hits = [Hit(-1, f"given {number + 1}", "", 0.0, given, "") for number, given in enumerate(neighbors)]
        tokens_KR, lengths_K = encode_neighbors(tokenizer, neighbors, R)
    else:
        hits, tokens_KR, lengths_K = _retrieved(generator, prompt_ids, num_neighbors or model.config.num_neighbors)
    if not hits:
        raise UsageError("there are no neighbors", "none were given and none were found", "--neighbors TEXT")
    rows = text_log_probs(model, prompt_ids, text_ids, tokens_KR, removed_lengths(lengths_K), tokenizer.pad_id)
    pieces = [text[start:end] for start, end in offsets]
    return Explanation(pieces, hits, rows[0], rows[1:-1], rows[-1])


def removed_lengths(lengths_K: np.ndarray) -> np.ndarray:
    """[K + 2, K]: all neighbors, each one removed, none."""
    K = len(lengths_K)
    keeps = np.concatenate((np.ones((1, K), bool), ~np.eye(K, dtype=bool), np.zeros((1, K), bool)))
    return np.where(keeps, lengths_K, 0)


def text_log_probs(
    model: RetroModel,
    prompt_ids: Sequence[int],
    text_ids: Sequence[int],
    tokens_KR: np.ndarray,
    lengths_VK: np.ndarray,
    pad_id: int,
) -> np.ndarray:
    """[V, T] nats of `text_ids` after `prompt_ids`, for each of V choices of valid tokens of the same neighbors.

    Raises UsageError where the model has too few learned positions.
    """
    config, device = model.config, model.embedding.weight.device
    M, (V, K) = config.chunk_size, lengths_VK.shape
    pad = -len(prompt_ids) % M
    tokens = [pad_id] * pad + [*prompt_ids, *text_ids]
    first = pad + len(prompt_ids)
    rows = config.max_position_embeddings or config.encoder_seq_length
    if config.position_embedding == "learned" and len(tokens) > rows:
        raise UsageError(
            f"prompt and text have {len(tokens)} tokens", f"the model has {rows} positions", "shorten them"
        )
    L = len(tokens) // M
    lengths = np.zeros((V, L, K), np.int64)
    lengths[:, first // M - 1 :] = lengths_VK[:, None]
    neighbors = torch.from_numpy(tokens_KR).to(device).expand(V, L, -1, -1)
    documents = torch.tensor([-1] * pad + [0] * (len(tokens) - pad), device=device).expand(V, -1)
    given = torch.tensor(tokens, device=device).expand(V, -1)
    with torch.no_grad():
        hidden = model.hidden(given, neighbors, torch.from_numpy(lengths).to(device), documents)
        logits = model.logits(hidden[:, first - 1 : -1])
        log_probs = logits.double().log_softmax(-1).gather(-1, given[:, first:, None])[..., 0]
    return log_probs.cpu().numpy()


def _retrieved(generator: Generator, prompt_ids: list[int], count: int) -> tuple[list[Hit], np.ndarray, np.ndarray]:
    """The neighbors that generation would read after the prompt: hits, tokens [K, R], lengths [K]."""
    retriever = generator.retriever
    if retriever is None:
        raise UsageError(
            "there are no neighbors", "no text and no store to retrieve from was given", "--neighbors TEXT"
        )
    M = generator.model.config.chunk_size
    (found,) = retriever.neighbors([generator.tokenizer.decode(prompt_ids[-M:])], count, generator.model.config.r)
    is_found = found.lengths_K > 0
    return found.hits, found.tokens_KR[is_found], found.lengths_K[is_found]
