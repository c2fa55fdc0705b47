"""A conversation as the token ids that an answer continues, by the model's own chat template.

The template is rendered by a process of its own (`generate.chat_template_worker`), bounded in time, memory and size. What it writes
is control tokens where it names them; what a message holds never is, whatever it looks like: special tokens in messages
are replaced by characters that stand for them, and those are put back as text.
"""

import functools
import json
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from retro_engine.data.chat_files import DEFAULT
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import UsageError

RENDER_S = 5.0  # seconds that a template may take
MAX_BYTES = 8 << 20  # of a rendered conversation
OWN_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token")
BEFORE = "\n"  # no word goes on after it
FIRST_MARK = 0xF0000  # a plane for private use, 65,534 characters


class ChatTemplate:
    """The chat template of a tokenizer's model; close it."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.template = tokenizer, tokenizer.chat_files.templates.get(DEFAULT)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def close(self) -> None:
        with self._lock:
            self._end()

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        begins: bool = True,
        goes_on: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of the conversation up to where the assistant's next answer begins, unless `begins` is false; with
        `goes_on` up to the end of the last message's text. `tools`: functions that the template describes.

        messages: {"role", "content"} and more of what the template reads; `variables`: what it reads beside them (enable_thinking). Raises UsageError where it refuses them, and
        for a model whose templates all have names.
        """
        if self.template is None:
            names = ", ".join(self.tokenizer.chat_files.templates)
            why = f"it has {names}" if names else "it is a base model"
            raise UsageError("the model has no default chat template", why, "write chat_template.jinja into its folder")
        marks = Marks(self.tokenizer, messages, tools)
        more = variables or {}
        rendered = self._cut(marks, more) if goes_on else self.render(marks.messages, begins, marks.tools, more)
        ids: list[int] = []
        for number, (text, is_controlled) in enumerate(marks.parts(rendered)):
            before = BEFORE if number else ""  # within a text: SentencePiece's like put a space where one begins
            ids += self.tokenizer.encode_after(before, text, is_controlled)[0]
        if not ids:
            raise UsageError("the model's chat template writes nothing", "there is nothing to continue")
        return ids

    @functools.cached_property
    def stops(self) -> tuple[str, ...]:
        """The special token that the template writes after what the assistant said, if it writes one.

        Many a model's files name another as the one end of its texts.
        """
        said = chr(FIRST_MARK)
        turns = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": said},
            {"role": "user", "content": "b"},
        ]
        try:
            after = self.render(turns).rpartition(said)[2].lstrip()
        except UsageError:  # it takes no such conversation
            return ()
        ids, places = self.tokenizer.encode_controlled(after)
        return (after[: places[0][1]],) if ids and ids[0] in self.tokenizer.special_ids else ()

    def _cut(self, marks: "Marks", variables: Mapping[str, Any]) -> str:
        """What the template writes up to the end of the last message's text."""
        *before, last = marks.messages
        end = marks.unused()
        text = self.render([*before, {**last, "content": last["content"] + end}], False, marks.tools, variables)
        if end not in text:
            raise UsageError("the model's chat template leaves out the last message", "", "send it without going on")
        return text[: text.rindex(end)]

    @property
    def knows_tools(self) -> bool:
        """Whether the template has a way to write functions and their calls."""
        return "tools" in str(self.template)

    def reads(self, name: str) -> bool:
        """Whether the template has a variable of this name."""
        return re.search(rf"\b{re.escape(name)}\b", str(self.template)) is not None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        begins: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
        more: Mapping[str, Any] | None = None,
    ) -> str:
        """The text that the template makes of a conversation. Raises UsageError where it refuses or takes too much."""
        tokens = self.tokenizer.chat_files.tokens
        names = {"bos_token": self._written(self.tokenizer.bos_id), "eos_token": self._written(self.tokenizer.eod_id)}
        variables = {
            **(more or {}),
            **names,
            **tokens,
            "messages": self._known_roles(messages),
            "tools": list(tools) or None,
            "documents": None,
            "add_generation_prompt": begins,
        }
        with self._lock:
            found = self._ask(json.dumps(variables))
        if "error" in found:
            raise UsageError("the model's chat template refuses this", found["error"])
        return found["text"]

    def _known_roles(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """`developer` is OpenAI's newer name of `system`, which templates know."""
        renamed = {} if "developer" in str(self.template) else {"developer": "system"}
        return [{**message, "role": renamed.get(message["role"], message["role"])} for message in messages]

    def _written(self, index: int | None) -> str:
        return "" if index is None else self.tokenizer.backend.id_to_token(index) or ""

    def _ask(self, line: str) -> dict[str, str]:
        """What the process says to a line; one that takes too long ends itself, and the next question starts another."""
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            said = process.stdout.readline()
        except BrokenPipeError:
            said = ""
        if said.endswith("\n"):
            found: dict[str, str] = json.loads(said)
            return found
        self._end()
        return {"error": f"it takes more than {RENDER_S:g} seconds, or more memory than it may"}

    def _started(self) -> "subprocess.Popen[str]":
        if self._process is None or self._process.poll() is not None:
            self._end()
            command = [sys.executable, "-m", "retro_engine.generate.chat_template_worker"]
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
            assert self._process.stdin is not None
            first = {"template": self.template, "max_bytes": MAX_BYTES, "seconds": RENDER_S}
            self._process.stdin.write(json.dumps(first) + "\n")
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


class Marks:
    """Messages and tools in which each special token is one character that none of them has."""

    def __init__(
        self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ):
        self._tokenizer = tokenizer
        self._used = set(json.dumps([*messages, *tools], ensure_ascii=False))
        self._marks: dict[str, str] = {}  # special token -> character
        self._free = FIRST_MARK
        self.messages = [self._marked(message) for message in messages]
        self.tools = [self._marked(tool) for tool in tools]

    def parts(self, rendered: str) -> list[tuple[str, bool]]:
        """The rendered text in parts: what the template wrote, around what messages hold (False: it stays text)."""
        texts = {mark: text for text, mark in self._marks.items()}
        parts: list[tuple[str, bool]] = []
        start = 0
        for place, character in enumerate(rendered):
            if character in texts:
                parts += [(rendered[start:place], True), (texts[character], False)]
                start = place + 1
        return [part for part in [*parts, (rendered[start:], True)] if part[0]]

    def _marked(self, value: Any) -> Any:
        """Every text in a message: found by the tokenizer itself, so that nothing else than it decides what is one."""
        if isinstance(value, Mapping):
            return {key: self._marked(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [self._marked(part) for part in value]
        if not isinstance(value, str):
            return value
        out, start = "", 0
        for index, (begin, end) in zip(*self._tokenizer.encode_controlled(value)):
            if index in self._tokenizer.special_ids and end > begin:
                out += value[start:begin] + self._mark(value[begin:end])
                start = end
        return out + value[start:]

    def _mark(self, text: str) -> str:
        if text not in self._marks:
            self._marks[text] = self.unused()
        return self._marks[text]

    def unused(self) -> str:
        """A character that stands in no message and for no token."""
        while chr(self._free) in self._used:
            self._free += 1
        self._free += 1
        return chr(self._free - 1)
