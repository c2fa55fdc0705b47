"""Answers that may be gone on with (`previous_response_id`): in memory, each for its own caller, the oldest forgotten first."""

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from retro_engine.serve.chat import Message

MAX_ANSWERS = 1000
MAX_CHARACTERS = 32 << 20  # of their conversations together


@dataclass(frozen=True)
class Kept:
    """An answer as it was sent, and the conversation up to its end."""

    caller: str
    body: dict[str, Any]
    messages: list[Message]

    @property
    def size(self) -> int:
        calls = (call.function.arguments for message in self.messages for call in message.tool_calls or ())
        return sum(len(message.text) for message in self.messages) + sum(map(len, calls))


class KeptAnswers:
    """Those of one server."""

    def __init__(self, max_answers: int = MAX_ANSWERS, max_characters: int = MAX_CHARACTERS):
        self.max_answers, self.max_characters = max_answers, max_characters
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._characters = 0

    def put(self, identifier: str, kept: Kept) -> None:
        with self._lock:
            self._kept[identifier] = kept
            self._characters += kept.size
            while self._kept and (len(self._kept) > self.max_answers or self._characters > self.max_characters):
                self._characters -= self._kept.popitem(last=False)[1].size

    def get(self, identifier: str, caller: str) -> Kept | None:
        with self._lock:
            found = self._kept.get(identifier)
            return found if found is not None and found.caller == caller else None

    def delete(self, identifier: str, caller: str) -> bool:
        with self._lock:
            found = self._kept.get(identifier)
            if found is None or found.caller != caller:
                return False
            self._characters -= self._kept.pop(identifier).size
            return True
