"""A process that renders one chat template, bounded by the operating system; `generate.chat_template` starts it.

A template is a program of the model's publisher: jinja2's sandbox keeps it from Python, the limits of this process from
memory, and an alarm ends the process where it takes too long. Reads lines of JSON from standard input, first {"template",
"max_bytes", "seconds"}, then variables; answers these with a line {"text"} or {"error"}. Ends with its input.
"""

import json
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 512 << 20


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` marks what the assistant says, for training: its body is rendered."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 reads it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:  # fmt: skip
    """jinja2's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(format: str) -> str:
    """The parameter is named as transformers names it."""
    return datetime.now().strftime(format)


def renderer(template: str) -> Callable[[dict[str, Any]], str]:
    """What renders the template with variables, as transformers renders it. Raises jinja2's TemplateError."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    compiled = environment.from_string(template)
    return compiled.render


def answer(render: Callable[[dict[str, Any]], str], variables: dict[str, Any], max_bytes: int) -> dict[str, str]:
    """{"text"} or {"error"}."""
    try:
        text = render(variables)
        if len(text.encode()) > max_bytes:
            return {"error": f"it writes more than {max_bytes:,} bytes"}
    except Exception as error:  # a template is a program: it can raise anything, and only itself is to blame
        return {"error": _why(error)}
    return {"text": text}


def _why(error: Exception) -> str:
    """What a template did, on one line."""
    if isinstance(error, MemoryError):
        return f"it needs more than {MEMORY_BYTES >> 20} MiB of memory"
    if isinstance(error, RecursionError):
        return "it calls itself without end, or its blocks are too deep"
    if isinstance(error, UnicodeEncodeError):
        return "it writes half a character (a lone surrogate)"
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said}"[:500] if said else type(error).__name__


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    first = json.loads(sys.stdin.readline())
    render, error = None, ""
    for number, line in enumerate(sys.stdin):
        signal.setitimer(signal.ITIMER_REAL, first["seconds"])  # unhandled: it ends the process, whatever it does
        if number == 0:
            try:
                render = renderer(first["template"])
            except Exception as problem:  # constants are computed here: the same program
                error = _why(problem)
        found = {"error": error} if render is None else answer(render, json.loads(line), first["max_bytes"])
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main()
