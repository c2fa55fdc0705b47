"""OpenAI's completions and chat completions over the engine, whole or streamed, with the neighbors that were read.

What is ours is in `retro`: asked for with extra_body={"retro": {...}}, answered in the first event after each
retrieval, or beside the choices.
"""

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from retro_engine.generate.request import Request
from retro_engine.generate.sampling import TINY, Sampling
from retro_engine.library.search import MODES
from retro_engine.serve.answers import Answer, ChatAnswer, CompletionAnswer
from retro_engine.serve.api_error import ApiError
from retro_engine.serve.bounds import Limits
from retro_engine.serve.chat import chat_prompt, check_variables
from retro_engine.serve.constraints import grammar_of
from retro_engine.serve.documents import filter_of, note_of
from retro_engine.serve.fields import MAX_STOPS, Chat, Completion, Sampled
from retro_engine.serve.in_prompt import put_in_chat, put_in_prompts
from retro_engine.serve.limits import parse, read_json
from retro_engine.serve.prompts import check_cost, check_ids, check_model_name, check_room, encode_prompts
from retro_engine.serve.reader_chat import reader_prompt
from retro_engine.serve.request_context import brief, caller_id, count_tokens, limits_of, service_of, state_of
from retro_engine.serve.service import Service
from retro_engine.serve.stream import EventStream, RunningRequests
from retro_engine.serve.tools import Tool, call_grammar, shown_tools

COMPLETION_TOKENS, CHAT_TOKENS = 16, 256  # when nothing is said
STARTED = int(time.time())


async def models(request: HttpRequest) -> Response:
    """The model, under each of its names."""
    service, limits = service_of(request), limits_of(request)
    return JSONResponse({"object": "list", "data": [_model(service, limits, name) for name in service.names]})


async def model(request: HttpRequest) -> Response:
    service = service_of(request)
    check_model_name(service, request.path_params["id"])
    return JSONResponse(_model(service, limits_of(request), request.path_params["id"]))


def _model(service: Service, limits: Limits, name: str) -> dict[str, Any]:
    config = service.generator.model.config
    about = {
        "parameters": service.generator.model.num_parameters,
        "reads_neighbors": config.retrieval,
        "reading": config.reading if config.retrieval else "prompt" if service.in_prompt is not None else None,
        "reader": None if service.reader is None else service.reader.name,
        "memory": None if service.generator.beside is None else service.generator.beside.summary(),
        "chunk_size": config.chunk_size,
        "num_neighbors": config.num_neighbors,
        "retrieved_length": config.r,
        "vocab_size": service.tokenizer.vocab_size,
        "max_prompt_tokens": limits.prompt_tokens,
        "max_new_tokens": limits.new_tokens,
        "mode": service.mode,
        "chat": service.chat is not None,  # it has a template
        "modes": list(MODES if service.library is None or service.library.chunker.width is not None else MODES[:1]),
        "library": service.library.folder.name if service.library is not None else None,
        "stores": [store.folder.name for store in service.static.stores] if service.static else [],
        "engine": service.engine.stats(),
    }
    head = {"id": name, "object": "model", "created": STARTED, "owned_by": "retro-engine", "root": service.name}
    return {**head, "max_model_len": service.engine.max_tokens, "retro": about}


async def completions(request: HttpRequest) -> Response:
    """Continue one prompt or several."""
    body = parse(Completion, await read_json(request, limits_of(request)))
    answer, asked = await completion_requests(request, body, CompletionAnswer(service_of(request), body.stream))
    return await respond(request, body, answer, asked)


