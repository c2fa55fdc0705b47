"""Embeddings, tokens, and what each neighbor was worth."""

import base64
from functools import partial
from typing import Any, Literal

import numpy as np
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from retro_engine.generate.explain import Explanation, cost
from retro_engine.generate.explain import explain as explain_text
from retro_engine.serve.hits import neighbors_json
from retro_engine.serve.limits import ApiError, Ids, Prompts, Strict, Texts, parse, read_json
from retro_engine.serve.openai import check_model, encode_prompts
from retro_engine.serve.service import Service
from retro_engine.serve.state import brief, limits_of, long, service_of
from retro_engine.serve.work import Check

MAX_INPUTS = 256
EMBEDDED = 16  # texts between two looks at whether somebody still waits
MAX_TOKENS = 1 << 18  # of one call of tokenize or detokenize


class Embeddings(Strict):
    """The body of POST /v1/embeddings."""

    model: str
    input: Prompts
    encoding_format: Literal["base64", "float"] = "base64"
    dimensions: int | None = Field(None, ge=1)
    user: str | None = Field(None, max_length=512)


class Tokenize(Strict):
    """The body of POST /tokenize."""

    prompt: str
    model: str | None = None


class Detokenize(Strict):
    """The body of POST /detokenize."""

    tokens: Ids = Field(max_length=MAX_TOKENS)
    model: str | None = None


class Explain(Strict):
    """The body of POST /v1/explain. Without neighbors, those that are retrieved for the prompt."""

    prompt: str
    text: str
    neighbors: Texts | None = Field(None, min_length=1, max_length=32)
    k: int | None = Field(None, ge=1, le=32)
    model: str | None = None


async def embeddings(request: Request) -> Response:
    """Unit vectors of the library's embedder."""
    service, limits = service_of(request), limits_of(request)
    body = parse(Embeddings, await read_json(request, limits))
    check_model(service, body.model)
    is_one = isinstance(body.input, str) or (body.input and isinstance(body.input[0], int))
    rows: Any = [body.input] if is_one else body.input
    if not rows or len(rows) > MAX_INPUTS:
        raise ApiError(400, f"input has {len(rows)} texts: 1 to {MAX_INPUTS} are taken", "input")
    ids = await brief(request, partial(encode_prompts, most=MAX_INPUTS), service, rows, limits, "input")
    count = sum(map(len, ids))
    if count > limits.work_tokens:
        raise ApiError(400, f"input has {count:,} tokens: at most {limits.work_tokens:,}", "input", "too_much_work")
    vectors = await long(request, _embed, service, rows)
    if body.dimensions not in (None, vectors.shape[1]):
        raise ApiError(400, f"the embedder has {vectors.shape[1]} dimensions", "dimensions")

    def shown(vector: np.ndarray) -> Any:
        is_float = body.encoding_format == "float"
        return vector.tolist() if is_float else base64.b64encode(vector.tobytes()).decode()

    data = [{"object": "embedding", "index": i, "embedding": shown(vector)} for i, vector in enumerate(vectors)]
    usage = {"prompt_tokens": count, "total_tokens": count}
    return JSONResponse({"object": "list", "data": data, "model": service.name, "usage": usage})


def _embed(service: Service, rows: list[str | list[int]], check: Check) -> np.ndarray:
    parts = []
    for start in range(0, len(rows), EMBEDDED):
        check()
        part = rows[start : start + EMBEDDED]
        texts = [row if isinstance(row, str) else service.tokenizer.decode(row) for row in part]
        parts.append(np.asarray(service.embedder.encode(texts), "<f4"))
    return np.concatenate(parts)


async def tokenize(request: Request) -> Response:
    service, limits = service_of(request), limits_of(request)
    body = parse(Tokenize, await read_json(request, limits))
    check_model(service, body.model or service.name)
    tokens = await brief(request, service.tokenizer.encode, body.prompt)
    return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": limits.prompt_tokens})


async def detokenize(request: Request) -> Response:
    service = service_of(request)
    body = parse(Detokenize, await read_json(request, limits_of(request)))
    check_model(service, body.model or service.name)
    top = service.tokenizer.vocab_size
    outside = next((i for i in body.tokens if not 0 <= i < top), None)
    if outside is not None:
        raise ApiError(400, f"token id {outside} is outside the vocabulary of {top:,}", "tokens", "token_not_found")
    return JSONResponse({"prompt": await brief(request, service.tokenizer.decode, body.tokens)})


async def explain(request: Request) -> Response:
    """How much more likely each neighbor makes `text` after `prompt`: its log-probability with all neighbors, and
    the change when one is removed, and when all are.
    """
    service, limits = service_of(request), limits_of(request)
    body = parse(Explain, await read_json(request, limits))
    check_model(service, body.model or service.name)
    config = service.generator.model.config
    if not config.retrieval:
        raise ApiError(400, "this model is a plain decoder: it reads no neighbors", code="no_library")
    if body.neighbors is not None and body.k is not None:
        raise ApiError(400, "neighbors are given: k says nothing", "k", "contradiction")
    (prompt,) = await brief(request, encode_prompts, service, body.prompt, limits)
    (text,) = await brief(request, encode_prompts, service, body.text, limits, "text")
    if len(prompt) + len(text) > limits.prompt_tokens:
        raise ApiError(400, f"prompt and text have more than {limits.prompt_tokens:,} tokens", "text")
    count = body.k or config.num_neighbors if body.neighbors is None else len(body.neighbors)
    tokens = cost(config, len(prompt), len(text), count)
    if tokens > limits.work_tokens:
        param = "text" if count <= config.num_neighbors else "k" if body.neighbors is None else "neighbors"
        why = f"{len(text):,} tokens of text without each of {count} neighbors are {tokens:,} tokens to compute"
        raise ApiError(400, f"{why}: at most {limits.work_tokens:,}", param, "too_much_work")
    found = await long(request, _explain, service, body, count)
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


def _explain(service: Service, body: Explain, count: int, check: Check) -> Explanation:
    return explain_text(service.generator, body.prompt, body.text, body.neighbors, count, check=check)
