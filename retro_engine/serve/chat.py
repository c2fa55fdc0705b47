"""A conversation as a prompt: the checkpoint's chat template, or question and answer for a base model."""

from typing import Annotated, Any, Literal

from pydantic import Field

from retro_engine.serve.limits import ApiError, Strict

STOPS = ("\nQuestion:",)


class Part(Strict):
    """A part of a message: only text is read."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(fail_fast=True)]
    name: str | None = Field(None, max_length=64)
    # an answer that is sent back has these, with nothing in them
    refusal: Literal[""] | None = None
    tool_calls: list[Any] | None = Field(None, max_length=0)
    function_call: None = None
    annotations: list[Any] | None = Field(None, max_length=0)
    audio: None = None
    reasoning_content: Literal[""] | None = None
    reasoning: Literal[""] | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


def chat_prompt(messages: list[Message], template: str | None) -> tuple[str, tuple[str, ...]]:
    """The prompt that an answer continues, and the texts that end it."""
    if messages[-1].role not in ("user", "system", "developer"):
        raise ApiError(400, "the last message is the assistant's own: there is nothing to answer", "messages")
    if template is not None:
        return _render(messages, template), ()
    parts = []
    for message in messages:
        if message.role == "user":
            parts.append(f"Question: {message.text.strip()}\n")
        elif message.role == "assistant":
            parts.append(f"Answer: {message.text.strip()}\n\n")
        else:
            parts.append(f"{message.text.strip()}\n\n")
    return f"{''.join(parts)}Answer:", STOPS


def _render(messages: list[Message], template: str) -> str:
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    turns: list[dict[str, Any]] = [{"role": m.role, "content": m.text} for m in messages]
    try:
        return environment.from_string(template).render(
            messages=turns, add_generation_prompt=True, bos_token="", eos_token=""
        )
    except TemplateError as error:
        raise ApiError(400, f"the model's chat template refuses this: {error}", "messages") from None
