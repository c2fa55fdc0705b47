"""`POST /completion`, in llama.cpp's own form: what the notebook of its page asks. The fields are those of completions."""

from typing import Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from retro_engine.generate.request import Event
from retro_engine.serve.answers import CompletionAnswer, line
from retro_engine.serve.fields import Completion
from retro_engine.serve.limits import parse, read_json
from retro_engine.serve.openai import completion_requests, respond
from retro_engine.serve.request_context import limits_of, service_of

STOP_TYPES = {"stop": "eos", "length": "limit"}


class NativeCompletion(Completion):
    """The body of POST /completion: one prompt, one answer."""

    n: int = Field(1, ge=1, le=1)
    best_of: int | None = Field(None, ge=1, le=1)
    n_probs: int = Field(0, ge=0, le=0)
    id_slot: int | None = Field(None, ge=-1, le=-1)


async def complete(request: Request) -> Response:
    """Continue a prompt; as many tokens as there is room for where nothing is said."""
    body = parse(NativeCompletion, await read_json(request, limits_of(request)))
    if body.n_predict is None and body.max_tokens is None:
        body.n_predict = -1
    body.timings_per_token = True
    answer, asked = await completion_requests(request, body, NativeAnswer(service_of(request), body.stream))
    return await respond(request, body, answer, asked[:1])


class NativeAnswer(CompletionAnswer):
    """`content`, and with the last piece why it ended, tokens and times."""

    end = b""

    def piece(self, index: int, event: Event, with_usage: bool) -> dict[str, Any] | None:
        found = super().piece(index, event, with_usage)
        if found is None:
            return None
        mine = {"index": 0, "content": event.text, "tokens": event.tokens, "stop": event.finish_reason is not None}
        more = {"retro": found["retro"]} if "retro" in found else {}
        return {**mine, **more, **(self._last(event) if event.finish_reason is not None else {})}

    def last_lines(self, with_usage: bool) -> bytes:
        return line({"usage": self.usage()}) if with_usage else b""

    def whole(self, count: int) -> dict[str, Any]:
        found = super().whole(count)
        tokens = [token for _, event in self.events for token in event.tokens]
        mine = {"index": 0, "content": found["choices"][0]["text"], "tokens": tokens, "stop": True}
        return {**mine, **self._last(self.events[-1][1]), "retro": found["retro"]}

    def _last(self, event: Event) -> dict[str, Any]:
        word = event.stopped_by or ""
        return {
            "model": self.service.name,
            "stop_type": "word" if word else STOP_TYPES.get(event.finish_reason or "", "none"),
            "stopping_word": word,
            "tokens_predicted": self.completion_tokens,
            "tokens_evaluated": self.prompt_tokens,
            "tokens_cached": self.cached_tokens,
            **self.timings(),
        }
