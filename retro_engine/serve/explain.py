"""What each neighbor was worth to a text: `POST /v1/explain`."""

from functools import partial

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from retro_engine.generate.explain import Explanation, explain_cost
from retro_engine.generate.explain import explain as explain_text
from retro_engine.library.filters import Filter
from retro_engine.serve.answers import neighbors_json
from retro_engine.serve.api_error import ApiError
from retro_engine.serve.constraints import Json
from retro_engine.serve.documents import filter_of, library_of
from retro_engine.serve.limits import Strict, Texts, parse, read_json
from retro_engine.serve.prompts import check_model_name, encode_prompts
from retro_engine.serve.request_context import brief, limits_of, long, service_of
from retro_engine.serve.service import Service
from retro_engine.serve.work import Check


class Explain(Strict):
    """The body of POST /v1/explain. Without neighbors, those that are retrieved for the prompt."""

    prompt: str
    text: str
    neighbors: Texts | None = Field(None, min_length=1, max_length=32)
    k: int | None = Field(None, ge=1, le=32)
    filters: Json | None = None  # which documents of the library, by their metadata (library/filters.py)
    model: str | None = None


async def explain(request: Request) -> Response:
    """How much more likely each neighbor makes `text` after `prompt`: its log-probability with all neighbors, and
    the change when one is removed, and when all are.
    """
    service, limits = service_of(request), limits_of(request)
    body = parse(Explain, await read_json(request, limits))
    check_model_name(service, body.model or service.name)
    config = service.generator.model.config
    if not config.retrieval:
        raise ApiError(400, "this model is a plain decoder: it reads no neighbors", code="no_library")
    if body.neighbors is not None and body.k is not None:
        raise ApiError(400, "neighbors are given: k says nothing", "k", "contradiction")
    where = filter_of(body.filters)
    if where is not None:
        library_of(request)
        if body.neighbors is not None:
            raise ApiError(400, "neighbors are given: filters say nothing", "filters", "contradiction")
    (prompt,) = await brief(request, encode_prompts, service, body.prompt, limits)
    (text,) = await brief(request, partial(encode_prompts, param="text"), service, body.text, limits)
    if len(prompt) + len(text) > limits.prompt_tokens:
        raise ApiError(400, f"prompt and text have more than {limits.prompt_tokens:,} tokens", "text")
    count = body.k or config.num_neighbors if body.neighbors is None else len(body.neighbors)
    tokens = explain_cost(config, len(prompt), len(text), count)
    if tokens > limits.work_tokens:
        param = "text" if count <= config.num_neighbors else "k" if body.neighbors is None else "neighbors"
        why = f"{len(text):,} tokens of text without each of {count} neighbors are {tokens:,} tokens to compute"
        raise ApiError(400, f"{why}: at most {limits.work_tokens:,}", param, "too_much_work")
    found = await long(request, _explain, service, body, count, where)
    if body.neighbors is not None:
        shown = [{"text": text, "source": "given"} for text in body.neighbors]
    else:
        shown = neighbors_json(found.neighbors)
    rows = [
        {**about, "removed": float(change), "token_changes": [float(value) for value in row]}
        for about, change, row in zip(shown, found.changes, found.token_changes)
    ]
    return JSONResponse(
        {
            "object": "explanation",
            "tokens": len(found.pieces),
            "logprob": float(found.log_probs_T.sum()),
            "logprob_without": float(found.off_T.sum()),
            "text_tokens": found.pieces,
            "neighbors": rows,
            "index_version": service.index_version,
        }
    )


def _explain(service: Service, body: Explain, count: int, where: Filter | None, check: Check) -> Explanation:
    return explain_text(service.generator, body.prompt, body.text, body.neighbors, count, check=check, where=where)
