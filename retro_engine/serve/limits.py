"""The bodies of requests: read within limits, strict JSON, the fields of a form; what is wrong is named before any work."""

import asyncio
import json
import re
from collections.abc import AsyncGenerator
from typing import Annotated, Any, TypeVar, Union

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from starlette.requests import ClientDisconnect, Request

from retro_engine.serve.api_error import ApiError
from retro_engine.serve.bounds import Limits

STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)  # one that does not end goes to the end
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
MAX_VALUES = 1 << 19  # of one body: token ids


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


async def read_chunks(request: Request, max_bytes: int, progress_s: float) -> AsyncGenerator[bytes, None]:
    """The body as it arrives. Raises ApiError 413 for too much, 408 for none in `progress_s`, 415 for a compressed one."""
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise ApiError(
            415, f"content-encoding {coding[:40]!r} is not taken: send the body as it is", "content-encoding"
        )
    # The connection stays open, and connection.py reads on for a while: a client that still sends would see a reset
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
