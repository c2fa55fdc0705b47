"""What a request may cost, and what is refused before any work: sizes, times, JSON, repeated failures.

Errors have OpenAI's form, so that its client raises the right class:
{"error": {"message", "type", "param", "code"}}.
"""

import asyncio
import json
import re
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, Union

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)  # one that does not end goes to the end
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
MAX_VALUES = 1 << 19  # of one body: token ids
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


@dataclass(frozen=True)
class Limits:
    """Bounds of one server."""

    sign_in_bytes: int = 16 << 10  # of a body before anybody is known
    body_bytes: int = 1 << 20
    documents_bytes: int = 8 << 20
    import_bytes: int = 1 << 30
    json_depth: int = 32
    json_nodes: int = 1 << 15  # lists, objects and members of objects
    prompt_tokens: int = 4096
    new_tokens: int = 2048
    choices: int = 32  # prompts x n of one request
    work_tokens: int = 1 << 19  # that one request computes: of prompts and answers, and of the neighbors of each chunk
    logprobs: int = 1 << 17  # numbers of one answer
    sent_bytes: int = 64 << 20  # of given neighbors, which are sent back with each piece that could read them
    header_bytes: int = 16 << 10  # of a request's first line and headers together
    path_bytes: int = 8 << 10  # of the first line
    connections: int = 800
    header_s: float = 10.0  # from the first byte of a request, or of a connection, to the end of its headers
    progress_s: float = 15.0  # without a byte of a body that is read, or of an answer that is sent
    idle_s: float = 15.0  # between requests
    request_s: float = 120.0
    import_s: float = 900.0
    shutdown_s: float = 30.0


class ApiError(Exception):
    """An answer with a status of 400 and more."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class ClientLeft(Exception):
    """There is nobody to answer."""


class Strict(BaseModel):
    """A request's body: no conversions, and an unknown field is an error that names it. Null in a field that may be left
    out is its default, as in OpenAI's.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        """Of many unknown fields one is kept: each would be an error that is made and not shown."""
        if not isinstance(value, dict):
            return value
        fields = cls.model_fields
        unknown = [name for name in value if name not in fields][:1]
        return {
            name: value[name]
            for name in (*fields, *unknown)
            if name in value and (value[name] is not None or not _has_default(fields.get(name)))
        }


def _has_default(field: FieldInfo | None) -> bool:
    """Apart from null."""
    return field is not None and not field.is_required() and field.default is not None


# The first wrong item ends each: a list of others would make an error of every one
Texts = Annotated[list[str], Field(fail_fast=True)]
Ids = Annotated[list[int], Field(fail_fast=True)]
Prompts = Union[str, Texts, Ids, Annotated[list[Ids], Field(fail_fast=True)]]  # noqa: UP007 - Field is no type
Body = TypeVar("Body", bound=BaseModel)


async def read_chunks(request: Request, max_bytes: int, progress_s: float) -> AsyncIterator[bytes]:
    """The body as it arrives. Raises ApiError 413 for too much, 408 for none in `progress_s`, 415 for a compressed one."""
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise ApiError(
            415, f"content-encoding {coding[:40]!r} is not taken: send the body as it is", "content-encoding"
        )
    # The connection stays open, and server.py reads on for a while: a client that still sends would see a reset
    # instead of this answer.
    too_large = ApiError(413, f"the body has more than {max_bytes:,} bytes", code="body_too_large")
    length = request.headers.get("content-length", "0")
    if int(length) > max_bytes:  # h11 has checked that it is a number
        raise too_large
    stream = request.stream().__aiter__()
    size = 0
    while True:
        try:
            chunk = await asyncio.wait_for(anext(stream), progress_s)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise ApiError(408, "the body did not arrive", headers={"connection": "close"}) from None
        except ClientDisconnect:
            raise ApiError(400, "the client left") from None
        size += len(chunk)
        if size > max_bytes:
            raise too_large
        yield chunk