async def completion_requests(request: HttpRequest, body: Completion, answer: Answer) -> tuple[Answer, list[Request]]:
    """What the engine is asked for prompts, and the answer that will show it. Raises ApiError for what cannot be answered."""
    service, limits = service_of(request), limits_of(request)
    check_model_name(service, body.model or service.name)
    take_n_predict(body)
    if body.candidates < body.n:
        raise ApiError(400, f"best_of={body.best_of}: at least n={body.n} are to choose from", "best_of")
    if body.candidates > body.n and body.stream:
        raise ApiError(400, "which is best is known at the end: best_of above n does not stream", "best_of")
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens=0 without echo: there would be no answer", "max_tokens")
    await put_in_prompts(request, body)
    prompts = await brief(request, encode_prompts, service, body.prompt, limits)
    answer.has_logprobs = body.logprobs is not None
    ranked = 0 if body.candidates > body.n else None
    logprobs = ranked if body.logprobs is None else body.logprobs
    more = {"logprobs": logprobs, "echo": body.echo, "grammar": grammar_of(body)}
    return answer, requests_of(body, service, prompts, limits, COMPLETION_TOKENS, **more)


def take_n_predict(body: Sampled) -> None:
    """Raises ApiError where it is said twice and not alike."""
    if body.n_predict is not None:
        if body.max_tokens not in (None, body.n_predict):
            raise ApiError(400, "max_tokens and n_predict contradict each other", "n_predict", "contradiction")
        body.max_tokens = body.n_predict


async def chat_completions(request: HttpRequest) -> Response:
    """Answer the last message of a conversation."""
    body = parse(Chat, await read_json(request, limits_of(request)))
    asked, tools = await chat_requests(request, body)
    return await respond(request, body, ChatAnswer(service_of(request), body.stream, tools), asked)


async def chat_requests(request: HttpRequest, body: Chat) -> tuple[list[Request], list[Tool]]:
    """What the engine is asked for a conversation, and the functions that the answer may call. Raises ApiError for what
    cannot be answered.
    """
    service, limits = service_of(request), limits_of(request)
    check_model_name(service, body.model or service.name)
    take_n_predict(body)
    if body.max_tokens == 0:
        raise ApiError(400, "max_tokens=0: there would be no answer", "max_tokens")
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs takes logprobs=true", "top_logprobs")
    if body.max_completion_tokens is not None:
        if body.max_tokens not in (None, body.max_completion_tokens):
            raise ApiError(400, "max_tokens and max_completion_tokens contradict each other", "max_tokens")
        body.max_tokens = body.max_completion_tokens
    begins, goes_on = body.add_generation_prompt is not False, body.continue_final_message
    if goes_on and body.add_generation_prompt:
        why = "the last message goes on, or another begins: add_generation_prompt=false"
        raise ApiError(400, why, "add_generation_prompt", "contradiction")
    tools, grammar = shown_tools(body.tools, body.tool_choice), grammar_of(body)
    if body.tool_choice not in (None, "none", "auto"):
        if grammar is not None or goes_on:
            raise ApiError(400, "a call is required: nothing else can be", "tool_choice", "contradiction")
        grammar = call_grammar(tools)
    if service.chat is None or not service.chat.reads("enable_thinking"):
        body.drop_thinking()
    more = check_variables(body.chat_template_kwargs, service.chat)
    await put_in_chat(request, body)
    ask = partial(chat_prompt, begins=begins, goes_on=goes_on, variables=more)
    if service.reader is None:
        prompts, stops, tools = await _with_tools(request, body, ask, tools)
    else:
        prompt, stops = await reader_prompt(request, body)
        prompts = await brief(request, partial(encode_prompts, param="messages"), service, prompt, limits)
    body.stop = [*_stops(body.stop), *stops]
    about = {"logprobs": (body.top_logprobs or 0) if body.logprobs else None, "is_chat": service.chat is not None}
    return requests_of(body, service, prompts, limits, CHAT_TOKENS, grammar=grammar, **about), tools


