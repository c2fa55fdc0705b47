"""JSON that is refused before it is used."""

import contextlib
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from retro_engine.serve.api_error import ApiError
from retro_engine.serve.limits import Strict, parse, parse_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=40, deadline=None)
@given(JSON)
def test_good_json_passes(value: object) -> None:
    raw = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    try:
        expected = json.loads(raw.decode())
    except UnicodeDecodeError:
        with pytest.raises(ApiError):
            parse_json(raw, 64)
        return
    assert parse_json(raw, 64) == expected


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_json_or_a_refusal(raw: bytes) -> None:
    with contextlib.suppress(ApiError):  # anything else fails the test
        parse_json(raw, 32)


def test_depth_is_counted_in_lists_of_numbers_too() -> None:
    for depth, is_good in ((32, True), (33, False), (5000, False), (100_000, False)):
        for open_, close in (("[", "]"), ('{"a":', "}"), ("[1,", "]")):
            raw = (open_ * depth + "1" + close * depth).encode()
            if is_good:
                parse_json(raw, 32)
            else:
                with pytest.raises(ApiError, match="nested|not JSON"):
                    parse_json(raw, 32)


@pytest.mark.parametrize("raw", [b'"\\ud800"', b'[1, "\\udfff"]', b'{"a": {"\\ud800": 1}}', b'"\xed\xa0\x80"', b"NaN", b"[Infinity]", b"-Infinity", b"\xef\xbb\xbf", b"{}{}", b"01", b"{'a': 1}"])  # fmt: skip
def test_what_is_not_strict(raw: bytes) -> None:
    with pytest.raises(ApiError):
        parse_json(raw, 32)


def test_of_two_members_of_one_name_none_is_dropped() -> None:
    for raw in (b'{"a": 1, "a": 1}', b'[{"b": 1}, {"c": {"x": 1, "a": 2, "\\u0061": 3}}]'):
        with pytest.raises(ApiError, match="'a' is there twice") as caught:
            parse_json(raw, 32)
        assert caught.value.param == "a"
    assert parse_json(b'{"a": {"a": 1}, "b": {"a": 1}}', 32) == {"a": {"a": 1}, "b": {"a": 1}}
    start = time.process_time()
    with pytest.raises(ApiError, match="twice"):
        parse_json(b"{" + b"".join(b'"%d":1,' % n for n in range(30_000)) + b'"29999":1}', 32)
    assert time.process_time() - start < 0.2


def test_a_byte_order_mark_and_a_number_of_many_digits() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": [1]}', 32) == {"a": [1]}
    with pytest.raises(ApiError) as caught:
        parse_json(b"[" + b"9" * 5000 + b"]", 32)
    assert caught.value.message == "the body holds a number of thousands of digits"


class Body(Strict):
    number: int = Field(1, ge=1, le=5)
    either: str | list[int] = ""


def test_the_field_that_is_wrong_is_named() -> None:
    for value, param in (
        ({"number": 9}, "number"), ({"number": "3"}, "number"), ({"number": True}, "number"), ({"number": 2.0}, "number"),
        ({"either": [1, "x"]}, "either.1"), ({"either": {"str": 1}}, "either"),
        ({"either": {"list[int]": {"0": 1}}}, "either"), ({"unknown": 1}, "unknown"), ([], None), (None, None),
    ):  # fmt: skip
        with pytest.raises(ApiError) as caught:
            parse(Body, value)
        assert caught.value.param == param, value
    assert parse(Body, {"number": 3, "either": [1]}).either == [1]


@pytest.mark.parametrize(
    "raw",
    [
        b"[" + b"[]," * 349_000 + b"[]]", b"[" * 500_000, b'{"a":' * 200_000, b"[" + b"{}," * 300_000 + b"1]",
        b"{" + b",".join(b'"%d":1' % n for n in range(90_000)) + b"}", b'["\\"' * 200_000, b'"' + b'\\"' * 500_000,
        b"[" + b"1," * 530_000 + b"1]",
    ],
)  # fmt: skip
def test_what_is_large_and_nested_is_refused_for_next_to_nothing(raw: bytes) -> None:
    """From the bytes: nothing is made of it first."""
    start = time.process_time()
    with pytest.raises(ApiError) as caught:
        parse_json(raw, 32)
    assert caught.value.status == 400
    assert time.process_time() - start < 0.2


def test_what_looks_nested_inside_of_a_text_is_a_text() -> None:
    for text in ("[" * 100, '"{' * 100, '\\"[' * 100, "\\" * 7 + "[" * 40, ":" * 40_000):
        value = {"a": [text, {text: text}]}
        assert parse_json(json.dumps(value).encode(), 32) == value
    depth = lambda n: b"[" * n + b"]" * n  # noqa: E731
    assert parse_json(depth(32), 32)
    with pytest.raises(ApiError, match="nested more than 32 deep"):
        parse_json(depth(33), 32)
    for text in (r"\ud83d\ude00", r"\\ud800", r"\\\\ud800"):
        assert parse_json(b'["%s"]' % text.encode(), 32) == json.loads(f'["{text}"]')
    for text in (r"\ud800", r"\ude00\ud83d", r"\\\ud83d"):
        with pytest.raises(ApiError, match="half of a surrogate pair"):
            parse_json(b'["%s"]' % text.encode(), 32)