async def read_json(request: Request, limits: Limits, max_bytes: int | None = None) -> Any:
    """The body as JSON. Raises ApiError for another type, too much, or what is not strict JSON."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"content-type {kind!r} is not application/json", "content-type")
    parts = [c async for c in read_chunks(request, max_bytes or limits.body_bytes, limits.progress_s)]
    return parse_json(b"".join(parts), limits.json_depth, limits.json_nodes)


def parse_json(raw: bytes, max_depth: int, max_nodes: int = 1 << 15) -> Any:
    """Strict JSON: UTF-8, no NaN, no name twice in an object, no half of a surrogate pair, nested at most `max_depth` deep,
    of at most `max_nodes` lists, objects and members. Both are counted in the bytes: what is refused costs next to nothing.
    """
    _check_shape(raw, max_depth, max_nodes)
    try:
        value = json.loads(raw.decode("utf-8-sig"), parse_constant=_refuse_constant, object_pairs_hook=_object)
        if SURROGATE.search(raw) is not None:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(400, "the body holds half of a surrogate pair", code="invalid_json") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    except ValueError:  # int() takes no more than sys.get_int_max_str_digits()
        raise ApiError(400, "the body holds a number of thousands of digits", code="invalid_json") from None
    return value


def _object(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two members of one name another reader could take the first."""
    value = dict(members)
    if len(value) < len(members):
        last = {name: number for number, (name, _) in enumerate(members)}
        twice = next(name for number, (name, _) in enumerate(members) if last[name] != number)[:80]
        raise ApiError(400, f"{twice!r} is there twice in one object", twice, "invalid_json")
    return value


def _check_shape(raw: bytes, max_depth: int, max_nodes: int) -> None:
    """Raises ApiError 400. Up to the first byte that is not JSON the counts are right, and there reading ends."""
    codes = np.frombuffer(STRING.sub(b"", raw), np.uint8)
    is_open = (codes == ord("[")) | (codes == ord("{"))
    is_close = (codes == ord("]")) | (codes == ord("}"))
    depths = np.where(is_open, 1, -1)[is_open | is_close].cumsum()
    if depths.max(initial=0) > max_depth:
        raise ApiError(400, f"the body is nested more than {max_depth} deep", code="invalid_json")
    if int(np.count_nonzero(is_open)) + int(np.count_nonzero(codes == ord(":"))) > max_nodes:
        raise ApiError(400, f"the body has more than {max_nodes:,} lists, objects and members", code="invalid_json")
    if int(np.count_nonzero(codes == ord(","))) > MAX_VALUES:
        raise ApiError(400, f"the body has more than {MAX_VALUES:,} values", code="invalid_json")


def _refuse_constant(name: str) -> None:
    raise ApiError(400, f"the body is not JSON: {name} is not a number of JSON", code="invalid_json")


def parse(model: type[Body], value: Any) -> Body:
    """A body of the given form. Raises ApiError 400 naming the first field that is wrong."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False)
        named = [(_named(value, one["loc"], one["type"], one["input"]), one) for one in errors]
        names, first = max(named, key=lambda one: len(one[0]))  # of a union, the form that was meant goes deepest
        param = ".".join(names) or None
        if first["type"] == "extra_forbidden":
            raise ApiError(400, f"unknown field {param}", param, "unknown_field") from None
        raise ApiError(400, f"{param or 'the body'}: {first['msg']}", param, first["type"]) from None


def _named(value: Any, steps: tuple[int | str, ...], kind: str, wrong: Any) -> list[str]:
    """The steps of an error that lead through the body; the others name forms that were tried on a value, `wrong` at last."""
    names = []
    for number, step in enumerate(steps):
        if value is wrong:
            break
        is_missing = kind == "missing" and number + 1 == len(steps)
        if isinstance(value, dict) and isinstance(step, str) and (step in value or is_missing):
            value = value.get(step)
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            value = value[step]
        else:
            continue
        names.append(str(step))
    return names


class Throttle:
    """At most `count` failures in `window_s` for each key; then the caller waits. Holds at most `max_keys` keys."""

    def __init__(self, count: int, window_s: float, max_keys: int = 10_000):
        self.count, self.window_s, self.max_keys = count, window_s, max_keys
        self._failures: OrderedDict[str, deque[float]] = OrderedDict()

    def wait_s(self, key: str) -> float:
        """Seconds until the next try is allowed; 0 = now."""
        times = self._failures.get(key, deque())
        now = time.monotonic()
        while times and now - times[0] >= self.window_s:
            times.popleft()
        return self.window_s - (now - times[0]) if len(times) >= self.count else 0.0

    def failed(self, key: str) -> None:
        self._failures.setdefault(key, deque(maxlen=self.count)).append(time.monotonic())
        self._failures.move_to_end(key)
        while len(self._failures) > self.max_keys:
            self._failures.popitem(last=False)

    def take_back(self, key: str) -> None:
        """The newest failure was none."""
        times = self._failures.get(key)
        if times:
            times.pop()

    def forget_all(self) -> None:
        self._failures.clear()
