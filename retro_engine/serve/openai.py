"""OpenAI's completions and chat completions over the engine, whole or streamed, with the neighbors that were read.

What is ours is in `retro`: asked for with extra_body={"retro": {...}}, answered in the first event after each
retrieval, or beside the choices.
"""

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from retro_engine.generate.engine import Event, Request
from retro_engine.generate.request import TokenLogprob, cost
from retro_engine.generate.sampling import TINY, Sampling
from retro_engine.serve.chat import Message, chat_prompt
from retro_engine.serve.hits import neighbors_json
from retro_engine.serve.limits import ApiError, Limits, Prompts, Strict, Texts, parse, read_json
from retro_engine.serve.service import Service
from retro_engine.serve.state import brief, caller_id, limits_of, service_of, state_of
from retro_engine.serve.stream import EventStream, Running

MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
COMPLETION_TOKENS, CHAT_TOKENS = 16, 256  # when nothing is said
STARTED = int(time.time())


class RetroOptions(Strict):
    """Retrieval of one request."""

    k: int | None = Field(None, ge=1, le=64)  # neighbors a chunk; None: the model's
    neighbors: Texts | None = Field(None, max_length=64)  # texts to read instead; [] = retrieval off
    mode: Literal["lexical", "dense", "hybrid"] | None = None
    refresh: Literal["chunk", "never"] = "chunk"
    retrieved_length: int | None = Field(None, ge=1)


