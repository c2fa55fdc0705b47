"""OpenAI's Responses over chats: POST /v1/responses whole or streamed, gone on with by `previous_response_id`.

An answer is kept in memory unless `store` is false (`serve.kept`): a restart forgets all, and the oldest are forgotten first.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from retro_engine.generate.request import Event
from retro_engine.generate.sampling import TINY
from retro_engine.library.documents import MAX_QUERY_CHARACTERS
from retro_engine.retrieval.hit import Hit
from retro_engine.serve.answers import BlockAnswer, line
from retro_engine.serve.api_error import ApiError
from retro_engine.serve.chat import Message, said
from retro_engine.serve.constraints import Json
from retro_engine.serve.documents import filter_of, library_of
from retro_engine.serve.fields import Chat, Name, RetroOptions, Value
from retro_engine.serve.kept import Kept
from retro_engine.serve.limits import Strict, parse, read_json
from retro_engine.serve.openai import chat_requests, respond
from retro_engine.serve.request_context import brief, caller_id, limits_of, service_of, state_of
from retro_engine.serve.service import Service
from retro_engine.serve.tools import MAX_TOOLS, Call, NamedTool, Tool
from retro_engine.serve.vector_stores import MAX_RESULTS, check_store, search_stores

MAX_ITEMS = 1000


class TextPart(Strict):
    """A part of a message: only text is read."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None  # of an answer that is sent back
    logprobs: list[Any] | None = None


class MessageItem(Strict):
    """A turn of `input`."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class CallItem(Strict):
    """A call that was made."""

    type: Literal["function_call"]
    call_id: str = Field(max_length=256)
    name: str = Field(max_length=256)
    arguments: str
    id: str | None = None
    status: str | None = None


class OutputItem(Strict):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: str = Field(max_length=256)
    output: str
    id: str | None = None
    status: str | None = None


class ToolItem(Strict):
    """A function that may be called."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class FileSearchItem(Strict):
    """Vector stores that are searched for the last message; what is found is read, and cited."""

    type: Literal["file_search"]
    vector_store_ids: list[Annotated[str, Field(max_length=128)]] = Field(min_length=1, max_length=8, fail_fast=True)
    max_num_results: int | None = Field(None, ge=1, le=MAX_RESULTS)
    filters: Json | None = None
    ranking_options: None = None


class SearchedItem(Strict):
    """A search that an answer had, sent back: it says nothing."""

    type: Literal["file_search_call"]
    id: str | None = None
    status: str | None = None
    queries: list[str] | None = None
    results: list[Json] | None = None


class NamedItem(Strict):
    """The function that must be called."""

    type: Literal["function"]
    name: str


