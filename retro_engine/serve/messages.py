"""Anthropic's Messages over chats: POST /v1/messages whole or streamed, and how many tokens a conversation has."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from retro_engine.generate.request import Event
from retro_engine.generate.sampling import TINY
from retro_engine.serve.answers import BlockAnswer, line
from retro_engine.serve.api_error import ApiError
from retro_engine.serve.chat import Message, said
from retro_engine.serve.constraints import Json
from retro_engine.serve.fields import MAX_STOPS, Chat, RetroOptions
from retro_engine.serve.limits import Strict, Texts, parse, read_json
from retro_engine.serve.openai import chat_requests, respond
from retro_engine.serve.request_context import limits_of, service_of
from retro_engine.serve.service import Service
from retro_engine.serve.tools import MAX_TOOLS, Call, Tool

CACHE = Json | None  # what a client wants kept: prompts are remembered anyway


class TextBlock(Strict):
    """Text, in a message or of the system."""

    type: Literal["text"]
    text: str
    cache_control: CACHE = None
    citations: list[Any] | None = Field(None, max_length=0)


class UseBlock(Strict):
    """A call that was made."""

    type: Literal["tool_use"]
    id: str = Field(max_length=256)
    name: str = Field(max_length=256)
    input: Json
    cache_control: CACHE = None


class ResultBlock(Strict):
    """What a call gave."""

    type: Literal["tool_result"]
    tool_use_id: str = Field(max_length=256)
    content: str | Annotated[list[TextBlock], Field(fail_fast=True)] = ""
    is_error: bool | None = None
    cache_control: CACHE = None


Block = Annotated[TextBlock | UseBlock | ResultBlock, Field(discriminator="type")]


class Turn(Strict):
    """One message."""

    role: Literal["user", "assistant"]
    content: str | Annotated[list[Block], Field(fail_fast=True)]


class ToolAbout(Strict):
    """A function that may be called."""

    name: str
    description: str | None = None
    input_schema: Json
    type: Literal["custom"] | None = None
    cache_control: CACHE = None


class ToolChoice(Strict):
    """Whether one must be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Metadata(Strict):
    user_id: str | None = Field(None, max_length=512)


class Thinking(Strict):
    type: Literal["disabled"]


class Conversation(Strict):
    """The body of POST /v1/messages/count_tokens."""

    model: str
    messages: list[Turn] = Field(min_length=1, max_length=1000, fail_fast=True)
    system: str | Annotated[list[TextBlock], Field(fail_fast=True)] | None = None
    tools: list[ToolAbout] | None = Field(None, max_length=MAX_TOOLS, fail_fast=True)
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None


class CreateMessage(Conversation):
    """The body of POST /v1/messages."""

    max_tokens: int = Field(ge=1)
    stop_sequences: Texts | None = Field(None, max_length=MAX_STOPS)
    stream: bool = False
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = Field(None, ge=TINY, le=1)
    top_k: int | None = Field(None, ge=0, le=1 << 20)
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    retro: RetroOptions | None = None


async def create_message(request: HttpRequest) -> Response:
    """Answer a conversation; where the last message is the assistant's, go on with it."""
    body = parse(CreateMessage, await read_json(request, limits_of(request)))
    values: Json = {"max_tokens": body.max_tokens, "stream": body.stream, "stop": body.stop_sequences}
    values |= {name: getattr(body, name) for name in ("temperature", "top_p", "top_k")}
    if body.retro is not None:
        values["retro"] = body.retro
    if body.metadata is not None:
        values["user"] = body.metadata.user_id
    chat = _chat(body, values)
    asked, tools = await chat_requests(request, chat)
    answer = MessageAnswer(service_of(request), body.stream, tools, body.stop_sequences or ())
    return await respond(request, chat, answer, asked)


async def count_message_tokens(request: HttpRequest) -> Response:
    """Tokens of the prompt that a conversation is."""
    body = parse(Conversation, await read_json(request, limits_of(request)))
    asked, _ = await chat_requests(request, _chat(body, {"max_tokens": 1}))
    return JSONResponse({"input_tokens": len(asked[0].prompt)})


def _chat(body: Conversation, values: Json) -> Chat:
    """The chat that asks for the same."""
    system = [] if body.system is None else [said("system", _text(body.system))]
    messages = [*system, *(message for turn in body.messages for message in turn_messages(turn))]
    goes_on = body.messages[-1].role == "assistant"
    values |= {"model": body.model, "messages": messages, "continue_final_message": goes_on}
    if body.tools:
        values["tools"] = [_tool(one) for one in body.tools]
    choice = body.tool_choice
    if choice is not None:
        if (choice.name is not None) != (choice.type == "tool"):
            raise ApiError(400, "tool_choice has a name where its type is tool", "tool_choice.name", "contradiction")
        named = {"type": "function", "function": {"name": choice.name}}
        values["tool_choice"] = {"auto": "auto", "any": "required", "none": "none", "tool": named}[choice.type]
    return parse(Chat, values)


def _tool(about: ToolAbout) -> Json:
    function = {"name": about.name, "description": about.description, "parameters": about.input_schema}
    return {"type": "function", "function": function}


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)


def turn_messages(turn: Turn) -> list[Message]:
    """A turn as a chat's messages: what functions gave comes before what the user says. Raises ApiError for a block of the
    other's.
    """
    if isinstance(turn.content, str):
        return [said(turn.role, turn.content)]
    texts: list[TextBlock] = []
    calls: list[Json] = []
    results: list[Message] = []
    for block in turn.content:
        if isinstance(block, TextBlock):
            texts.append(block)
        elif isinstance(block, UseBlock) and turn.role == "assistant":
            call = Call(block.name, _arguments(block.input), block.id)
            calls.append(call.json())
        elif isinstance(block, ResultBlock) and turn.role == "user":
            results.append(said("tool", _text(block.content), tool_call_id=block.tool_use_id))
        else:
            raise ApiError(400, f"the {turn.role}'s message has a block {block.type}", "messages")
    if not texts and not calls:
        return results or [said(turn.role, "")]
    return [*results, said(turn.role, _text(texts), tool_calls=calls)]


def _arguments(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False)


class MessageAnswer(BlockAnswer):
    """One answer as a message of blocks, and the events of its stream."""

    name, prefix, end = "message", "msg", b""

    def __init__(self, service: Service, is_stream: bool, tools: Sequence[Tool], stops: Sequence[str]):
        super().__init__(service, is_stream, tools)
        self._stops = stops
        self._blocks: list[Json] = []  # that are whole
        self._text: str | None = None  # of the block that is being said
        self._ended: tuple[str | None, str | None] = (None, None)  # why, and by which stop sequence
        self._is_begun = False

    def whole(self, count: int) -> Json:
        for index, event in self.events:
            self._take(index, event)
        reason, stop = self._ended
        about = {"content": self._blocks, "stop_reason": reason, "stop_sequence": stop, "usage": self._usage()}
        return {**self._head(), **about, "retro": self._about()}

    def lines(self, index: int, event: Event, with_usage: bool) -> bytes:
        self._count(index, event)
        begun = b""
        if not self._is_begun:
            self._is_begun, self.cached_tokens = True, event.cached_tokens
            empty: Json = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": self._usage()}
            begun = _event("message_start", message={**self._head(), **empty})
            self.cached_tokens = 0  # counted at the end
        return begun + self._take(index, event)

    def last_lines(self, with_usage: bool) -> bytes:
        reason, stop = self._ended
        delta = {"stop_reason": reason, "stop_sequence": stop}
        return _event("message_delta", delta=delta, usage=self._usage(), retro=self._about()) + _event("message_stop")

    def failed_lines(self, error: ApiError) -> bytes:
        return _event("error", error=error.body()["error"])

    def _note_end(self, reason: str | None, event: Event) -> None:
        self._ended = self._why(reason, event.stopped_by)

    def _why(self, reason: str | None, stop: str | None) -> tuple[str, str | None]:
        if reason == "tool_calls":
            return "tool_use", None
        if reason == "length":
            return "max_tokens", None
        return ("stop_sequence", stop) if stop is not None and stop in self._stops else ("end_turn", None)

    def _push(self, text: str) -> bytes:
        place, out = len(self._blocks), b""
        if self._text is None:
            self._text = ""
            out = _event("content_block_start", index=place, content_block={"type": "text", "text": ""})
        self._text += text
        return out + _event("content_block_delta", index=place, delta={"type": "text_delta", "text": text})

    def _close_text(self) -> bytes:
        if self._text is None:
            return b""
        self._blocks.append({"type": "text", "text": self._text})
        self._text = None
        return _event("content_block_stop", index=len(self._blocks) - 1)

    def _add_call(self, call: Call) -> bytes:
        place, block = len(self._blocks), {"type": "tool_use", "id": call.id, "name": call.name}
        self._blocks.append({**block, "input": json.loads(call.arguments)})
        out = _event("content_block_start", index=place, content_block={**block, "input": {}})
        delta = {"type": "input_json_delta", "partial_json": call.arguments}
        return out + _event("content_block_delta", index=place, delta=delta) + _event("content_block_stop", index=place)

    def _head(self) -> Json:
        return {"id": self.head["id"], "type": "message", "role": "assistant", "model": self.service.name}

    def _usage(self) -> Json:
        read = self.cached_tokens
        return {
            "input_tokens": self.prompt_tokens - read,
            "cache_read_input_tokens": read,
            "cache_creation_input_tokens": 0,
            "output_tokens": self.completion_tokens,
        }


def _event(name: str, /, **about: Any) -> bytes:
    return line({"type": name, **about}, name)