class StreamOptions(Strict):
    """What a stream has besides its pieces."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Sampled(Strict):
    """The fields that completions and chat completions share; those that do nothing here take only nothing."""

    model: str
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=TINY, le=1)
    n: int = Field(1, ge=1, le=32)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | Texts | None = None
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    max_tokens: int | None = Field(None, ge=1)
    user: str | None = Field(None, max_length=512)
    safety_identifier: str | None = Field(None, max_length=512)
    prompt_cache_key: str | None = Field(None, max_length=512)
    metadata: dict[str, str] | None = Field(None, max_length=0)
    store: Literal[False] = False
    service_tier: Literal["auto", "default"] | None = None
    presence_penalty: float | None = Field(None, ge=0, le=0)
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    logit_bias: dict[str, float] | None = Field(None, max_length=0)
    top_k: int | None = Field(None, ge=-1, le=1 << 20)  # 0 is off, and -1 as in vLLM
    repetition_penalty: float = Field(1.0, ge=TINY, le=100)
    min_tokens: int = Field(0, ge=0)
    retro: RetroOptions = Field(default_factory=lambda: RetroOptions.model_validate({}))


class Completion(Sampled):
    """The body of POST /v1/completions."""

    prompt: Prompts
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool = False
    best_of: int | None = Field(None, ge=1, le=32)
    suffix: Literal[""] | None = None


class Chat(Sampled):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=1000, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    tools: list[Any] | None = Field(None, max_length=0)
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = Field(None, max_length=0)
    function_call: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = Field(None, max_length=1)
    audio: None = None
    prediction: None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    moderation: None = None
    prompt_cache_options: None = None
    prompt_cache_retention: Literal["in_memory"] | None = None
    web_search_options: None = None


async def models(request: HttpRequest) -> Response:
    return JSONResponse({"object": "list", "data": [_model(service_of(request), limits_of(request))]})


async def model(request: HttpRequest) -> Response:
    service = service_of(request)
    check_model(service, request.path_params["id"])
    return JSONResponse(_model(service, limits_of(request)))


def _model(service: Service, limits: Limits) -> dict[str, Any]:
    config = service.generator.model.config
    about = {
        "parameters": sum(p.numel() for p in service.generator.model.parameters()),
        "reads_neighbors": config.retrieval,
        "chunk_size": config.chunk_size,
        "num_neighbors": config.num_neighbors,
        "retrieved_length": config.r,
        "vocab_size": service.tokenizer.vocab_size,
        "max_prompt_tokens": limits.prompt_tokens,
        "max_new_tokens": limits.new_tokens,
        "mode": service.mode,
        "library": service.library.folder.name if service.library is not None else None,
        "stores": [store.folder.name for store in service.static.stores] if service.static else [],
        "engine": service.engine.stats(),
    }
    return {"id": service.name, "object": "model", "created": STARTED, "owned_by": "retro-engine", "retro": about}


def check_model(service: Service, name: str) -> None:
    if name != service.name:
        raise ApiError(404, f"model {name!r} is not served here: {service.name!r} is", "model", "model_not_found")


async def completions(request: HttpRequest) -> Response:
    """Continue one prompt or several."""
    service, limits = service_of(request), limits_of(request)
    body = parse(Completion, await read_json(request, limits))
    check_model(service, body.model)
    if body.best_of not in (None, body.n):
        raise ApiError(400, "best_of other than n is not supported", "best_of", "unsupported")
    prompts = await brief(request, encode_prompts, service, body.prompt, limits)
    form = _CompletionForm(service, body.stream)
    return await _answer(request, body, prompts, COMPLETION_TOKENS, body.logprobs, form, body.echo)


async def chat_completions(request: HttpRequest) -> Response:
    """Answer the last message of a conversation."""
    service, limits = service_of(request), limits_of(request)
    body = parse(Chat, await read_json(request, limits))
    check_model(service, body.model)
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs takes logprobs=true", "top_logprobs")
    if body.max_completion_tokens is not None:
        if body.max_tokens not in (None, body.max_completion_tokens):
            raise ApiError(400, "max_tokens and max_completion_tokens contradict each other", "max_tokens")
        body.max_tokens = body.max_completion_tokens
    prompt, stops = await brief(request, chat_prompt, body.messages, service.chat)
    body.stop = [*_stops(body.stop), *stops]
    prompts = await brief(request, encode_prompts, service, prompt, limits, "messages")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    is_chat = service.chat is not None
    form = _ChatForm(service, body.stream)
    return await _answer(request, body, prompts, CHAT_TOKENS, logprobs, form, is_chat=is_chat)


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
    top = service.tokenizer.vocab_size
    outside = next((i for i in ids if not 0 <= i < top), None)
    if outside is not None:
        raise ApiError(400, f"token id {outside} is outside the vocabulary of {top:,}", param, "token_not_found")
    return ids


def _refuse_empty(param: str) -> list[list[int]]:
    raise ApiError(400, f"{_spoken(param)} is empty: there is nothing to read", param, "empty_prompt")


def _spoken(param: str) -> str:
    return f"the {param}" if param in ("text", "input") else "the prompt"


def _stops(stop: str | list[str] | None) -> list[str]:
    stops = [stop] if isinstance(stop, str) else list(stop or [])
    if len(stops) > MAX_STOPS or any(not 1 <= len(s) <= 256 for s in stops):
        raise ApiError(400, f"stop is at most {MAX_STOPS} texts of 1 to 256 characters", "stop")
    return stops


def sampling_of(body: Sampled, service: Service, seed: int) -> Sampling:
    """Temperature 0 takes the likeliest token; where nothing is said, the checkpoint's own way holds."""
    values: dict[str, Any] = {"repetition_penalty": body.repetition_penalty, "min_tokens": body.min_tokens}
    asked = {"top_p": body.top_p, "top_k": 0 if body.top_k == -1 else body.top_k}
    if body.temperature is not None and body.temperature < TINY:  # 0 to the logits, as it is here
        for name, value in asked.items():
            if value not in (None, 0, 1):
                raise ApiError(400, f"{name}={value} contradicts temperature=0", name, "contradiction")
        return Sampling(**{**values, "seed": seed})
    given = {name: value for name, value in {"temperature": body.temperature, **asked}.items() if value is not None}
    if not given:
        return Sampling(**{**service.defaults, **values, "seed": seed})
    return Sampling(**{**given, **values, "greedy": False, "seed": seed})


