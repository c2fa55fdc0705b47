"""NeMo's text-generation and retrieval services, for clients that were written for them: PUT /generate, PUT /knn.

Bodies and answers as theirs, in JSON only (theirs also exchanged pickles); behind sign-in and limits as all else.
"""

import secrets
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Union

from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from retro_engine.data.corpus import Document
from retro_engine.generate.request import Event, Request, TokenLogprob
from retro_engine.generate.sampling import TINY, Sampling
from retro_engine.serve.api_error import ApiError
from retro_engine.serve.documents import library_of
from retro_engine.serve.limits import Ids, Strict, Texts, parse, read_json
from retro_engine.serve.prompts import check_cost, check_room, encode_prompts
from retro_engine.serve.request_context import (
    audit,
    brief,
    caller_id,
    caller_of,
    count_tokens,
    limits_of,
    long,
    service_of,
    state_of,
    write,
)
from retro_engine.serve.stream import RunningRequests
from retro_engine.serve.work import Check

MAX_SENTENCES = 128
MAX_PROBS = 1 << 20  # numbers of `full_logprob` in one answer
MAX_ROWS = 1 << 13  # of /knn in one answer: sentences x neighbors


class Generate(Strict):
    """The body of PUT /generate, with NeMo's defaults."""

    sentences: Texts = Field(min_length=1, max_length=MAX_SENTENCES)
    tokens_to_generate: int = Field(64, ge=1)
    all_probs: bool = False
    temperature: float = Field(1.0, ge=TINY, le=100)
    add_BOS: bool = False
    greedy: bool = False
    top_k: int = Field(0, ge=0)
    top_p: float = Field(0.9, ge=0, le=1)  # 0 is off
    repetition_penalty: float = Field(1.2, ge=1)
    min_tokens_to_generate: int = Field(0, ge=0)
    end_strings: Texts = Field(["<|endoftext|>"], max_length=16)
    neighbors: int | None = Field(None, ge=0, le=64)  # how many a chunk; 0 = retrieval off
    compute_logprob: bool = False
    random_seed: int | None = Field(None, ge=0, lt=1 << 62)
    task_ids: None = None


class Knn(Strict):
    """The body of PUT /knn: with `neighbors` a search, without one documents to add, with `reset` neither."""

    sentences: Union[str, Texts, Annotated[list[Ids], Field(fail_fast=True)], None] = None  # noqa: UP007 - as Prompts
    neighbors: int | None = Field(None, ge=0, le=1000)
    add_eos: bool = False  # every document is closed by the end-of-document token anyway
    reset: bool | None = None


async def generate(request: HttpRequest) -> Response:
    """Continue sentences; `retrieved` has what each could read."""
    service, limits = service_of(request), limits_of(request)
    body = parse(Generate, await read_json(request, limits))
    size = service.tokenizer.vocab_size
    if body.all_probs and len(body.sentences) * body.tokens_to_generate * size > MAX_PROBS:
        raise ApiError(400, f"all_probs would be more than {MAX_PROBS:,} numbers", "all_probs")
    if body.tokens_to_generate > limits.new_tokens:
        raise ApiError(400, f"at most {limits.new_tokens:,} tokens are generated", "tokens_to_generate")
    prompts = await brief(request, partial(encode_prompts, param="sentences"), service, body.sentences, limits)
    R = service.generator.model.config.r
    names = "sentences", "tokens_to_generate", "neighbors"
    check_room(service, prompts, body.tokens_to_generate, R * (body.neighbors or 0), names)
    seed = secrets.randbits(48) if body.random_seed is None else body.random_seed
    caller = caller_id(request)
    asked = [_request(body, prompt, seed + number, size, caller) for number, prompt in enumerate(prompts)]
    check_cost(
        asked if not body.all_probs else [replace(one, logprobs=0) for one in asked], service, limits, "sentences"
    )
    running = await RunningRequests.start(service, asked, request.receive, state_of(request).metrics)
    events: list[list[Event]] = [[] for _ in asked]
    async with running:
        async for index, event in running:
            events[index].append(event)
    count_tokens(request, sum(map(len, prompts)), sum(len(e.tokens) for mine in events for e in mine))
    return JSONResponse(await brief(request, partial(_whole, body, service.tokenizer), prompts, events))


def _whole(body: Generate, tokenizer: Any, prompts: list[list[int]], events: list[list[Event]]) -> dict[str, Any]:
    size = tokenizer.vocab_size
    outs = [_answer(tokenizer, prompt, mine) for prompt, mine in zip(prompts, events)]
    answer: dict[str, Any] = {name: [out[name] for out in outs] for name in outs[0]}
    if not body.compute_logprob:
        answer["logprob"] = None
    if body.all_probs:
        answer["full_logprob"] = [[_row(entry, size) for e in mine for entry in e.logprobs or []] for mine in events]
    return answer


