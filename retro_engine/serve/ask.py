"""Questions to the library, answered by a reader with the passage it copied from: `POST /v1/ask` of `retro serve --reader`."""

from dataclasses import replace
from functools import partial
from typing import Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from retro_engine.errors import UsageError
from retro_engine.readers.ahead import MOST_CHARACTERS, checked_question
from retro_engine.readers.ask import Answer, answer_of, choose, nothing_found, passages_of, request_of
from retro_engine.serve.api_error import ApiError
from retro_engine.serve.limits import Strict, parse, read_json
from retro_engine.serve.prompts import check_cost, check_model_name, check_room, encode_prompts
from retro_engine.serve.request_context import brief, caller_id, limits_of, service_of, state_of
from retro_engine.serve.stream import RunningRequests

MOST_PASSAGES = 32


class Ask(Strict):
    """The body of POST /v1/ask."""

    question: str = Field(max_length=MOST_CHARACTERS)
    k: int | None = Field(None, ge=1, le=MOST_PASSAGES)  # passages that are read
    model: str | None = None


async def ask(request: Request) -> Response:
    """Answer a question from the documents, shortly, with where the answer stands in them, or say that they do not hold it."""
    service, limits = service_of(request), limits_of(request)
    body = parse(Ask, await read_json(request, limits))
    check_model_name(service, body.model or service.name)
    reader = service.reader
    if reader is None:
        raise ApiError(400, "this model is no reader: retro serve --reader NAME serves one", code="no_reader")
    try:
        question = checked_question(body.question)
    except UsageError as error:
        raise ApiError(400, f"{error.what}: {error.why}", "question") from error
    version = service.index_version
    count = body.k or reader.reading.num_neighbors
    found = await brief(request, partial(service.find, k=count), question)
    if not found.hits:
        answer = nothing_found(question, await brief(request, service.why_nothing, question))
        return JSONResponse(_shown(answer, version))
    passages = await brief(request, passages_of, found, service.tokenizer)
    passages = await brief(request, choose, service.generator, reader, question, passages)
    asked = request_of(reader, question, passages)
    (prompt,) = await brief(request, partial(encode_prompts, param="question"), service, asked.prompt, limits)
    read = len(passages) * service.generator.model.config.r
    check_room(service, [prompt], asked.max_new_tokens, read, ("question", "question", "k"))
    asked = replace(asked, prompt=prompt, caller=caller_id(request))
    check_cost([asked], service, limits, "k")
    text, num_tokens, metrics = "", 0, state_of(request).metrics
    async with await RunningRequests.start(service, [asked], request.receive, metrics) as running:
        async for _, event in running:
            text += event.text
            num_tokens += len(event.tokens)
    metrics.tokens(len(prompt), num_tokens)
    return JSONResponse(_shown(answer_of(reader, question, passages, text), version))


def _shown(answer: Answer, version: int) -> dict[str, Any]:
    values = {name: value for name, value in answer.to_json().items() if name not in ("seconds", "why")}
    sources = [{**source, "score": round(float(source["score"]), 6)} for source in values["sources"]]
    note = {"note": answer.why if answer.sources else f"no hit: {answer.why}"} if answer.why else {}
    return {"object": "answer", **values, "sources": sources, "index_version": version, **note}
