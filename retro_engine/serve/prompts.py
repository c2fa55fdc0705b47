"""What a prompt may be, and what the requests of one body may cost together: checked before any work."""

from collections.abc import Sequence
from typing import Any

from retro_engine.generate.request import Request, request_cost
from retro_engine.serve.api_error import ApiError
from retro_engine.serve.bounds import Limits
from retro_engine.serve.service import Service


def check_model_name(service: Service, name: str, also: str | None = None) -> None:
    """Raises ApiError 404 for a model that is not served; `also` has another name where it is asked for."""
    if name not in service.names and (also is None or name != also):
        raise ApiError(404, f"model {name!r} is not served here: {service.name!r} is", "model", "model_not_found")


def encode_prompts(
    service: Service, prompt: Any, limits: Limits, param: str = "prompt", most: int | None = None
) -> list[list[int]]:
    """Prompts in any of their forms as token ids, at most `most` (None: as many as choices). Raises ApiError for what
    cannot be continued.
    """
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        prompt = [prompt]
    most = limits.choices if most is None else most
    if len(prompt) > most:
        raise ApiError(400, f"{len(prompt)} prompts: at most {most} are taken at once", param)
    return [_encode(service, one, limits, param) for one in prompt] or _refuse_empty(param)


def _encode(service: Service, prompt: str | list[int], limits: Limits, param: str) -> list[int]:
    ids = service.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    if not ids:
        _refuse_empty(param)
    if len(ids) > limits.prompt_tokens:
        why = f"{len(ids):,} tokens: at most {limits.prompt_tokens:,} are read"
        raise ApiError(400, f"{_spoken(param)} has {why}", param, "context_length_exceeded")
    check_ids(service, ids, param)
    return ids


def check_ids(service: Service, ids: Sequence[int], param: str) -> None:
    top = service.tokenizer.vocab_size
    outside = next((i for i in ids if not 0 <= i < top), None)
    if outside is not None:
        raise ApiError(400, f"token id {outside} is outside the vocabulary of {top:,}", param, "token_not_found")


def _refuse_empty(param: str) -> list[list[int]]:
    raise ApiError(400, f"{_spoken(param)} is empty: there is nothing to read", param, "empty_prompt")


def _spoken(param: str) -> str:
    return f"the {param}" if param in ("text", "input") else "the prompt"


def check_room(
    service: Service, prompts: Sequence[list[int]], new_tokens: int, neighbor_tokens: int, names: tuple[str, str, str]
) -> None:
    """Raises ApiError for what no row of the engine has room for; `names` of the fields: prompt, new tokens, neighbors."""
    longest, room, most = max(map(len, prompts)), service.engine.max_tokens, service.engine.max_neighbors
    if longest + new_tokens > room:
        why = f"{longest:,} tokens of the prompt and {new_tokens:,} new ones: a sequence has at most {room:,}"
        raise ApiError(400, why, names[1] if longest < room else names[0], "context_length_exceeded")
    if neighbor_tokens > most:
        why = f"{neighbor_tokens:,} tokens of neighbors: at most {most:,} are read at a time"
        raise ApiError(400, why, names[2])


def check_cost(asked: Sequence[Request], service: Service, limits: Limits, param: str) -> None:
    """Raises ApiError for requests of one body that are each allowed and too much together, before any work."""
    config, has_retriever = service.generator.model.config, service.generator.retriever is not None
    tokens = sum(request_cost(one, config, has_retriever) for one in asked)
    if tokens > limits.work_tokens:
        why = f"prompts, answers and their neighbors would be {tokens:,} tokens: at most {limits.work_tokens:,}"
        raise ApiError(400, why, param, "too_much_work")
    first = asked[0]
    shown = sum(one.max_new_tokens + (len(one.prompt) if one.echo else 0) for one in asked)
    numbers = 0 if first.logprobs is None else shown * (1 + first.logprobs)
    if numbers > limits.logprobs:
        why = f"the answer would have {numbers:,} log-probabilities: at most {limits.logprobs:,}"
        raise ApiError(400, why, "logprobs", "too_much_work")
    size = sum(len(text.encode()) for text in first.neighbors or ())
    sent = size * sum(1 + one.max_new_tokens // config.chunk_size for one in asked)
    if sent > limits.sent_bytes:
        why = f"the answer would repeat {sent:,} bytes of neighbors: at most {limits.sent_bytes:,}"
        raise ApiError(400, why, "retro.neighbors", "too_much_work")
