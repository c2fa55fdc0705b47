"""The quality gate of an evaluation: LEFT < > <= >= RIGHT, as `bpb_on>bpb_off`, must not be true."""

import re
from collections.abc import Iterable
from typing import Any

from retro_engine.errors import GateError, UsageError

FIGURES = {"bpb": "bits_per_byte", "loss": "loss", "perplexity": "perplexity"}


def check_readable(expression: str, modes: Iterable[str]) -> None:
    """Raises UsageError where `check_gate` would, before anything is evaluated: `modes` are what there will be figures of."""
    _read(expression, {f"{short}_{mode}": 0.0 for mode in modes for short in FIGURES})


def check_gate(expression: str, summary: dict[str, dict[str, Any]]) -> None:
    """Raises GateError where the expression is true of bpb_MODE, loss_MODE, perplexity_MODE and numbers."""
    names = {f"{short}_{mode}": s[key] for mode, s in summary.items() for short, key in FIGURES.items()}
    left, compared, right = _read(expression, names)
    if {"<": left < right, ">": left > right, "<=": left <= right, ">=": left >= right}[compared]:
        raise GateError(f"--fail-if {expression} is true", "", "see the figures above")


def _read(expression: str, names: dict[str, float]) -> tuple[float, str, float]:
    match = re.fullmatch(r"\s*([\w.]+)\s*(<=|>=|<|>)\s*([\w.]+)\s*", expression)
    try:
        if match is None:
            raise ValueError(expression)
        left, right = (float(str(names.get(name, name))) for name in (match[1], match[3]))
    except ValueError:
        raise UsageError(
            f"--fail-if {expression!r} cannot be read", f"names: {', '.join(names)}", "like 'bpb_on>bpb_off'"
        ) from None
    return left, match[2], right