async def _with_tools(
    request: HttpRequest, body: Chat, ask: Callable[..., Any], tools: list[Tool]
) -> tuple[list[list[int]], tuple[str, ...], list[Tool]]:
    """The prompt of a conversation, what ends its answer, and the functions it was shown: those that may be called and have no
    room beside it are left out, and said (a page sends dozens of its own, unasked).
    """
    service, limits = service_of(request), limits_of(request)
    is_required = body.tool_choice not in (None, "none", "auto")
    wanted = CHAT_TOKENS if body.max_tokens is None else max(1, body.max_tokens)

    async def encoded(shown: list[Tool]) -> tuple[list[list[int]], tuple[str, ...]]:
        prompt, stops = await brief(request, partial(ask, tools=shown), body.messages, service.chat)
        return await brief(request, partial(encode_prompts, param="messages"), service, prompt, limits), stops

    try:
        prompts, stops = await encoded(tools)
    except ApiError as error:
        if error.code != "context_length_exceeded" or not tools or is_required:
            raise
    else:
        if not tools or is_required or len(prompts[0]) + wanted <= service.engine.max_tokens:
            return prompts, stops, tools
    prompts, stops = await encoded([])
    body.take_found([], [f"{len(tools)} tools have no room in the prompt: the model was not shown them"])
    return prompts, stops, []


def _stops(stop: str | list[str] | None) -> list[str]:
    stops = [stop] if isinstance(stop, str) else list(stop or [])
    if len(stops) > MAX_STOPS or any(not 1 <= len(s) <= 256 for s in stops):
        raise ApiError(400, f"stop is at most {MAX_STOPS} texts of 1 to 256 characters", "stop")
    return stops


def sampling_of(body: Sampled, service: Service, seed: int) -> Sampling:
    """Temperature 0 takes the likeliest token; where nothing is said, the checkpoint's own way holds."""
    names = "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens"
    values: dict[str, Any] = {name: getattr(body, name) for name in names}
    values["logit_bias"] = _biases(body, service)
    asked = {"top_p": body.top_p, "top_k": 0 if body.top_k == -1 else body.top_k, "min_p": body.min_p}
    if body.temperature is not None and body.temperature < TINY:  # 0 to the logits, as it is here
        for name, value in asked.items():
            if value not in (None, 0, 1):
                raise ApiError(400, f"{name}={value} contradicts temperature=0", name, "contradiction")
        return Sampling(**{**values, "seed": seed})
    given = {name: value for name, value in {"temperature": body.temperature, **asked}.items() if value is not None}
    if not given:
        return Sampling(**{**service.defaults, **values, "seed": seed})
    return Sampling(**{**given, **values, "greedy": False, "seed": seed})


def _biases(body: Sampled, service: Service) -> tuple[tuple[int, float], ...]:
    """Token ids are the names of an object in JSON: as texts."""
    for name in body.logit_bias or ():
        if not name.isascii() or not name.isdigit() or len(name) > 9:
            raise ApiError(400, f"logit_bias: {name[:40]!r} is not the id of a token", "logit_bias")
    found = {int(name): value for name, value in (body.logit_bias or {}).items()}
    check_ids(service, tuple(found), "logit_bias")
    return tuple(found.items())