def requests_of(
    body: Sampled, service: Service, prompts: Sequence[list[int]], limits: Limits, default: int
) -> list[Request]:
    """One request of the engine for every choice: n of the first prompt, then n of the next."""
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options takes stream=true", "stream_options")
    if len(prompts) * body.n > limits.choices:
        raise ApiError(400, f"{len(prompts)} prompts x {body.n}: at most {limits.choices} choices", "n")
    most = min(default, limits.new_tokens) if body.max_tokens is None else body.max_tokens
    if most > limits.new_tokens:
        raise ApiError(400, f"max_tokens={most}: at most {limits.new_tokens:,}", "max_tokens")
    if body.min_tokens > most:
        raise ApiError(400, f"min_tokens={body.min_tokens} is more than max_tokens={most}", "min_tokens")
    options, config = body.retro, service.generator.model.config
    if options.neighbors is not None and (options.k is not None or options.mode is not None):
        raise ApiError(400, "neighbors are given: k and mode say nothing", "retro.neighbors", "contradiction")
    said = next((name for name in ("neighbors", "k", "mode", "retrieved_length") if getattr(options, name)), None)
    if said is not None and not config.retrieval:
        raise ApiError(400, "this model is a plain decoder: it reads no neighbors", f"retro.{said}")
    if options.retrieved_length is not None and options.retrieved_length > config.r:
        raise ApiError(400, f"the model reads at most {config.r} tokens a neighbor", "retro.retrieved_length")
    count = len(options.neighbors or ()) or options.k or 0
    prompt = "messages" if isinstance(body, Chat) else "prompt"
    names = prompt, "max_tokens", "retro.neighbors" if options.neighbors else "retro.k"
    check_room(service, prompts, most, count * (options.retrieved_length or config.r), names)
    service.check_search(options.mode)
    seed = secrets.randbits(48) if body.seed is None else body.seed % (1 << 62)
    first = Request(
        prompts[0],
        most,
        sampling_of(body, service, seed),
        options.neighbors,
        options.k,
        options.retrieved_length,
        options.refresh,
        tuple(_stops(body.stop)),
        mode=options.mode,
    )
    return [
        replace(first, prompt=prompt, sampling=replace(first.sampling, seed=seed + choice))
        for prompt in prompts
        for choice in range(body.n)
    ]


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


async def _answer(
    request: HttpRequest,
    body: Sampled,
    prompts: list[list[int]],
    default: int,
    logprobs: int | None,
    form: "_Form",
    echo: bool = False,
    is_chat: bool = False,
) -> Response:
    service, limits = service_of(request), limits_of(request)
    asked = requests_of(body, service, prompts, limits, default)
    more: dict[str, Any] = {"logprobs": logprobs, "echo": echo, "is_chat": is_chat, "caller": caller_id(request)}
    asked = [replace(one, **more) for one in asked]
    check_cost(asked, service, limits, "n" if body.n > 1 else "prompt" if len(prompts) > 1 else "max_tokens")
    form.prompt_tokens = sum(map(len, prompts))
    if echo:
        form.echoed = {index: len(one.prompt) for index, one in enumerate(asked)}
    running = await Running.start(service, asked, request.receive)
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    if body.stream:
        return EventStream(running, form, with_usage, state_of(request).metrics)
    async with running:
        async for index, event in running:
            form.add(index, event)
    state_of(request).metrics.tokens(form.prompt_tokens, form.completion_tokens)
    return JSONResponse(await brief(request, form.whole, len(asked)))


def check_cost(asked: Sequence[Request], service: Service, limits: Limits, param: str) -> None:
    """Raises ApiError for requests of one body that are each allowed and too much together, before any work."""
    config, has_retriever = service.generator.model.config, service.generator.retriever is not None
    tokens = sum(cost(one, config, has_retriever) for one in asked)
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


