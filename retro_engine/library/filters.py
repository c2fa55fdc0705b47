"""Which documents a search is of, by their metadata: comparisons of fields, joined by and / or (OpenAI's form of filters).

A document that lacks a field matches no comparison of it, not even `ne`. Text is compared with text, numbers with numbers,
true and false with each other: what is of another kind is not equal, and neither larger nor smaller.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from retro_engine.data.corpus import FieldValue
from retro_engine.errors import UsageError, nearest

MOST_FIELDS, MOST_NAME, MOST_TEXT = 16, 64, 512  # of a document's metadata: fields, characters of a name and of a text
MOST_DEPTH, MOST_PARTS, MOST_VALUES = 5, 64, 100  # of a filter: nesting, comparisons in it, values of `in`
ORDERS: dict[str, Callable[[Any, Any], bool]] = {
    "gt": operator.gt,
    "gte": operator.ge,
    "lt": operator.lt,
    "lte": operator.le,
}
COMPARISONS = ("eq", "ne", *ORDERS, "in", "nin")
JOINS = ("and", "or")


def check_metadata(fields: object) -> None:
    """Raises UsageError for what no document can have as metadata."""
    if not isinstance(fields, Mapping) or len(fields) > MOST_FIELDS:
        raise UsageError("the metadata cannot be used", f"it is an object of at most {MOST_FIELDS} fields")
    for name, value in fields.items():
        if not isinstance(name, str) or not 1 <= len(name) <= MOST_NAME or not name.isprintable():
            raise UsageError(f"the field {name!r:.80} cannot be used", f"its name has 1 to {MOST_NAME} characters")
        _check_value(name, value)


def _check_value(name: str, value: object) -> None:
    """Raises UsageError unless it is text, a number, true or false."""
    if isinstance(value, str) and len(value) <= MOST_TEXT and "\0" not in value:
        try:
            value.encode()
            return
        except UnicodeEncodeError:
            raise UsageError(f"the field {name!r} cannot be used", "it holds half of a surrogate pair") from None
    is_number = isinstance(value, bool | int | float) and abs(value) < 1 << 63  # neither NaN nor infinite
    if not is_number:
        kinds = f"a value is text of at most {MOST_TEXT} characters, a number, true or false"
        raise UsageError(f"the field {name!r} cannot be used", kinds)


@dataclass(frozen=True)
class Comparison:
    """Of one field with a value, or with several (`in`, `nin`)."""

    kind: str
    name: str
    values: tuple[FieldValue, ...]

    @property
    def names(self) -> frozenset[str]:
        return frozenset([self.name])

    @property
    def json(self) -> dict[str, Any]:
        return {
            "type": self.kind,
            "key": self.name,
            "value": list(self.values) if self.kind in ("in", "nin") else self.values[0],
        }

    def matches(self, fields: Mapping[str, FieldValue]) -> bool:
        if self.name not in fields:
            return False
        found = fields[self.name]
        if self.kind in ORDERS:
            return _kind(found) is _kind(self.values[0]) and ORDERS[self.kind](found, self.values[0])
        is_among = any(_kind(found) is _kind(value) and found == value for value in self.values)
        return is_among == (self.kind in ("eq", "in"))


@dataclass(frozen=True)
class Joined:
    """All of several filters, or any of them."""

    kind: str
    parts: tuple["Filter", ...]

    @property
    def names(self) -> frozenset[str]:
        return frozenset().union(*(part.names for part in self.parts))

    @property
    def json(self) -> dict[str, Any]:
        return {"type": self.kind, "filters": [part.json for part in self.parts]}

    def matches(self, fields: Mapping[str, FieldValue]) -> bool:
        return (all if self.kind == "and" else any)(part.matches(fields) for part in self.parts)


Filter = Comparison | Joined


def _kind(value: FieldValue) -> type:
    return str if isinstance(value, str) else bool if isinstance(value, bool) else float


def read_filter(value: object) -> Filter:
    """A filter from JSON: {"type": "eq", "key": NAME, "value": VALUE} or {"type": "and", "filters": [...]}.

    Raises UsageError saying what is wrong.
    """
    left = [MOST_PARTS]
    return _read(value, MOST_DEPTH, left)


def _read(value: object, depth: int, left: list[int]) -> Filter:
    if not isinstance(value, Mapping):
        raise UsageError(f"the filter {value!r:.80} cannot be used", "it is an object with type, key and value")
    kind = value.get("type")
    if kind in JOINS:
        _check_keys(value, ("type", "filters"))
        parts = value["filters"]
        if not isinstance(parts, list) or not parts or not depth:
            raise UsageError(f"the filter {kind} cannot be used", f"it has filters, at most {MOST_DEPTH} deep")
        return Joined(kind, tuple(_read(part, depth - 1, left) for part in parts))
    if kind not in COMPARISONS:
        known = [*COMPARISONS, *JOINS]
        raise UsageError(f"the filter type {kind!r:.80} does not exist", nearest(str(kind), known), ", ".join(known))
    _check_keys(value, ("type", "key", "value"))
    left[0] -= 1
    if left[0] < 0:
        raise UsageError("the filter has too many comparisons", f"at most {MOST_PARTS} are taken")
    return _comparison(str(kind), value["key"], value["value"])


def _comparison(kind: str, name: object, value: object) -> Comparison:
    if not isinstance(name, str) or not 1 <= len(name) <= MOST_NAME:
        raise UsageError(f"the filter's key {name!r:.80} cannot be used", "it is the name of a field")
    is_list = kind in ("in", "nin")
    values: Sequence[Any] = value if is_list and isinstance(value, list) else [value]
    if is_list and (not isinstance(value, list) or not 1 <= len(value) <= MOST_VALUES):
        raise UsageError(f"the filter {kind} of {name!r} cannot be used", f"its value lists 1 to {MOST_VALUES} values")
    for one in values:
        _check_value(name, one)
    if kind in ORDERS and isinstance(value, bool):
        raise UsageError(f"the filter {kind} of {name!r} cannot be used", "true and false have no order", "eq or ne")
    return Comparison(kind, name, tuple(values))


def _check_keys(value: Mapping[Any, Any], names: Sequence[str]) -> None:
    wrong = sorted(map(str, value.keys() ^ set(names)))
    if wrong:
        raise UsageError(f"the filter {value!r:.80} cannot be used", f"it has {', '.join(names)}: see {wrong[0]:.80}")


def where(pairs: Sequence[str]) -> Filter | None:
    """A filter from a command line's KEY=VALUE, all of which must hold; a value that is a number or true or false is
    compared as that and as text. Raises UsageError.
    """
    parts: list[Filter] = []
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"--where {pair} cannot be used", "it says which value a field has", "--where KEY=VALUE")
        kinds = [text] if isinstance(scalar(text), str) else [text, scalar(text)]
        parts.append(_comparison("in", name, kinds))
    return None if not parts else parts[0] if len(parts) == 1 else Joined("and", tuple(parts))


def scalar(text: str) -> FieldValue:
    """A value of a command line: true, false, a number, else text."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        if text.isascii() and "_" not in text and abs(number) < 1 << 63:  # 1_000, nan and inf are text
            return number
    return text
