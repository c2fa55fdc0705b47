"""What every setting means, for people: type, default, unit and one line, read from the comments of fields.py.

A field's comment stands behind it or above it; a unit in brackets ends it. What a field may be is said by its check.
"""

import ast
import inspect
import io
import tokenize
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from retro_engine.config import fields as fields_module
from retro_engine.config.fields import Config
from retro_engine.config.values import allowed_of


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One key of `retro config keys`."""

    key: str
    type: str  # as it is annotated, or what it is one of
    default: Any
    unit: str  # of a number; "" = none
    meaning: str

    def __str__(self) -> str:
        unit = f", {self.unit}" if self.unit else ""
        default = str(self.default).replace("\n", "\\n")
        return f"{self.key} ({self.type}, default {default}{unit}): {self.meaning}"


def settings() -> list[Setting]:
    """All of them, in the order of the fields."""
    return _settings(Config(), "", _comments(inspect.getsource(fields_module)))


def _settings(node: Any, prefix: str, comments: dict[tuple[str, str], str]) -> list[Setting]:
    found: list[Setting] = []
    classes = [kind.__name__ for kind in type(node).__mro__]
    for item in fields(node):
        key, value = f"{prefix}{item.name}", getattr(node, item.name)
        if is_dataclass(value):
            found += _settings(value, f"{key}.", comments)
            continue
        text = next((comments[name, item.name] for name in classes if (name, item.name) in comments), "")
        allowed = allowed_of(item)
        kind = item.type.__name__ if isinstance(item.type, type) else str(item.type)
        shown = " | ".join(map(str, allowed)) if allowed else kind
        meaning, unit = _apart(text)
        found.append(Setting(key=key, type=shown, default=value, unit=unit, meaning=meaning))
    return found


def _apart(comment: str) -> tuple[str, str]:
    """Its meaning, and the unit in brackets at its end."""
    if not comment.endswith("]"):
        return comment, ""
    meaning, _, unit = comment[:-1].rpartition(" [")
    return meaning, unit


def _comments(source: str) -> dict[tuple[str, str], str]:
    """(class, field) -> its comment: behind it, or the lines above it."""
    behind: dict[int, str] = {}
    alone: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            is_alone = token.line.lstrip().startswith("#")
            (alone if is_alone else behind)[token.start[0]] = token.string.removeprefix("#").strip()
    found = {}
    for kind in ast.parse(source).body:
        for node in kind.body if isinstance(kind, ast.ClassDef) else []:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                assert isinstance(kind, ast.ClassDef)
                lines = list[str]()
                above = node.lineno - 1
                while above in alone:
                    lines.insert(0, alone[above])
                    above -= 1
                lines += [behind[line] for line in range(node.lineno, (node.end_lineno or 0) + 1) if line in behind]
                found[kind.name, node.target.id] = " ".join(lines)
    return found