class TextOptions(Strict):
    """`format` as `response_format` of a chat, with the schema's members beside its type."""

    format: Json | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(Strict):
    """Without effect here."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class Create(Strict):
    """The body of POST /v1/responses."""

    model: str
    input: str | Annotated[list[Json], Field(min_length=1, max_length=MAX_ITEMS)]
    instructions: str | None = None
    previous_response_id: str | None = Field(None, max_length=128)
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=TINY, le=1)
    stream: bool = False
    store: bool = True
    tools: list[Annotated[ToolItem | FileSearchItem, Field(discriminator="type")]] | None = Field(
        None, max_length=MAX_TOOLS, fail_fast=True
    )
    tool_choice: Literal["none", "auto", "required"] | NamedItem | None = None
    text: TextOptions | None = None
    retro: RetroOptions | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] = False
    include: list[Literal["file_search_call.results"]] | None = Field(None, max_length=1)
    conversation: None = None
    prompt: None = None
    # without effect here: taken and said
    reasoning: Reasoning | None = None
    metadata: dict[Name, Value] | None = Field(None, max_length=16)
    parallel_tool_calls: bool | None = None
    user: str | None = Field(None, max_length=512)
    safety_identifier: str | None = Field(None, max_length=512)
    prompt_cache_key: str | None = Field(None, max_length=512)
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = None


SAME = ("metadata", "parallel_tool_calls", "user", "safety_identifier", "prompt_cache_key", "service_tier")
KINDS: dict[str, type[MessageItem | CallItem | OutputItem | SearchedItem]] = {
    "message": MessageItem,
    "function_call": CallItem,
    "function_call_output": OutputItem,
    "file_search_call": SearchedItem,
}


@dataclass(frozen=True)
class Searched:
    """What a search of files found."""

    query: str
    hits: list[Hit]

    def item(self, with_results: bool) -> Json:
        results = [
            {"file_id": h.document, "filename": h.title, "score": round(float(h.score), 6), "text": h.text + h.continuation, "attributes": {}}
            for h in self.hits
        ]  # fmt: skip
        head = {"id": f"fs_{secrets.token_hex(12)}", "type": "file_search_call", "status": "completed"}
        return {**head, "queries": [self.query], "results": results if with_results else None}

    def annotations(self, index: int) -> list[Json]:
        """Each file once, at the end of the text: every token could read all of them."""
        files = {hit.document: hit.title for hit in self.hits}
        return [{"type": "file_citation", "index": index, "file_id": i, "filename": name} for i, name in files.items()]


async def create_response(request: HttpRequest) -> Response:
    """Answer what is said, after what was said before."""
    body = parse(Create, await read_json(request, limits_of(request)))
    history = _history(request, body.previous_response_id)
    messages = [*history, *said_messages(body.input)]
    searched = await _search(request, body, messages)
    chat = _chat(body, messages)
    if searched is not None:
        chat.retro = chat.retro.model_copy(update={"neighbors": [hit.text + hit.continuation for hit in searched.hits]})
    asked, tools = await chat_requests(request, chat)
    keep = partial(_keep, request, messages) if body.store else None
    answer = ResponseAnswer(service_of(request), body, tools, keep, searched)
    return await respond(request, chat, answer, asked)


async def _search(request: HttpRequest, body: Create, messages: list[Message]) -> Searched | None:
    """Of the stores that a file_search names, for what the user said last. None where none is asked for."""
    wanted = [one for one in body.tools or () if isinstance(one, FileSearchItem)]
    if not wanted:
        return None
    if len(wanted) > 1:
        raise ApiError(400, "file_search is there twice", "tools")
    given = RetroOptions.model_validate({}) if body.retro is None else body.retro
    if any(one is not None for one in (given.neighbors, given.k, given.filters, given.min_score)):
        why = "file_search finds the neighbors: retro.neighbors, k, filters and min_score say nothing"
        raise ApiError(400, why, "tools", "contradiction")
    service, (tool,) = service_of(request), wanted
    library, _ = library_of(request)
    for store in tool.vector_store_ids:
        await check_store(request, store)
    query = next((one.text for one in reversed(messages) if one.role == "user" and one.text.strip()), "")
    query = query[:MAX_QUERY_CHARACTERS]
    if not query.strip():
        return Searched("", [])
    k = tool.max_num_results or service.generator.model.config.num_neighbors
    search = partial(search_stores, library, service.mode, where=filter_of(tool.filters))
    hits = await brief(request, search, tool.vector_store_ids, [query], k)
    return Searched(query, hits)


async def get_response(request: HttpRequest) -> Response:
    """An answer of the caller's that is still kept."""
    kept = state_of(request).kept.get(request.path_params["id"], caller_id(request))
    if kept is None:
        raise _gone(404, request.path_params["id"], "id")
    return JSONResponse(kept.body)


async def delete_response(request: HttpRequest) -> Response:
    identifier = request.path_params["id"]
    if not state_of(request).kept.delete(identifier, caller_id(request)):
        raise _gone(404, identifier, "id")
    return JSONResponse({"id": identifier, "object": "response", "deleted": True})


def _gone(status: int, identifier: str, param: str) -> ApiError:
    why = "it is not kept: another caller's, deleted, too old, or from before a restart"
    return ApiError(status, f"response {identifier[:80]!r}: {why}", param, "previous_response_not_found")


def _history(request: HttpRequest, identifier: str | None) -> list[Message]:
    if identifier is None:
        return []
    kept = state_of(request).kept.get(identifier, caller_id(request))
    if kept is None:
        raise _gone(400, identifier, "previous_response_id")
    return kept.messages


def _keep(request: HttpRequest, messages: list[Message], body: Json, answer: Message) -> None:
    state_of(request).kept.put(body["id"], Kept(caller_id(request), body, [*messages, answer]))


