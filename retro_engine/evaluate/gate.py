"""The quality gate of an evaluation: LEFT < > <= >= RIGHT, as `bpb_on>bpb_off`, must not be true."""

import re
from typing import Any

from retro_engine.errors import GateError, UsageError

FIGURES = {"bpb": "bits_per_byte", "loss": "loss", "perplexity": "perplexity"}


def check_gate(expression: str, summary: dict[str, dict[str, Any]]) -> None:
    """Raises GateError where the expression is true of bpb_MODE, loss_MODE, perplexity_MODE and numbers."""
    names = {f"{short}_{mode}": s[key] for mode, s in summary.items() for short, key in FIGURES.items()}
    match = re.fullmatch(r"\s*([\w.]+)\s*(<=|>=|<|>)\s*([\w.]+)\s*", expression)
    try:
        if match is None:
            raise ValueError(expression)
        left, right = (float(str(names.get(name, name))) for name in (match[1], match[3]))
    except ValueError:
        raise UsageError(
            f"--fail-if {expression!r} cannot be read", f"names: {', '.join(names)}", "like 'bpb_on>bpb_off'"
        ) from None
    if {"<": left < right, ">": left > right, "<=": left <= right, ">=": left >= right}[match[2]]:
        raise GateError(f"--fail-if {expression} is true", "", "see the figures above")