class _Form(ABC):
    """How an answer looks; subclasses say what a choice is."""

    name = ""
    prefix = ""

    def __init__(self, service: Service, is_stream: bool):
        self.service = service
        self.head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "object": f"{self.name}.chunk" if is_stream and self.name == "chat.completion" else self.name,
            "created": int(time.time()),
            "model": service.name,
        }
        self.prompt_tokens = self.completion_tokens = 0
        self.echoed: dict[int, int] = {}  # tokens of the prompt that a choice's first event begins with
        self.events: list[tuple[int, Event]] = []

    @abstractmethod
    def choice(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]: ...

    @abstractmethod
    def delta(self, index: int, event: Event) -> dict[str, Any]:
        """A choice of a stream."""

    @abstractmethod
    def logprobs(self, entries: Sequence[TokenLogprob]) -> Any: ...

    def _count(self, index: int, event: Event) -> None:
        self.completion_tokens += len(event.tokens) - self.echoed.pop(index, 0)

    def add(self, index: int, event: Event) -> None:
        self._count(index, event)
        self.events.append((index, event))

    def piece(self, index: int, event: Event, with_usage: bool) -> dict[str, Any] | None:
        """An event of a stream; None when there is nothing to say yet."""
        self._count(index, event)
        if not (event.text or event.logprobs or event.new_hits is not None or event.finish_reason or event.notes):
            return None
        out: dict[str, Any] = {**self.head, "choices": [self.delta(index, event)]}
        if event.new_hits is not None or event.notes:
            out["retro"] = {**self._retro(), "neighbors": neighbors_json(event.new_hits or [])}
            if event.notes:
                out["retro"]["notes"] = event.notes
        if with_usage:
            out["usage"] = None
        return out

    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }

    def _retro(self) -> dict[str, Any]:
        return {"index_version": self.service.index_version}

    def whole(self, count: int) -> dict[str, Any]:
        """The answer of a request that does not stream: `retro.segments` splits each choice at its retrievals."""
        choices, notes = [], list[str]()
        places: dict[tuple[Any, ...], int] = {}  # of neighbors
        segments: list[dict[str, Any]] = []
        events: list[list[Event]] = [[] for _ in range(count)]
        for index, event in self.events:
            events[index].append(event)
        for index, mine in enumerate(events):
            entries = [entry for event in mine for entry in event.logprobs or []]
            logprobs = self.logprobs(entries) if any(e.logprobs is not None for e in mine) else None
            text = "".join(event.text for event in mine)
            choices.append(self.choice(index, text, logprobs, mine[-1].finish_reason))
            for event in mine:
                notes += [note for note in event.notes if note not in notes]
                if event.new_hits is not None:
                    found = [tuple(one.items()) for one in neighbors_json(event.new_hits)]
                    numbers = [places.setdefault(one, len(places)) for one in found]
                    segments.append({"choice": index, "text": "", "neighbors": numbers})
                if event.text:
                    if not segments or segments[-1]["choice"] != index:
                        segments.append({"choice": index, "text": "", "neighbors": []})
                    segments[-1]["text"] += event.text
        neighbors = [dict(one) for one in places]
        retro = {**self._retro(), "neighbors": neighbors, "segments": segments, "notes": notes}
        return {**self.head, "choices": choices, "usage": self.usage(), "retro": retro}


class _CompletionForm(_Form):
    name, prefix = "text_completion", "cmpl"

    def choice(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def delta(self, index: int, event: Event) -> dict[str, Any]:
        logprobs = None if event.logprobs is None else self.logprobs(event.logprobs)
        return self.choice(index, event.text, logprobs, event.finish_reason)

    def logprobs(self, entries: Sequence[TokenLogprob]) -> Any:
        return {
            "tokens": [self._shown(entry.token, entry.text) for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [self._top(entry) for entry in entries],
            "text_offset": [entry.offset for entry in entries],
        }

    def _shown(self, token: int, text: str) -> str:
        """Half a character as OpenAI writes it."""
        raw = self.service.token_bytes.of(token, text)
        return raw.decode() if _is_text(raw) else f"bytes:{_escaped(raw)}"

    def _top(self, entry: TokenLogprob) -> dict[str, float | None]:
        """The likeliest tokens, best first, and the one that was taken where it is none of them: each has its own name."""
        rows = [*entry.top]
        if rows and entry.token not in [token for token, _, _ in rows]:
            assert entry.logprob is not None
            rows.append((entry.token, entry.text, entry.logprob))
        named: dict[str, float | None] = {}
        for token, text, value in rows:
            name = self._shown(token, text)
            named[f"token_id:{token}" if name in named else name] = value
        return named


def _is_text(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _escaped(raw: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in raw)


class _ChatForm(_Form):
    name, prefix = "chat.completion", "chatcmpl"

    def __init__(self, service: Service, is_stream: bool):
        super().__init__(service, is_stream)
        self._begun: set[int] = set()

    def choice(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def delta(self, index: int, event: Event) -> dict[str, Any]:
        role = {} if index in self._begun else {"role": "assistant"}
        self._begun.add(index)
        logprobs = None if event.logprobs is None else self.logprobs(event.logprobs)
        delta = {**role, "content": event.text}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": event.finish_reason}

    def logprobs(self, entries: Sequence[TokenLogprob]) -> Any:
        def token(index: int, text: str, value: float | None) -> dict[str, Any]:
            raw = self.service.token_bytes.of(index, text)
            return {"token": raw.decode() if _is_text(raw) else _escaped(raw), "logprob": value, "bytes": list(raw)}

        return {
            "content": [
                {**token(e.token, e.text, e.logprob), "top_logprobs": [token(*one) for one in e.top]} for e in entries
            ],
            "refusal": None,
        }