def said_messages(given: str | list[Json]) -> list[Message]:
    """`input` as a chat's messages; calls beside each other are one message. Raises ApiError naming the item."""
    if isinstance(given, str):
        return [said("user", given)]
    messages: list[Message] = []
    for number, row in enumerate(given):
        kind = row.get("type", "message")
        if not isinstance(kind, str) or kind not in KINDS:
            why = f"an item is of the types {', '.join(KINDS)}"
            raise ApiError(400, f"input.{number}.type: {why}", f"input.{number}.type")
        try:
            item = parse(KINDS[kind], row)
        except ApiError as error:
            param = f"input.{number}" + (f".{error.param}" if error.param else "")
            raise ApiError(400, f"input.{number}: {error.message}", param, error.code) from None
        if isinstance(item, MessageItem):
            text = item.content if isinstance(item.content, str) else "".join(part.text for part in item.content)
            messages.append(said(item.role, text))
        elif isinstance(item, OutputItem):
            messages.append(said("tool", item.output, tool_call_id=item.call_id))
        elif isinstance(item, CallItem):
            call = Call(item.name, item.arguments, item.call_id).json()
            if messages and messages[-1].role == "assistant":
                before = messages.pop()
                calls = [*(one.model_dump() for one in before.tool_calls or ()), call]
                messages.append(said("assistant", before.text, tool_calls=calls))
            else:
                messages.append(said("assistant", None, tool_calls=[call]))
    return messages


def _chat(body: Create, messages: list[Message]) -> Chat:
    """The chat that asks for the same."""
    system = [] if body.instructions is None else [said("system", body.instructions)]
    values: Json = {name: getattr(body, name) for name in SAME}
    values |= {"temperature": body.temperature, "top_p": body.top_p, "stream": body.stream}
    values |= {"max_completion_tokens": body.max_output_tokens, "model": body.model}
    values["messages"] = [*system, *messages]
    if body.retro is not None:
        values["retro"] = body.retro
    functions = [one.model_dump(exclude={"type"}) for one in body.tools or () if isinstance(one, ToolItem)]
    if functions:
        values["tools"] = [{"type": "function", "function": about} for about in functions]
    if body.tool_choice is not None:
        named = isinstance(body.tool_choice, NamedItem)
        values["tool_choice"] = (
            NamedTool.model_validate({"type": "function", "function": {"name": body.tool_choice.name}})
            if isinstance(body.tool_choice, NamedItem) and named
            else body.tool_choice
        )
    if body.text is not None:
        values |= {"response_format": _format(body.text.format), "verbosity": body.text.verbosity}
    values["reasoning_effort"] = None if body.reasoning is None else body.reasoning.effort
    return parse(Chat, values)


def _format(value: Json | None) -> Json | None:
    """As a chat's: there the schema's members have an object of their own."""
    if value is None or value.get("type") != "json_schema":
        return value
    return {"type": "json_schema", "json_schema": {name: part for name, part in value.items() if name != "type"}}


