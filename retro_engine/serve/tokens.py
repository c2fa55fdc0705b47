"""Texts as token ids, and as the vectors of the library's embedder."""

import base64
from functools import partial
from typing import Any, Literal

import numpy as np
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from retro_engine.serve.api_error import ApiError
from retro_engine.serve.limits import Ids, Prompts, Strict, parse, read_json
from retro_engine.serve.prompts import check_ids, check_model_name, encode_prompts
from retro_engine.serve.request_context import brief, limits_of, long, service_of
from retro_engine.serve.service import Service
from retro_engine.serve.work import Check

MAX_INPUTS = 256
EMBEDDED = 16  # texts between two looks at whether somebody still waits
NO_EMBEDDER = (
    "there is no embedder that reads meaning here: vectors of hashed words are for the library's searches alone"
)
MAX_TOKENS = 1 << 18  # of one call of tokenize or detokenize


class Embeddings(Strict):
    """The body of POST /v1/embeddings."""

    model: str
    input: Prompts
    encoding_format: Literal["base64", "float"] = "base64"
    dimensions: int | None = Field(None, ge=1)
    user: str | None = Field(None, max_length=512)


class Tokenize(Strict):
    """The body of POST /tokenize: `prompt` as vLLM says, or `content` as llama.cpp does."""

    prompt: str | None = None
    content: str | None = None
    model: str | None = None


class Detokenize(Strict):
    """The body of POST /detokenize."""

    tokens: Ids = Field(max_length=MAX_TOKENS)
    model: str | None = None


async def embeddings(request: Request) -> Response:
    """Unit vectors of the library's embedder, whose name is the model's in the answer."""
    service, limits = service_of(request), limits_of(request)
    body = parse(Embeddings, await read_json(request, limits))
    check_model_name(service, body.model, service.embedder_name)
    if service.embedder is None:
        raise ApiError(501, NO_EMBEDDER, "model", "no_embedder")
    is_one = isinstance(body.input, str) or (body.input and isinstance(body.input[0], int))
    rows: Any = [body.input] if is_one else body.input
    if not rows or len(rows) > MAX_INPUTS:
        raise ApiError(400, f"input has {len(rows)} texts: 1 to {MAX_INPUTS} are taken", "input")
    ids = await brief(request, partial(encode_prompts, param="input", most=MAX_INPUTS), service, rows, limits)
    count = sum(map(len, ids))
    if count > limits.work_tokens:
        raise ApiError(400, f"input has {count:,} tokens: at most {limits.work_tokens:,}", "input", "too_much_work")
    texts = [row if isinstance(row, str) else service.tokenizer.decode(row) for row in rows]
    vectors = await long(request, embed_texts, service, texts)
    if body.dimensions not in (None, vectors.shape[1]):
        raise ApiError(400, f"the embedder has {vectors.shape[1]} dimensions", "dimensions")

    def shown(vector: np.ndarray) -> Any:
        is_float = body.encoding_format == "float"
        return vector.tolist() if is_float else base64.b64encode(vector.tobytes()).decode()

    data = [{"object": "embedding", "index": i, "embedding": shown(vector)} for i, vector in enumerate(vectors)]
    usage = {"prompt_tokens": count, "total_tokens": count}
    return JSONResponse({"object": "list", "data": data, "model": service.embedder_name, "usage": usage})


def embed_texts(service: Service, texts: list[str], check: Check) -> np.ndarray:
    """[U, Z] of the library's embedder, which is there."""
    assert service.embedder is not None
    parts = []
    for start in range(0, len(texts), EMBEDDED):
        check()
        parts.append(np.asarray(service.embedder.encode(texts[start : start + EMBEDDED]), "<f4"))
    return np.concatenate(parts)


async def tokenize(request: Request) -> Response:
    service, limits = service_of(request), limits_of(request)
    body = parse(Tokenize, await read_json(request, limits))
    check_model_name(service, body.model or service.name)
    if (body.prompt is None) == (body.content is None):
        raise ApiError(400, "prompt (or content, as llama.cpp calls it) is the text", "prompt")
    tokens = await brief(request, service.tokenizer.encode, body.content if body.prompt is None else body.prompt)
    return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": limits.prompt_tokens})


async def detokenize(request: Request) -> Response:
    service = service_of(request)
    body = parse(Detokenize, await read_json(request, limits_of(request)))
    check_model_name(service, body.model or service.name)
    check_ids(service, body.tokens, "tokens")
    return JSONResponse({"prompt": await brief(request, service.tokenizer.decode, body.tokens)})
