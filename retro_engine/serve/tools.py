"""Functions that a model may call: as its template or a system message shows them, and its calls found in what it says.

A call is what Hermes and Qwen write, <tool_call>{"name": ..., "arguments": {...}}</tool_call>, or such an object alone. Where a
call is required, a grammar (extra `grammar`) lets nothing else come; else what is no call of a known function stays text.
"""

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from retro_engine.generate.grammar import WHITESPACE, Grammar
from retro_engine.serve.api_error import ApiError
from retro_engine.serve.limits import Strict

BEGIN, END = "<tool_call>", "</tool_call>"
MAX_TOOLS = 128
NO_CALL = "a tool call that is not JSON, or of no known function, was left as text"
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class Function(Strict):
    """A function as the model sees it; `parameters` is a JSON schema of an object."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """One that may be called."""

    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    name: Name


class NamedTool(Strict):
    """The one that must be called."""

    type: Literal["function"]
    function: FunctionName


class CalledFunction(Strict):
    """A call as it was made; `arguments` is JSON, unless the model said something else."""

    name: str = Field(max_length=256)
    arguments: str = ""


class ToolCall(Strict):
    """A call in an assistant's message."""

    id: str = Field("", max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None  # what streams have


@dataclass(frozen=True)
class Call:
    """A call that was found in an answer."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")

    def json(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


Choice = Literal["none", "auto", "required"] | NamedTool


def shown_tools(tools: Sequence[Tool] | None, choice: Choice | None) -> list[Tool]:
    """Those that the model is told of. Raises ApiError for a choice that there is not, and for a name that is there twice."""
    known = list(tools or ())
    names = [tool.function.name for tool in known]
    if len(set(names)) < len(names):
        raise ApiError(400, "a function is there twice", "tools")
    if isinstance(choice, NamedTool):
        if choice.function.name not in names:
            raise ApiError(400, f"tools has no function {choice.function.name!r}", "tool_choice.function.name")
        return [tool for tool in known if tool.function.name == choice.function.name]
    if choice == "required" and not known:
        raise ApiError(400, "tool_choice=required, and tools has none", "tool_choice", "contradiction")
    return [] if choice == "none" else known


def call_grammar(tools: Sequence[Tool]) -> Grammar:
    """One call of any of them, its arguments by the function's schema."""
    calls = []
    for tool in tools:
        schema = {"type": "object", **(tool.function.parameters or {})}
        schema["x-guidance"] = {"whitespace_pattern": WHITESPACE}
        begin = f'{{"name": {json.dumps(tool.function.name)}, "arguments": '
        calls.append(f"{json.dumps(begin)} %json {json.dumps(schema)} {json.dumps('}')}")
    rules = "\n".join(f"call_{number}: {call}" for number, call in enumerate(calls))
    which = " | ".join(f"call_{number}" for number in range(len(calls)))
    return Grammar("grammar", f'start: "{BEGIN}\\n" ({which}) "\\n{END}"\n{rules}\n')


def tool_json(tool: Tool) -> dict[str, Any]:
    """As templates read it."""
    about = tool.function
    said = {"description": about.description, "parameters": about.parameters}
    return {"type": "function", "function": {"name": about.name, **{k: v for k, v in said.items() if v is not None}}}


def described(tools: Sequence[Tool]) -> str:
    """What a model is told whose template says nothing of functions."""
    lines = [json.dumps(tool_json(tool)["function"], ensure_ascii=False) for tool in tools]
    example = '{"name": "NAME", "arguments": {...}}'
    head = "You may call these functions, each described by a line of JSON:"
    how = f"To call one, write nothing but its name and arguments as JSON, in this form:\n{BEGIN}\n{example}\n{END}"
    return "\n".join((head, *lines, how))


def written(calls: Sequence[ToolCall]) -> str:
    """Calls as a model writes them."""
    return "\n".join(
        f"{BEGIN}\n{json.dumps({'name': call.function.name, 'arguments': arguments_of(call)}, ensure_ascii=False)}\n{END}"
        for call in calls
    )


def arguments_of(call: ToolCall) -> Any:
    """As templates want them: the object, where they are one."""
    try:
        return json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        return call.function.arguments


class CallReader:
    """What a model says, as text and calls; text that may become a call is held back."""

    def __init__(self, tools: Sequence[Tool]):
        self._names = {tool.function.name for tool in tools}
        self._held = ""
        self._has_begun = False
        self.calls: list[Call] = []
        self.notes: list[str] = []

    def push(self, text: str, is_last: bool = False) -> tuple[str, list[Call]]:
        """The text and the calls that are certain with `text`."""
        self._held += text
        shown, found = "", list[Call]()
        while True:
            place = self._held.find(BEGIN)
            if place < 0:
                break
            end = self._held.find(END, place)
            if end < 0 and not is_last:
                break
            inner = self._held[place + len(BEGIN) : end if end >= 0 else None]
            call = self._call(inner)
            whole = self._held[place : end + len(END) if end >= 0 else None]
            shown += self._held[:place] if call is not None else self._held[:place] + whole
            self._held = self._held[place + len(whole) :]
            if call is None:
                self.notes.append(NO_CALL)
            else:
                found.append(call)
        text, more = self._rest(is_last)
        found += more
        self.calls += found
        shown += text
        if self.calls and not shown.strip():  # only what stands between calls
            shown = ""
        self._has_begun = self._has_begun or bool(shown.strip())
        return shown, found

    def _rest(self, is_last: bool) -> tuple[str, list[Call]]:
        """Of what is held: what cannot become a call any more."""
        held = self._held
        if not self._has_begun and not self.calls and held.lstrip().startswith("{"):  # perhaps a call without its tags
            if not is_last:
                return "", []
            call = self._call(held)
            if call is not None:
                self._held = ""
                return "", [call]
        if is_last:
            self._held = ""
            return held, []
        place = held.find(BEGIN)
        if place < 0:
            place = next((n for n in range(len(held)) if BEGIN.startswith(held[n:])), len(held))
            if not held[:place].strip():
                place = 0
        self._held = held[place:]
        return held[:place], []

    def _call(self, text: str) -> Call | None:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict) or not isinstance(value.get("name"), str) or value["name"] not in self._names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                return None
        if not isinstance(arguments, dict):
            return None
        return Call(value["name"], json.dumps(arguments, ensure_ascii=False))
