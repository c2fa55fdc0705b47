"""What a body says its answer must match, in the fields of OpenAI, vLLM and llama.cpp, as one grammar of the engine."""

import json
from typing import Any, Protocol

from retro_engine.generate.grammar import ANY_JSON, Grammar, schema
from retro_engine.serve.api_error import ApiError

GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}
OUTPUTS = ("json", "regex", "choice", "grammar", "json_object")
MAX_CHOICES = 4096
Json = dict[str, Any]


class Constrained(Protocol):
    """The fields that say it."""

    response_format: Json | None
    structured_outputs: Json | None
    guided_json: str | Json | None
    guided_regex: str | None
    guided_choice: list[str] | None
    guided_grammar: str | None
    grammar: str | None
    json_schema: Json | None


def grammar_of(body: Constrained) -> Grammar | None:
    """None where nothing is said. Raises ApiError naming the field that is wrong, or two that contradict each other."""
    found: list[tuple[str, Grammar]] = []
    if (
        body.response_format is not None
        and (form := format_grammar(body.response_format, "response_format")) is not None
    ):
        found.append(("response_format", form))
    if body.structured_outputs is not None:
        found.append(("structured_outputs", _structured(body.structured_outputs)))
    for name, kind in GUIDED.items():
        if (value := getattr(body, name)) is not None:
            found.append((name, _grammar(kind, value, name)))
    if body.grammar is not None:
        found.append(("grammar", _grammar("grammar", body.grammar, "grammar")))
    if body.json_schema is not None:
        found.append(("json_schema", schema(body.json_schema)))
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        raise ApiError(400, f"{names}: an answer matches one of them", found[1][0], "contradiction")
    return found[0][1] if found else None


def format_grammar(value: Json, param: str) -> Grammar | None:
    """Of OpenAI's `response_format`; llama.cpp puts a schema beside json_object."""
    kind = value.get("type")
    known = {"text": (), "json_object": ("schema",), "json_schema": ("json_schema",)}
    if not isinstance(kind, str) or kind not in known:
        raise ApiError(400, f"{param}.type is one of {', '.join(known)}", f"{param}.type")
    _refuse_others(value, ("type", *known[kind]), param)
    if kind == "text":
        return None
    if kind == "json_object":
        given = value.get("schema")
        return Grammar("json_schema", ANY_JSON) if given is None else _grammar("json", given, f"{param}.schema")
    about = value.get("json_schema")
    if not isinstance(about, dict) or not isinstance(about.get("schema"), dict):
        raise ApiError(400, f"{param}.json_schema.schema is not an object", f"{param}.json_schema.schema", "missing")
    _refuse_others(about, ("name", "description", "schema", "strict"), f"{param}.json_schema")
    return schema(about["schema"])


def _structured(value: Json) -> Grammar:
    """vLLM's newer field, which has one of its members."""
    _refuse_others(value, OUTPUTS, "structured_outputs")
    said = {name: part for name, part in value.items() if part not in (None, False)}
    if len(said) != 1:
        raise ApiError(400, f"structured_outputs has one of {', '.join(OUTPUTS)}", "structured_outputs")
    ((kind, part),) = said.items()
    if kind == "json_object":
        return Grammar("json_schema", ANY_JSON)
    return _grammar(kind, part, f"structured_outputs.{kind}")


def _grammar(kind: str, value: Any, param: str) -> Grammar:
    if kind == "json":
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise ApiError(400, f"{param} is not JSON: {error}", param) from None
        if not isinstance(value, dict):
            raise ApiError(400, f"{param} is not a schema: an object", param)
        return schema(value)
    if kind == "choice":
        if not isinstance(value, list) or not 1 <= len(value) <= MAX_CHOICES or not all(_is_text(one) for one in value):
            raise ApiError(400, f"{param} is a list of 1 to {MAX_CHOICES:,} texts, none of them empty", param)
        return Grammar("choice", json.dumps(value))
    if not _is_text(value):
        raise ApiError(400, f"{param} is not a text, or is empty", param)
    return Grammar("regex" if kind == "regex" else "grammar", value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _refuse_others(value: Json, known: tuple[str, ...], param: str) -> None:
    other = next((name for name in value if name not in known), None)
    if other is not None:
        raise ApiError(400, f"unknown field {param}.{other[:80]}", f"{param}.{other[:80]}", "unknown_field")
