"""Generation with retrieval at every chunk boundary: prefill, cached decoding, attribution.

Letters: T prompt tokens, M chunk length, K neighbors, R tokens per neighbor, V vocabulary.
"""

from collections.abc import Generator as PythonGenerator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import StoreError, UsageError
from retro_engine.generate.request import Generation, Segment
from retro_engine.generate.sampling import Sampling, choose
from retro_engine.model.retro import RetroModel
from retro_engine.retrieval.search import Hit, Retriever


@dataclass
class _Step:
    logits_V: Tensor
    new_hits: list[Hit] | None  # set when this step retrieved


StepStream = PythonGenerator[_Step, int, None]
Given = tuple[Tensor, Tensor, list[Hit]]  # tokens [K, R], lengths [K] and the texts


class Generator:
    """A model with its tokenizer and, with a retriever, live retrieval."""

    def __init__(self, model: RetroModel, tokenizer: Tokenizer, retriever: Retriever | None = None):
        """Raises StoreError when the retriever's stores were made with another tokenizer."""
        if model.config.partial_chunk != "last":
            raise UsageError(
                f"model.partial_chunk={model.config.partial_chunk}", "such a model cannot be decoded with a cache"
            )
        self.model, self.tokenizer, self.retriever = model, tokenizer, retriever
        if retriever is not None:
            other = retriever.stores[0].manifest["tokenizer"]
            if other != tokenizer.fingerprint:
                raise StoreError(
                    f"the model has tokenizer {tokenizer.fingerprint[:12]}",
                    f"{retriever.stores[0].folder} has {other[:12]}",
                    "retro prepare --tokenizer CHECKPOINT",
                )

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        neighbors: Sequence[str] | None = None,
        num_neighbors: int | None = None,
        retrieved_length: int | None = None,
        pad_prompt: bool = True,
    ) -> Generation:
        """Continue `prompt`; ends at the end-of-document token or after `max_new_tokens`.

        `neighbors`: texts to read from the prompt's last token on instead of retrieved ones; [] = retrieval off.
        Raises UsageError for an empty prompt or a setting that cannot be used.
        """
        sampling = sampling or Sampling()
        notes: list[str] = []
        steps = self._steps(prompt, max_new_tokens, neighbors, num_neighbors, retrieved_length, pad_prompt, notes)
        generator = torch.Generator().manual_seed(sampling.seed)
        tokens: list[int] = []
        starts: list[tuple[int, list[Hit]]] = []
        step = next(steps)
        while True:
            if step.new_hits is not None or not starts:
                starts.append((len(tokens), step.new_hits or []))
            token = choose(step.logits_V, sampling, generator)
            if token == self.tokenizer.eod_id:
                break
            tokens.append(token)
            if len(tokens) >= max_new_tokens:
                break
            step = steps.send(token)
        return Generation(self.tokenizer.decode(tokens), tokens, self._segments(tokens, starts), notes)

    def _segments(self, tokens: list[int], starts: list[tuple[int, list[Hit]]]) -> list[Segment]:
        ends = [start for start, _ in starts[1:]] + [len(tokens)]
        return [Segment(self.tokenizer.decode(tokens[a:b]), hits) for (a, hits), b in zip(starts, ends)]

    def _steps(
        self,
        prompt: str,
        max_new_tokens: int,
        neighbors: Sequence[str] | None,
        num_neighbors: int | None,
        retrieved_length: int | None,
        pad_prompt: bool,
        notes: list[str],
    ) -> StepStream:
        """Yields the logits of the next token; is sent the token that was chosen."""
        config = self.model.config
        M = config.chunk_size
        R = config.r if retrieved_length is None else retrieved_length
        K = config.num_neighbors if num_neighbors is None else num_neighbors
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens={max_new_tokens} cannot be used", "at least one token is generated")
        if config.r < R or R < 1:
            raise UsageError(
                f"retrieved_length={R} cannot be used", f"the model takes 1 to {config.r} tokens a neighbor"
            )
        prompt_ids = self.tokenizer.encode(prompt)
        if not prompt_ids:
            raise UsageError("the prompt is empty", "there is nothing to continue")
        if neighbors and self.model.encoder is None:
            raise UsageError("neighbors were given", "this model is a plain decoder (model.retrieval=false)")
        is_reading = self.model.encoder is not None and (
            bool(neighbors) if neighbors is not None else self.retriever is not None
        )
        given = self._encode_given(neighbors, R, notes) if neighbors and is_reading else None
        pad = -len(prompt_ids) % M if is_reading and pad_prompt else 0
        if is_reading and not pad_prompt and len(prompt_ids) < M:
            notes.append(
                f"inference.pad_prompt=false: the first retrieval happens at token {M}, the prompt has {len(prompt_ids)}"
            )
        tokens = [self.tokenizer.pad_id] * pad + prompt_ids
        learned = config.max_position_embeddings or config.encoder_seq_length
        if config.position_embedding == "learned" and len(tokens) + max_new_tokens > learned:
            raise UsageError(
                f"{len(tokens)} prompt and {max_new_tokens} new tokens",
                f"the model has {learned} positions",
                "ask for fewer",
            )
        return self._run(tokens, pad, max_new_tokens, given, K, R, is_reading)

    def _run(
        self, tokens: list[int], pad: int, max_new_tokens: int, given: Given | None, K: int, R: int, is_reading: bool
    ) -> StepStream:
        M = self.model.config.chunk_size
        device = self.model.embedding.weight.device
        cache = self.model.new_cache(1, len(tokens) + max_new_tokens)
        start = 0
        while True:
            stop = len(tokens)
            chunks = [tokens[max(u * M, pad) : (u + 1) * M] for u in range(start // M, stop // M)]
            neighbors = lengths = hits = None
            if chunks and is_reading:
                neighbors, lengths, hits = self._neighbors_of(chunks, given, K, R, is_prompt=start == 0)
            block = torch.tensor([tokens[start:]], device=device)
            is_token = None
            if start < pad:
                is_token = (torch.arange(start, stop, device=device) >= pad)[None]
            with torch.no_grad():
                logits = self.model.step(
                    block,
                    cache,
                    None if neighbors is None else neighbors.to(device),
                    None if lengths is None else lengths.to(device),
                    is_token,
                    last_only=True,
                )[0, 0]
            start = stop
            tokens.append((yield _Step(logits, hits)))

    def _neighbors_of(
        self, chunks: list[list[int]], given: Given | None, K: int, R: int, is_prompt: bool
    ) -> tuple[Tensor, Tensor, list[Hit]]:
        """Tokens [1, c, K, R], lengths [1, c, K] and, for the last chunk, the hits. Given neighbors are read from
        the prompt's last token on: the chunks before have none.
        """
        if given is not None:
            tokens, lengths, hits = given
            all_lengths = lengths.expand(1, len(chunks), -1).clone()
            if is_prompt:
                all_lengths[:, :-1] = 0
            return tokens.expand(1, len(chunks), -1, -1), all_lengths, hits
        assert self.retriever is not None
        texts = self.tokenizer.decode_batch(chunks)
        ids, scores = self.retriever.search(texts, K)
        gathered, valid = self.retriever.loader.gather(ids, R)
        hits = [self.retriever.hit(int(i), float(s)) for i, s in zip(ids[-1], scores[-1]) if i >= 0]
        return torch.from_numpy(gathered)[None], torch.from_numpy(valid)[None], hits

    def _encode_given(self, texts: Sequence[str], R: int, notes: list[str]) -> Given:
        tokens, lengths = encode_neighbors(self.tokenizer, texts, R)
        for number, text in enumerate(texts):
            if len(self.tokenizer.encode(text)) > R:
                notes.append(f"neighbor {number + 1} is longer than {R} tokens: the rest is cut")
        hits = [Hit(-1, f"given {number + 1}", "", 0.0, text, "") for number, text in enumerate(texts)]
        return torch.from_numpy(tokens), torch.from_numpy(lengths), hits


def encode_neighbors(tokenizer: Tokenizer, texts: Sequence[str], R: int) -> tuple[np.ndarray, np.ndarray]:
    """Texts -> tokens [K, R] padded and lengths [K]; what is past R tokens is cut, an empty text has length 0."""
    tokens = np.full((len(texts), R), tokenizer.pad_id, np.int64)
    lengths = np.zeros(len(texts), np.int64)
    for number, text in enumerate(texts):
        ids = tokenizer.encode(text)[:R] if text else []
        tokens[number, : len(ids)] = ids
        lengths[number] = len(ids)
    return tokens, lengths
