"""A conversation as a prompt: the checkpoint's chat template, or question and answer for a base model."""

from typing import Annotated, Any, Literal

from pydantic import Field

from retro_engine.errors import UsageError
from retro_engine.generate.chat_template import ChatTemplate
from retro_engine.serve.api_error import ApiError
from retro_engine.serve.limits import Strict

STOPS = ("\nQuestion:",)


class MessagePart(Strict):
    """A part of a message: only text is read."""

    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: None = None


class Message(Strict):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[MessagePart], Field(fail_fast=True)] | None = (
        None  # None: only an answer's, without text
    )
    name: str | None = Field(None, max_length=64)
    # an answer that is sent back has these, with nothing in them
    refusal: Literal[""] | None = None
    tool_calls: list[Any] | None = Field(None, max_length=0)
    function_call: None = None
    annotations: list[Any] | None = Field(None, max_length=0)
    audio: None = None
    parsed: None = None
    reasoning_content: Literal[""] | None = None
    reasoning: Literal[""] | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())


def chat_prompt(
    messages: list[Message], template: ChatTemplate | None, begins: bool = True, goes_on: bool = False
) -> tuple[str | list[int], tuple[str, ...]]:
    """The prompt that an answer continues, token ids where the model has a template, and the texts that end it.

    `begins`: an answer's beginning is written after the last message; `goes_on`: the last message is that beginning, and
    the answer goes on with it.
    """
    _check(messages, begins, goes_on)
    if template is not None:
        return _rendered(messages, template, begins, goes_on), template.stops
    parts = []
    for message in messages:
        if message.role == "user":
            parts.append(f"Question: {message.text.strip()}\n")
        elif message.role == "assistant":
            parts.append(f"Answer: {message.text.strip()}\n\n")
        else:
            parts.append(f"{message.text.strip()}\n\n")
    if goes_on:
        parts[-1] = f"Answer: {messages[-1].text}"
    return f"{''.join(parts)}{'Answer:' if begins and not goes_on else ''}", STOPS


def _check(messages: list[Message], begins: bool, goes_on: bool) -> None:
    """Raises ApiError for a conversation that there is nothing to say to."""
    for number, message in enumerate(messages):
        if message.content is None and message.role != "assistant":
            raise ApiError(400, f"the {message.role}'s message has no content", f"messages.{number}.content", "missing")
    is_own = messages[-1].role == "assistant"
    if goes_on and not (is_own and messages[-1].text):
        why = "continue_final_message goes on with an assistant's text, and the last message has none"
        raise ApiError(400, why, "continue_final_message", "contradiction")
    if is_own and begins and not goes_on:
        why = "the last message is the assistant's own: there is nothing to answer (continue_final_message goes on with it)"
        raise ApiError(400, why, "messages")


def _rendered(messages: list[Message], template: ChatTemplate, begins: bool, goes_on: bool) -> list[int]:
    turns: list[dict[str, Any]] = []
    for message in messages:
        name = {} if message.name is None else {"name": message.name}
        turns.append({"role": message.role, "content": message.text, **name})
    try:
        return template.encode(turns, begins=begins and not goes_on, goes_on=goes_on)
    except UsageError as error:
        raise ApiError(400, f"{error.what}: {error.why}", "messages") from None