def requests_of(
    body: Sampled, service: Service, prompts: Sequence[list[int]], limits: Limits, default: int, **more: Any
) -> list[Request]:
    """One request of the engine for every candidate: n (or best_of) of the first prompt, then of the next. `more`: its
    other fields.
    """
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options takes stream=true", "stream_options")
    if len(prompts) * body.candidates > limits.choices:
        what, name = f"{len(prompts)} prompts x {body.candidates}", "n" if body.candidates == body.n else "best_of"
        raise ApiError(400, f"{what}: at most {limits.choices} choices", name)
    most = min(default, limits.new_tokens) if body.max_tokens is None else body.max_tokens
    if most == -1:  # behind a prompt that is padded to whole chunks
        M = service.generator.model.config.chunk_size
        most = max(1, min(limits.new_tokens, service.engine.max_tokens - -(-max(map(len, prompts)) // M) * M))
    if most > limits.new_tokens:
        raise ApiError(400, f"max_tokens={most}: at most {limits.new_tokens:,}", "max_tokens")
    body.min_tokens = most if body.ignore_eos else body.min_tokens
    if body.min_tokens > most:
        raise ApiError(400, f"min_tokens={body.min_tokens} is more than max_tokens={most}", "min_tokens")
    _check_retrieval(body, service, prompts, most)
    check_ids(service, body.stop_token_ids or (), "stop_token_ids")
    seed = secrets.randbits(48) if body.seed is None else body.seed % (1 << 62)
    options = body.retro
    first = Request(
        prompts[0],
        most,
        sampling=sampling_of(body, service, seed),
        neighbors=options.neighbors,
        num_neighbors=options.k,
        retrieved_length=options.retrieved_length,
        refresh=options.refresh,
        stop=tuple(_stops(body.stop)),
        stop_ids=tuple(body.stop_token_ids or ()),
        mode=options.mode,
        where=filter_of(options.filters, "retro.filters"),
        min_score=options.min_score,
        **more,
    )
    return [
        replace(first, prompt=prompt, sampling=replace(first.sampling, seed=seed + choice))
        for prompt in prompts
        for choice in range(body.candidates)
    ]


def _check_retrieval(body: Sampled, service: Service, prompts: Sequence[list[int]], new_tokens: int) -> None:
    """Raises ApiError for neighbors that cannot be read beside prompts and `new_tokens` more."""
    options, config = body.retro, service.generator.model.config
    searched = ("k", "mode", "filters", "min_score")
    if options.neighbors is not None and any(getattr(options, name) is not None for name in searched):
        why = f"neighbors are given: {', '.join(searched)} say nothing"
        raise ApiError(400, why, "retro.neighbors", "contradiction")
    names = ("neighbors", *searched, "retrieved_length")
    said = next((name for name in names if getattr(options, name) not in (None, [])), None)
    if said is not None and not config.retrieval:
        raise ApiError(400, "this model is a plain decoder: it reads no neighbors", f"retro.{said}")
    if said not in (None, "neighbors") and service.generator.retriever is None:
        raise ApiError(400, "there are no documents to retrieve from", f"retro.{said}", "no_library")
    if options.retrieved_length is not None and options.retrieved_length > config.r:
        raise ApiError(400, f"the model reads at most {config.r} tokens a neighbor", "retro.retrieved_length")
    count = len(options.neighbors or ()) or options.k or 0
    prompt = "messages" if isinstance(body, Chat) else "prompt"
    params = prompt, "max_tokens", "retro.neighbors" if options.neighbors else "retro.k"
    check_room(service, prompts, new_tokens, count * (options.retrieved_length or config.r), params)
    service.check_search(options.mode, options.min_score, "retro.min_score")


async def respond(request: HttpRequest, body: Sampled, answer: Answer, asked: list[Request]) -> Response:
    """Generate what is asked: a stream of pieces, or the whole."""
    service = service_of(request)
    asked = [replace(one, caller=caller_id(request)) for one in asked]
    param = (
        "best_of" if body.candidates > body.n else "n" if body.n > 1 else "prompt" if len(asked) > 1 else "max_tokens"
    )
    check_cost(asked, service, limits_of(request), param)
    answer.prompt_tokens = sum(len(one.prompt) for one in asked[:: body.candidates])
    answer.candidates, answer.kept, answer.timed = body.candidates, body.n, body.timings_per_token
    answer.notes += body.notes
    answer.echoed = {index: len(one.prompt) for index, one in enumerate(asked) if one.echo}
    answer.notes += (await note_of(request, asked[0].where)).values()
    tracing = state_of(request).tracing.answering(request, body, answer)
    running = await RunningRequests.start(service, asked, request.receive, state_of(request).metrics)
    running.found = [body.found(index // body.candidates) for index in range(len(asked))]
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    if body.stream:
        return EventStream(running, answer, with_usage, partial(count_tokens, request), tracing)
    with tracing:
        async with running:
            async for index, event in running:
                answer.add(index, event)
                answer.times = running.times(index)
        count_tokens(request, answer.prompt_tokens, answer.completion_tokens)
        return JSONResponse(await brief(request, answer.whole, len(asked)))
