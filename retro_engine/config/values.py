"""What one setting may be: said on its field (fields.py), checked by one loop, with the value, the rule and the fix."""

import math
from collections.abc import Callable
from dataclasses import field, fields, is_dataclass
from functools import partial
from typing import Any

from retro_engine.errors import UsageError, nearest

MANY = 2**31
_CHECK = "check"  # of a field's metadata: called with the setting's key and its value, raises UsageError


def number(default: float | None, low: float, high: float = MANY) -> Any:
    """A field from `low` to `high`; None, where the type has it, is always allowed."""
    return _field(default, partial(_check_bounds, low=low, high=high))


def choice(*allowed: str | None) -> Any:
    """A field that is one of `allowed`; the first is the default."""
    return _field(allowed[0], partial(_check_choice, allowed=allowed))


def count_or_share(default: float | None, low: int) -> Any:
    """A field that is a count from `low` on, or with a point a share: of one more than nothing where `low` is 1."""
    return _field(default, partial(_check_count_or_share, low=low))


def only(default: Any) -> Any:
    """A field that another program has, and this one at its default alone."""

    def check(key: str, value: Any) -> None:
        require(value == default, key, value, "this version has only the default", f"{key}={default}")

    return _field(default, check)


def checked(default: Any, holds: Callable[[Any], bool], rule: str, fix: str = "") -> Any:
    """A field with a rule of its own."""

    def check(key: str, value: Any) -> None:
        require(holds(value), key, repr(value) if isinstance(value, str) else value, rule, fix)

    return _field(default, check)


def shares(default: str) -> Any:
    """A field that `splits` reads."""
    return _field(default, lambda _, value: splits(value))


def check_fields(node: Any, prefix: str = "") -> None:
    """Raise UsageError for the first field of a (nested) dataclass that is not what it may be."""
    for item in fields(node):
        key, value = f"{prefix}{item.name}", getattr(node, item.name)
        if is_dataclass(value):
            check_fields(value, f"{key}.")
        elif _CHECK in item.metadata:
            item.metadata[_CHECK](key, value)


def allowed_of(item: Any) -> tuple[str | None, ...]:
    """Of a dataclass' field: what it is one of; empty where it is no choice."""
    check = item.metadata.get(_CHECK)
    return tuple(check.keywords.get("allowed", ())) if isinstance(check, partial) else ()


def require(condition: bool, key: str, value: Any, rule: str, fix: str = "") -> None:
    """Raise UsageError for a setting where a condition does not hold."""
    if not condition:
        raise UsageError(f"{key}={value} cannot be used", rule, fix)


def splits(text: str) -> tuple[float, float, float]:
    """'98,2,0' -> shares of train, validation and test that sum to 1."""
    try:
        parts = [float(part) for part in text.strip("'\"").split(",")]
    except ValueError:
        parts = []
    good = len(parts) == 3 and min(parts) >= 0 and parts[0] > 0 and math.isfinite(sum(parts))
    require(good, "model.data.splits_string", text, "three shares: train, validation, test", "like '98,2,0'")
    return parts[0] / sum(parts), parts[1] / sum(parts), parts[2] / sum(parts)


def _field(default: Any, check: Callable[[str, Any], object]) -> Any:
    metadata = {_CHECK: check}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def _check_bounds(key: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        rule = f"must be at least {low:g}" if value < low else f"must be at most {high:g}"
        require(False, key, value, rule if value == value else "must be a number")


def _check_choice(key: str, value: str | None, allowed: tuple[str | None, ...]) -> None:
    if value not in allowed:
        names = [str(one) for one in allowed]
        require(False, key, value, f"one of {', '.join(names)}", nearest(str(value), names))


def _check_count_or_share(key: str, value: float | None, low: int) -> None:
    if not isinstance(value, float):
        _check_bounds(key, value, low, MANY)
    elif not (low == 0 or value > 0) or not 0 <= value <= 1:
        fix = f"{key}={max(1, int(value))}" if math.isfinite(value) else ""
        require(False, key, value, "with a point it is a share, at most 1.0", fix)