class ResponseAnswer(BlockAnswer):
    """One answer as a response: its items, and the events of its stream."""

    name, prefix, end = "response", "resp", b""

    def __init__(
        self,
        service: Service,
        body: Create,
        tools: Sequence[Tool],
        keep: Callable[[Json, Message], None] | None,
        searched: Searched | None = None,
    ):
        super().__init__(service, body.stream, tools)
        self.body, self._keep, self._searched = body, keep, searched
        self._number = 0  # of the next event
        self._items: list[Json] = []  # that are whole
        self._text: str | None = None  # of the message that is being said
        self._reason: str | None = None

    def whole(self, count: int) -> Json:
        self._show_search()
        for index, event in self.events:
            self._take(index, event)
        return self._finished()

    def lines(self, index: int, event: Event, with_usage: bool) -> bytes:
        self._count(index, event)
        begun = b""
        if not self._number:
            begun = self._event("response.created", response=self._response("in_progress"))
            begun += self._event("response.in_progress", response=self._response("in_progress"))
            begun += self._show_search()
        return begun + self._take(index, event)

    def last_lines(self, with_usage: bool) -> bytes:
        found = self._finished()
        return self._event(f"response.{found['status']}", response=found)

    def failed_lines(self, error: ApiError) -> bytes:
        about = {"code": error.code or "server_error", "message": error.message}
        return self._event("response.failed", response={**self._response("failed"), "error": about})

    def _note_end(self, reason: str | None, event: Event) -> None:
        self._reason = event.finish_reason

    def _show_search(self) -> bytes:
        """What was searched, as the first item."""
        if self._searched is None:
            return b""
        item = self._searched.item(bool(self.body.include))
        where = {"output_index": 0, "item_id": item["id"]}
        begun = {**item, "status": "in_progress", "queries": [], "results": None}
        out = self._event("response.output_item.added", output_index=0, item=begun)
        for state in ("in_progress", "searching", "completed"):
            out += self._event(f"response.file_search_call.{state}", **where)
        self._items.append(item)
        return out + self._event("response.output_item.done", output_index=0, item=item)

    def _push(self, text: str) -> bytes:
        place, out = len(self._items), b""
        if self._text is None:
            self._text = ""
            item = self._message("", "in_progress")
            out += self._event("response.output_item.added", output_index=place, item={**item, "content": []})
            part = item["content"][0]
            out += self._event("response.content_part.added", **self._where(), part=part)
        self._text += text
        return out + self._event("response.output_text.delta", **self._where(), delta=text, logprobs=[])

    def _close_text(self) -> bytes:
        if self._text is None:
            return b""
        text, place = self._text, len(self._items)
        item, out = self._message(text, "completed"), b""
        if self._searched is not None:
            item["content"][0]["annotations"] = self._searched.annotations(len(text))
            for number, cited in enumerate(item["content"][0]["annotations"]):
                about = {"annotation_index": number, "annotation": cited}
                out += self._event("response.output_text.annotation.added", **self._where(), **about)
        out += self._event("response.output_text.done", **self._where(), text=text, logprobs=[])
        out += self._event("response.content_part.done", **self._where(), part=item["content"][0])
        out += self._event("response.output_item.done", output_index=place, item=item)
        self._items.append(item)
        self._text = None
        return out

    def _add_call(self, call: Call) -> bytes:
        place = len(self._items)
        item: Json = {"id": f"fc_{call.id[5:]}", "type": "function_call", "status": "completed", "call_id": call.id}
        item |= {"name": call.name, "arguments": call.arguments}
        where = {"item_id": item["id"], "output_index": place}
        begun = {**item, "arguments": "", "status": "in_progress"}
        out = self._event("response.output_item.added", output_index=place, item=begun)
        out += self._event("response.function_call_arguments.delta", **where, delta=call.arguments)
        done = {"name": call.name, "arguments": call.arguments}
        out += self._event("response.function_call_arguments.done", **where, **done)
        out += self._event("response.output_item.done", output_index=place, item=item)
        self._items.append(item)
        return out

    def _where(self) -> Json:
        place = len(self._items)
        return {"item_id": self._item_id(place), "output_index": place, "content_index": 0}

    def _item_id(self, place: int) -> str:
        return f"msg_{str(self.head['id'])[5:]}_{place}"

    def _message(self, text: str, status: str) -> Json:
        part: Json = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        return {
            "id": self._item_id(len(self._items)),
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [part],
        }

    def _event(self, name: str, /, **about: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return line({"type": name, "sequence_number": number, **about}, name)

    def _finished(self) -> Json:
        """The whole response, kept where it is to be."""
        found = self._response("incomplete" if self._reason == "length" else "completed")
        if self._keep is not None:
            text = "".join(part["text"] for item in self._items for part in item.get("content", ()))
            calls = [
                {"id": item["call_id"], "function": {"name": item["name"], "arguments": item["arguments"]}}
                for item in self._items
                if item["type"] == "function_call"
            ]
            self._keep(found, said("assistant", text, tool_calls=calls))
        return found

    def _response(self, status: str) -> Json:
        body, is_over = self.body, status in ("completed", "incomplete")
        reasoning = {"effort": None, "summary": None} if body.reasoning is None else body.reasoning.model_dump()
        tools = [
            {**one.model_dump(), **({"strict": bool(one.strict)} if isinstance(one, ToolItem) else {})}
            for one in body.tools or ()
        ]
        choice = body.tool_choice.model_dump() if isinstance(body.tool_choice, NamedItem) else body.tool_choice
        shown = {"type": "text"} if body.text is None or body.text.format is None else body.text.format
        return {
            "id": self.head["id"],
            "object": "response",
            "created_at": self.head["created"],
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self.service.name,
            "output": list(self._items) if is_over else [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": reasoning,
            "store": body.store,
            "temperature": body.temperature,
            "text": {"format": shown},
            "tool_choice": choice or "auto",
            "tools": tools,
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": self._usage() if is_over else None,
            "metadata": body.metadata or {},
            "retro": self._about(),
        }

    def _usage(self) -> Json:
        return {
            "input_tokens": self.prompt_tokens,
            "input_tokens_details": {"cached_tokens": self.cached_tokens},
            "output_tokens": self.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }
