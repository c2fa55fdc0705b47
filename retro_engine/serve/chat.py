"""A conversation as a prompt: the checkpoint's chat template, or question and answer for a base model."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from retro_engine.errors import UsageError
from retro_engine.generate.chat_template import OWN_VARIABLES, ChatTemplate
from retro_engine.serve.api_error import ApiError
from retro_engine.serve.limits import Strict
from retro_engine.serve.tools import MAX_TOOLS, Tool, ToolCall, arguments_of, described, tool_json, written

STOPS = ("\nQuestion:",)


class MessagePart(Strict):
    """A part of a message: only text is read."""

    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: None = None


class Message(Strict):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[MessagePart], Field(fail_fast=True)] | None = (
        None  # None: only an answer's, without text
    )
    name: str | None = Field(None, max_length=64)
    # an answer that is sent back has these, with nothing in them
    refusal: Literal[""] | None = None
    tool_calls: list[ToolCall] | None = Field(None, max_length=MAX_TOOLS, fail_fast=True)
    tool_call_id: str | None = Field(None, max_length=256)  # of a tool's answer
    function_call: None = None
    annotations: list[Any] | None = Field(None, max_length=0)
    audio: None = None
    parsed: None = None
    reasoning_content: Literal[""] | None = None
    reasoning: Literal[""] | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())


def said(role: str, text: str | None, **more: Any) -> Message:
    """A message of a chat, for what is said in another form."""
    return Message.model_validate({"role": role, "content": text, **more})


def chat_prompt(
    messages: list[Message],
    template: ChatTemplate | None,
    begins: bool = True,
    goes_on: bool = False,
    tools: Sequence[Tool] = (),
    variables: Mapping[str, Any] | None = None,
) -> tuple[str | list[int], tuple[str, ...]]:
    """The prompt that an answer continues, token ids where the model has a template, and the texts that end it.

    `begins`: an answer's beginning is written after the last message; `goes_on`: the last message is that beginning, and
    the answer goes on with it. `tools`: functions that may be called. `variables`: more of what the template reads.
    """
    _check(messages, begins, goes_on)
    if template is not None:
        return _rendered(
            messages, template, begins=begins, goes_on=goes_on, tools=tools, variables=variables or {}
        ), template.stops
    parts = []
    for turn in _plain_turns(messages, tools):
        text = str(turn["content"])
        if turn["role"] == "user":
            parts.append(f"Question: {text.strip()}\n")
        elif turn["role"] == "assistant":
            parts.append(f"Answer: {text.strip()}\n\n")
        else:
            parts.append(f"{text.strip()}\n\n")
    if goes_on:
        parts[-1] = f"Answer: {messages[-1].text}"
    return f"{''.join(parts)}{'Answer:' if begins and not goes_on else ''}", STOPS


def _check(messages: list[Message], begins: bool, goes_on: bool) -> None:
    """Raises ApiError for a conversation that there is nothing to say to."""
    for number, message in enumerate(messages):
        if message.content is None and message.role != "assistant":
            raise ApiError(400, f"the {message.role}'s message has no content", f"messages.{number}.content", "missing")
        if message.tool_calls and message.role != "assistant":
            raise ApiError(400, f"the {message.role}'s message calls functions", f"messages.{number}.tool_calls")
    is_own = messages[-1].role == "assistant"
    if goes_on and not (is_own and messages[-1].text and not messages[-1].tool_calls):
        why = "continue_final_message goes on with an assistant's text, and the last message has none"
        raise ApiError(400, why, "continue_final_message", "contradiction")
    if is_own and begins and not goes_on:
        why = "the last message is the assistant's own: there is nothing to answer (continue_final_message goes on with it)"
        raise ApiError(400, why, "messages")


def _plain_turns(messages: list[Message], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Turns for a model whose template knows nothing of functions: they are described, called and answered in text."""
    turns: list[dict[str, Any]] = []
    for message in messages:
        name = {} if message.name is None else {"name": message.name}
        role, text = message.role, message.text
        if message.tool_calls:
            text = f"{text}\n{written(message.tool_calls)}".strip()
        if message.role == "tool":
            role, text = "user", f"<tool_response>\n{text}\n</tool_response>"
        turns.append({"role": role, "content": text, **name})
    if tools:
        is_there = turns[0]["role"] in ("system", "developer")
        first = turns.pop(0) if is_there else {"role": "system", "content": ""}
        turns.insert(0, {**first, "content": f"{first['content']}\n\n{described(tools)}".strip()})
    return turns


def _own_turns(messages: list[Message]) -> list[dict[str, Any]]:
    """Turns for a template that writes functions in its model's own form."""
    turns: list[dict[str, Any]] = []
    for message in messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.text}
        turn |= {key: value for key in ("name", "tool_call_id") if (value := getattr(message, key)) is not None}
        if message.tool_calls:
            calls = [{"name": call.function.name, "arguments": arguments_of(call)} for call in message.tool_calls]
            turn["tool_calls"] = [
                {"id": call.id, "type": "function", "function": about} for call, about in zip(message.tool_calls, calls)
            ]
        turns.append(turn)
    return turns


def check_variables(variables: Mapping[str, Any] | None, template: ChatTemplate | None) -> Mapping[str, Any]:
    """Raises ApiError for what would be asked of the template in vain, or is said by other fields."""
    for name in variables or {}:
        if name in OWN_VARIABLES:
            raise ApiError(400, f"{name} is said by the body's other fields", f"chat_template_kwargs.{name}")
        if template is None or not template.reads(name):
            why = "the model has no chat template" if template is None else "the model's chat template does not read it"
            raise ApiError(400, f"chat_template_kwargs.{name}: {why}", f"chat_template_kwargs.{name}")
    return variables or {}


def _rendered(
    messages: list[Message],
    template: ChatTemplate,
    begins: bool,
    goes_on: bool,
    tools: Sequence[Tool],
    variables: Mapping[str, Any],
) -> list[int]:
    knows = template.knows_tools
    turns = _own_turns(messages) if knows else _plain_turns(messages, tools)
    shown = [tool_json(tool) for tool in tools] if knows else []
    try:
        return template.encode(turns, begins=begins and not goes_on, goes_on=goes_on, tools=shown, variables=variables)
    except UsageError as error:
        raise ApiError(400, f"{error.what}: {error.why}", "messages") from None
