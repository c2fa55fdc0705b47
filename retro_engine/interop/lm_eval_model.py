"""lm-evaluation-harness over a RETRO: loglikelihood, loglikelihood_rolling and generate_until, with retrieval per request.

Each chunk of a request is asked for with its own text, as generation does; the prompt is padded on the left so that its last
token ends a chunk, and what follows can read what was found for it. Letters: T tokens, M chunk length, K neighbors.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retro_engine.errors import MissingInputError, UsageError, extra, nearest
from retro_engine.generate.generator import Generator
from retro_engine.generate.request import Request
from retro_engine.generate.sampling import Sampling
from retro_engine.model.decode_cache import new_cache
from retro_engine.model.decode_prefix import read_in_front
from retro_engine.model.decoding import prefill

with extra("eval", "lm-eval is not installed", "--lm-eval runs its tasks"):
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

MAX_NEW_TOKENS = 128  # where a task does not say


class RetroLM(LM):
    """`generator` has the model; without a retriever, retrieval is off."""

    def __init__(self, generator: Generator):
        super().__init__()
        self.generator = generator
        self.model, self.tokenizer = generator.model, generator.tokenizer
        c = self.model.config
        self.max_length = c.encoder_seq_length
        if c.reads_prefix and c.most_tokens is not None:  # padding and neighbors have positions too
            self.max_length = min(self.max_length, c.most_tokens - c.first_position - c.chunk_size)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its text, and whether greedy decoding gives it."""
        return [self._loglikelihood(*request.args) for request in requests]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows of the model's sequence length."""
        totals = []
        for request in requests:
            ids = self.tokenizer.encode(request.args[0])
            windows = get_rolling_token_windows(ids, self.tokenizer.eod_id, self.max_length, 1)
            pairs = [make_disjoint_window(window) for window in windows]
            totals.append(sum(self._score(prompt, text)[0] for prompt, text in pairs))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text after each prompt, up to the first of its stop strings."""
        return [self._generate(*request.args) for request in requests]

    def _loglikelihood(self, prompt: str, continuation: str) -> tuple[float, bool]:
        spaces = len(prompt) - len(prompt.rstrip())
        if spaces:  # a word and the space before it are one token
            prompt, continuation = prompt[:-spaces], prompt[-spaces:] + continuation
        prompt_ids = self.tokenizer.encode(prompt)
        text_ids = self.tokenizer.encode(prompt + continuation)[len(prompt_ids) :]
        room = max(1, self.max_length - len(text_ids))
        return self._score(prompt_ids[-room:] or [self.tokenizer.eod_id], text_ids)

    def _score(self, prompt_ids: Sequence[int], text_ids: Sequence[int]) -> tuple[float, bool]:
        M, pad_id = self.model.config.chunk_size, self.tokenizer.pad_id
        is_reading = self.model.config.retrieval and self.generator.retriever is not None
        pad = -len(prompt_ids) % M if is_reading else 0
        tokens = [pad_id] * pad + [*prompt_ids, *text_ids]
        first = pad + len(prompt_ids)
        neighbors = lengths = None
        if is_reading:
            found, valid = self._retrieved([tokens[max(u * M, pad) : (u + 1) * M] for u in range(len(tokens) // M)])
            neighbors, lengths = torch.from_numpy(found)[None], torch.from_numpy(valid)[None]
        device = self.model.device
        given = torch.tensor([tokens], device=device)
        documents = torch.tensor([[-1] * pad + [0] * (len(tokens) - pad)], device=device)
        if neighbors is not None and lengths is not None:
            neighbors, lengths = neighbors.to(device), lengths.to(device)
        with torch.no_grad():
            if neighbors is not None and self.model.config.reads_prefix:
                logits = self._logits_in_front(given, neighbors, lengths, pad, first)
            else:
                hidden = self.model.hidden(given, neighbors, lengths, documents)
                logits = self.model.logits(hidden[0, first - 1 : -1])
            log_probs = logits.double().log_softmax(-1)
        text = given[0, first:]
        total = float(log_probs.gather(-1, text[:, None]).sum())
        return total, bool((log_probs.argmax(-1) == text).all())

    def _logits_in_front(
        self, tokens_1T: Tensor, neighbors_1LKR: Tensor, lengths_1LK: Tensor | None, pad: int, first: int
    ) -> Tensor:
        """[t, V] before each token from `first` on. As in generation a chunk of the prompt, all of which is there, reads its own
        neighbors from its first token on.
        """
        assert lengths_1LK is not None
        L, K, R = neighbors_1LKR.shape[1:]
        encodings, prompt = self.generator.encodings, first // self.model.config.chunk_size
        encode = None if encodings is None else encodings.of
        cache = new_cache(self.model, 1, tokens_1T.shape[1], K * R, encode)
        cache.clear(0, pad)
        read_in_front(cache, [0], neighbors_1LKR[:, 0], lengths_1LK[:, 0])
        chunks = [*range(1, prompt), prompt - 1, *range(prompt, L)]
        logits = prefill(self.model, cache, tokens_1T, neighbors_1LKR[:, chunks], lengths_1LK[:, chunks])
        return logits[0, first - 1 : -1]

    def _retrieved(self, chunks: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        retriever, config = self.generator.retriever, self.model.config
        assert retriever is not None
        found = retriever.neighbors(self.tokenizer.decode_batch(chunks), config.num_neighbors, config.r)
        return np.stack([each.tokens_KR for each in found]), np.stack([each.lengths_K for each in found])

    def _generate(self, prompt: str, options: dict[str, Any]) -> str:
        stops = options.get("until") or []
        stops = (stops,) if isinstance(stops, str) else tuple(stop for stop in stops if stop)
        temperature = float(options.get("temperature", 0.0) or 0.0)
        sampling = Sampling()
        if options.get("do_sample", temperature > 0) and temperature > 0:
            sampling = Sampling(
                greedy=False,
                temperature=temperature,
                top_k=int(options.get("top_k", 0)),
                top_p=float(options.get("top_p", 1.0)),
            )
        count = int(options.get("max_gen_toks", MAX_NEW_TOKENS))
        room = max(1, self.max_length - count)
        ids = self.tokenizer.encode(prompt)[-room:]
        neighbors: list[str] | None = None if self.generator.retriever is not None else []
        return self.generator.generate_all([Request(ids, count, sampling=sampling, neighbors=neighbors, stop=stops)])[
            0
        ].text


def run_tasks(
    generator: Generator, tasks: Sequence[str], folder: str | Path | None = None, limit: int | None = None
) -> dict[str, dict[str, Any]]:
    """Results by task. `folder`: task files of yours; `limit`: requests a task.

    Raises UsageError for a task that is not installed, MissingInputError for data that are not here.
    """
    if folder is not None and not Path(folder).is_dir():
        raise MissingInputError(f"{folder} does not exist", "--lm-eval-path names a folder of task files")
    manager = None
    if folder is not None:  # reading lm-eval's own task files takes half a minute
        manager = TaskManager(include_path=str(folder), include_defaults=False)
    if manager is None or not all(manager.match_tasks([name]) for name in tasks):
        manager = TaskManager(include_path=str(folder) if folder is not None else None)
    for name in tasks:
        if not manager.match_tasks([name]):
            close = nearest(name, list(manager.all_tasks)) or "lm-eval has no such task"
            raise UsageError(f"task {name!r} is not installed", close, "--lm-eval-path FOLDER adds task files of yours")
    try:
        found = simple_evaluate(
            RetroLM(generator),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
        )
    except (ConnectionError, FileNotFoundError) as error:
        raise MissingInputError(
            f"the data of {', '.join(tasks)} are not here",
            str(error).splitlines()[0],
            "name local tasks: --lm-eval-path",
        ) from error
    assert found is not None, tasks
    return {
        task: {key.removesuffix(",none"): value for key, value in values.items() if isinstance(value, int | float)}
        for task, values in found["results"].items()
    }