def _row(entry: TokenLogprob, size: int) -> list[float | None]:
    """Log-probabilities by token id; None for ids that the model has no output for."""
    row: list[float | None] = [None] * size
    for token, _, value in entry.top:
        if token < size:
            row[token] = value
    return row


def _request(body: Generate, prompt: list[int], seed: int, size: int, caller: str) -> Request:
    cuts: dict[str, Any] = (
        {}
        if body.greedy
        else {"temperature": body.temperature, "top_k": body.top_k, "top_p": body.top_p if body.top_p >= TINY else 1.0}
    )
    sampling = Sampling(
        greedy=body.greedy,
        seed=seed,
        repetition_penalty=body.repetition_penalty,
        min_tokens=min(body.min_tokens_to_generate, body.tokens_to_generate),
        **cuts,
    )
    return Request(
        prompt,
        body.tokens_to_generate,
        sampling=sampling,
        neighbors=[] if body.neighbors == 0 else None,
        num_neighbors=body.neighbors or None,
        stop=tuple(text for text in body.end_strings if text),
        logprobs=size if body.all_probs else 0 if body.compute_logprob else None,
        add_bos=body.add_BOS,
        caller=caller,
    )


def _answer(tokenizer: Any, prompt: list[int], events: list[Event]) -> dict[str, Any]:
    ids = [*prompt, *(token for event in events for token in event.tokens)]
    texts = [tokenizer.decode(ids[:1]), *tokenizer.pieces(ids[1:])]
    offsets = [0]
    for text in texts[:-1]:
        offsets.append(offsets[-1] + len(text))
    hits = [hit for event in events for hit in event.new_hits or []]
    return {
        "sentences": tokenizer.decode(prompt) + "".join(event.text for event in events),
        "tokens": texts,
        "logprob": [entry.logprob for event in events for entry in event.logprobs or []],
        "token_ids": ids,
        "offsets": offsets,
        "retrieved": [hit.text + hit.continuation for hit in hits],
    }


async def knn(request: HttpRequest) -> Response:
    """Token ids of the neighbors, [sentences, neighbors, 2 x chunk size], padded; or "success"."""
    service, limits = service_of(request), limits_of(request)
    library, _ = library_of(request)
    body = parse(Knn, await read_json(request, limits, limits.documents_bytes))
    if "reset" in body.model_fields_set:  # NeMo's clients send null
        if body.reset is False or body.sentences is not None or body.neighbors is not None:
            raise ApiError(400, "reset deletes every document: it is sent alone, and true or null", "reset")
        _check_scope(request, "admin")
        count = await write(request, library.reset)
        audit(request, "documents.reset", count=count)
        return JSONResponse("success")
    sentences = [body.sentences] if isinstance(body.sentences, str) else body.sentences
    if not sentences or len(sentences) > 1000:
        raise ApiError(400, "1 to 1,000 sentences are taken", "sentences")
    if len(sentences) * (body.neighbors or 1) > MAX_ROWS:
        what = f"{len(sentences):,} sentences x {body.neighbors} neighbors: at most {MAX_ROWS:,} rows"
        raise ApiError(400, what, "neighbors", "too_much_work")
    texts = await brief(request, _texts, service, sentences)
    if body.neighbors is None:
        _check_scope(request, "write")
        documents = [Document(f"doc-{secrets.token_hex(8)}", "", text) for text in texts]
        await write(request, library.add, documents)
        audit(request, "documents.add", count=len(documents))
        return JSONResponse("success")
    rows = await long(request, _search, service, texts, body.neighbors)
    return JSONResponse(rows[0] if isinstance(body.sentences, str) else rows)


def _ids(ids: list[int], service: Any) -> list[int]:
    if any(not 0 <= i < service.tokenizer.vocab_size for i in ids):
        raise ApiError(400, "a token id is outside the vocabulary", "sentences", "token_not_found")
    return ids


def _texts(service: Any, sentences: Sequence[str | list[int]]) -> list[str]:
    return [one if isinstance(one, str) else service.tokenizer.decode(_ids(one, service)) for one in sentences]


def _search(service: Any, texts: list[str], count: int, check: Check) -> list[list[list[int]]]:
    pad_id, width = service.tokenizer.pad_id, 2 * service.generator.model.config.chunk_size
    out = []
    for text in texts:
        check()
        rows = [tokens[:width].tolist() for _, tokens in service.find(text, count).pairs()] if count else []
        rows += [[]] * (max(1, count) - len(rows))  # as theirs: always a row, of padding where there is nothing
        out.append([row + [pad_id] * (width - len(row)) for row in rows])
    return out


def _check_scope(request: HttpRequest, scope: str) -> None:
    caller = caller_of(request)
    if caller is None or not caller.may(scope):
        raise ApiError(403, f"this takes scope {scope}", code="scope")
