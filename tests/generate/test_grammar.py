"""Answers that match a schema or a grammar: by any tokenizer, sampled, drafted, several at once; and grammars that are none."""

import contextlib
import json
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import small_model
from tokenizer_helpers import KINDS, chatml

from retro_engine.data.store import Store
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import MissingExtraError, UsageError
from retro_engine.generate.engine import Engine
from retro_engine.generate.generator import Generator
from retro_engine.generate.grammar import ANY_JSON, UNFINISHED, WHITESPACE, Grammar, Grammars, schema
from retro_engine.generate.request import Generation, Request
from retro_engine.generate.sampling import Sampling
from retro_engine.retrieval.search import Retriever

pytest.importorskip("llguidance", reason="llguidance is not installed")
M = 16
PUBLIC = os.environ.get("RETRO_SCHEMAS", "")
SCHEMAS = 1000 if os.environ.get("RETRO_CAMPAIGN") else 25
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def generator(small_store: Store) -> Generator:
    model = small_model(vocab_size=small_store.vocab_size, chunk_size=M, encoder_seq_length=64, seed=3)
    return Generator(model, small_store.tokenizer, Retriever([small_store]))


@pytest.fixture(scope="module")
def engine(generator: Generator) -> Iterator[Engine]:
    with Engine(generator, max_batch=4) as engine:
        yield engine


def sampled(seed: int, **more: Any) -> Sampling:
    return Sampling(greedy=False, temperature=1.0, seed=seed, **more)


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """Of the kinds that clients send; whatever can be long is bounded, so that every answer ends."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern", "anyOf"]
    kind = rng.choice(kinds if depth > 2 else [*kinds, "object", "object", "array", "array"])
    if kind == "string":
        return {"type": "string", "minLength": rng.randint(0, 2), "maxLength": rng.randint(2, 6)}
    if kind == "integer":
        low = rng.randint(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 1000)}
    if kind == "number":
        return {"type": "number", "minimum": 0, "maximum": 10, "multipleOf": 0.5}
    if kind == "enum":
        return {"enum": rng.sample(["a", "é", '"', 1, 2.5, None, True, "\n"], 3)}
    if kind == "const":
        return {"const": rng.choice(["x", 7, {"k": [1]}, None])}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(["^[a-c]{1,4}$", "^\\d{4}-\\d{2}$", "^(yes|no)$"])}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth + 1), random_schema(rng, depth + 1)]}
    if kind == "array":
        return {"type": "array", "items": random_schema(rng, depth + 1), "minItems": rng.randint(0, 1), "maxItems": 2}
    if kind != "object":
        return {"type": kind}
    names = rng.sample(["a", "b c", "é", "name", '"', "x-y"], rng.randint(0, 3))
    members = {name: random_schema(rng, depth + 1) for name in names}
    required = rng.sample(names, rng.randint(0, len(names)))
    return {"type": "object", "properties": members, "required": required, "additionalProperties": False}


def test_every_answer_to_a_schema_is_valid(generator: Generator, engine: Engine) -> None:
    jsonschema_rs = pytest.importorskip("jsonschema_rs")
    rng = random.Random(7)
    asked = [random_schema(rng) for _ in range(SCHEMAS)]
    for first in range(0, len(asked), 8):
        part = asked[first : first + 8]
        streams = [
            engine.submit(Request("river", 1000, sampling=sampled(n, min_p=0.001), neighbors=[], grammar=schema(one)))
            for n, one in enumerate(part)
        ]
        for one, stream in zip(part, streams):
            out = stream.result()
            assert out.finish_reason == "stop", (one, out.text)
            value = json.loads(out.text)
            assert jsonschema_rs.validator_for(one).is_valid(value), (one, out.text)
            assert out.notes == []


def closing(tokenizer: Tokenizer) -> tuple[tuple[int, float], ...]:
    """Biases by which a model without training ends what it has begun."""
    return tuple((token, 6.0) for text in ('"', "}", "]") for token in tokenizer.encode(text)[-1:])


def held(text: str) -> float:
    """A number of JSON, also one that is larger than a double holds."""
    return min(max(float(text), -sys.float_info.max), sys.float_info.max)


@pytest.mark.skipif(not PUBLIC, reason="RETRO_SCHEMAS=FOLDER names no JSON schemas to answer")
def test_answers_to_public_schemas_are_valid(
    generator: Generator, engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    """A thousand of the files under a folder, as they were found. What is refused says why; what is cut off says so."""
    jsonschema_rs = pytest.importorskip("jsonschema_rs")
    paths = sorted(Path(PUBLIC).rglob("*.json"))
    counts: Counter[str] = Counter()
    wrong = []
    sampling = sampled(3, min_p=0.001, logit_bias=closing(generator.tokenizer))
    for path in random.Random(7).sample(paths, min(len(paths), 1000)):
        asked = json.loads(path.read_text())
        request = Request("river", 1500, sampling=sampling, neighbors=[], grammar=schema(asked))
        try:
            validator = jsonschema_rs.validator_for(asked)
        except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError, ValueError):
            counts["no schema, says the validator"] += 1
            continue
        try:
            out = engine.submit(request).result()
        except UsageError as error:
            counts["refused: " + re.sub(r"[\"'`].*|\d+", "", f"{error.what}: {error.why}")[:70]] += 1
            continue
        if out.finish_reason != "stop":
            assert out.notes == [UNFINISHED]
            counts["cut off, and said"] += 1
        elif validator.is_valid(json.loads(out.text, parse_float=held)):
            counts["valid"] += 1
        else:
            wrong.append((path, out.text))
    with capsys.disabled():
        said = "; ".join(f"{number} {what}" for what, number in counts.most_common())
        print(f"\npublic schemas: {len(wrong)} not valid; {said}")
    assert counts["valid"] and not wrong, wrong[:3]


def test_alone_in_a_batch_drafted_and_not(small_store: Store) -> None:
    """With neighbors and without; greedy and sampled: the tokens are those of the sequence alone."""
    model = small_model(vocab_size=small_store.vocab_size, chunk_size=M, encoder_seq_length=64, seed=3)
    drafting, plain = (
        Generator(model, small_store.tokenizer, Retriever([small_store]), drafts=d) for d in (True, False)
    )
    grammar = Grammar("regex", "((river|stone|amber) ){30}")
    asked = [
        Request("river", 200, grammar=grammar),
        Request("Document doc7.", 200, grammar=schema(PERSON), sampling=sampled(4)),
        Request("amber lantern", 40),
        Request("tide", 200, grammar=grammar, neighbors=["river stone river stone river"], sampling=sampled(5)),
    ]
    alone = [plain.generate_all([request])[0] for request in asked]
    assert [out.tokens for out in drafting.generate_all(asked)] == [out.tokens for out in alone]
    assert [drafting.generate_all([request])[0].tokens for request in asked] == [out.tokens for out in alone]
    assert re.fullmatch(grammar.text, alone[0].text)
    assert json.loads(alone[1].text).keys() == {"name", "age", "tags"}
    assert [out.finish_reason for out in alone] == ["stop", "stop", "length", "stop"]


@pytest.mark.parametrize("make", [chatml, *(make for kind, make in KINDS.items() if kind != "bert")])
def test_any_tokenizer(make: Callable[[], Tokenizer]) -> None:
    """What is said is the text that the tokens decode to, also where a tokenizer puts a space before a text (BERT's before
    every word, so it can say next to nothing).
    """
    tokenizer = make()
    torch.manual_seed(0)
    model = small_model(vocab_size=tokenizer.vocab_size, chunk_size=M, encoder_seq_length=64, seed=1, retrieval=False)
    generator = Generator(model, tokenizer)
    for grammar in (Grammar("regex", "(The )?[Tt]he castle was"), Grammar("choice", '["The castle", "user"]')):
        try:
            out = generator.generate_all([Request("The castle", 100, sampling=sampled(1), grammar=grammar)])[0]
        except UsageError as error:
            pytest.fail(f"{grammar}: {error}")
        wanted = grammar.text if grammar.kind == "regex" else "The castle|user"
        assert re.fullmatch(wanted, out.text), (out.text, out.tokens)


def complete(generator: Generator, grammar: Grammar, length: int = 60, **sampling: Any) -> Generation:
    return generator.generate_all(
        [Request("river", length, neighbors=[], grammar=grammar, sampling=Sampling(**sampling))]
    )[0]


def test_what_does_not_end_in_time_is_said(generator: Generator) -> None:
    out = complete(generator, schema({"type": "string", "minLength": 500}), 20)
    assert (out.finish_reason, out.notes) == ("length", [UNFINISHED])
    with Engine(generator) as engine:
        stream = engine.submit(Request("river", 20, neighbors=[], grammar=schema({"type": "string", "minLength": 500})))
        assert [note for event in stream for note in event.notes] == [UNFINISHED]
    deep: dict[str, Any] = {"type": "object", "properties": {"n": {"$ref": "#"}}, "required": ["n"]}
    assert complete(generator, schema(deep), 30).notes == [UNFINISHED], "it never ends"
    enough = complete(generator, Grammar("regex", "a{3,}"), 20, logit_bias=((generator.tokenizer.eod_id, -100.0),))
    assert (enough.text, enough.finish_reason, enough.notes) == ("a" * len(enough.text), "length", [])


def test_a_time_has_no_leap_second(generator: Generator) -> None:
    """Validators take none but at midnight; what only looks like a schema is left as it is."""
    jsonschema_rs = pytest.importorskip("jsonschema_rs")
    grammar = schema({"type": "string", "format": "date-time"})
    tokens = {text: generator.tokenizer.encode(text)[-1] for text in "6Z"}
    sampling = {"greedy": False, "logit_bias": tuple((token, 50.0) for token in tokens.values())}
    for seed in range(5):
        out = complete(generator, grammar, 100, seed=seed, **sampling)
        assert ":60" not in out.text and jsonschema_rs.validator_for(
            {"type": "string", "format": "date-time"}, validate_formats=True
        ).is_valid(json.loads(out.text)), out.text
    data = {"const": {"format": "time"}}
    assert json.loads(schema(data).text) == data
    own = {"type": "string", "format": "time", "pattern": "^10"}
    assert json.loads(schema(own).text) == own


def test_a_recursive_schema(generator: Generator) -> None:
    tree: dict[str, Any] = {
        "type": "object",
        "properties": {"v": {"enum": [0, 1]}, "kids": {"type": "array", "items": {"$ref": "#"}, "maxItems": 1}},
        "required": ["v"],
        "additionalProperties": False,
    }
    for seed in range(3):
        out = complete(generator, schema(tree), 400, greedy=False, seed=seed)
        if out.finish_reason == "stop":
            assert set(json.loads(out.text)) <= {"v", "kids"}
        else:
            assert out.notes == [UNFINISHED]


def test_spaces_do_not_go_on_for_ever(generator: Generator) -> None:
    tokenizer = generator.tokenizer
    spaces = tuple((i, 100.0) for i, text in enumerate(tokenizer.pieces(range(tokenizer.vocab_size))) if text.isspace())
    out = complete(generator, schema({"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}), 400, logit_bias=spaces)  # fmt: skip
    assert (out.finish_reason, json.loads(out.text)) == ("stop", {"a": 1})
    assert max(map(len, re.findall(r"\s+", out.text))) <= 33
    assert WHITESPACE.endswith("{1,33}")


def test_a_least_length_does_not_leave_nothing(generator: Generator) -> None:
    out = complete(
        generator, Grammar("choice", '["a"]'), 20, min_tokens=10, logit_bias=((generator.tokenizer.eod_id, -100.0),)
    )
    assert (out.text, out.finish_reason) == ("a", "stop")
    assert complete(generator, Grammar("regex", "(ab)?"), 20, min_tokens=1).text == "ab"


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("grammar", "start: start"), Grammar("grammar", "start: a\na: b\nb: a"), Grammar("grammar", "nonsense"),
        Grammar("grammar", ""), Grammar("grammar", "start: /[/"), Grammar("grammar", "root ::= ["), Grammar("regex", "("),
        Grammar("grammar", 'root ::= other'), schema(False), schema({"type": "strange"}), schema({"type": "string", "pattern": "("}),
        schema({"not": {}}), schema({"$ref": "http://example.org/x"}), schema({"$ref": "#/nowhere"}), schema({"allOf": [{"type": "string"}, {"type": "integer"}]}),
        schema({"enum": []}), schema({"type": "array", "uniqueItems": True}), schema([]), schema("x"), Grammar("json_schema", "{"),
    ],
    ids=lambda one: one.text[:24],
)  # fmt: skip
def test_what_is_no_grammar(generator: Generator, grammar: Grammar) -> None:
    with pytest.raises(UsageError, match="the grammar"):
        generator.open(Request("river", 4, grammar=grammar))


def test_choices_are_taken_as_they_are_written(generator: Generator) -> None:
    for text in ("a.b*c", "(x|y)[z]{2}^$+?", 'back\\slash "q"', "line\nbreak/", "é 城"):
        assert complete(generator, Grammar("choice", json.dumps([text]))).text == text


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("regex", "((a{1,100}){1,100}){1,100}"), Grammar("regex", "(.*a){25}.{25}"), Grammar("grammar", 'start: "a" start'),
        Grammar("grammar", "start: start start | "), schema({"type": "array", "minItems": 100_000, "items": {"type": "integer"}}),
        schema({"anyOf": [{"type": "object", "properties": {f"p{n}": {"type": "string"}}} for n in range(300)]}),
        Grammar("choice", json.dumps([f"choice {n}" for n in range(2000)])), Grammar("json_schema", ANY_JSON),
    ],
    ids=lambda one: one.text[:24],
)  # fmt: skip
def test_hard_grammars_end_soon(generator: Generator, grammar: Grammar) -> None:
    """Refused, or followed; not waited for."""
    start = time.process_time()
    with contextlib.suppress(UsageError):
        assert complete(generator, grammar, 12).finish_reason in ("stop", "length")
    assert time.process_time() - start < 5


def test_without_the_extra(small_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtraError, match=r"retro-engine\[grammar\]"):
        Grammars(small_store.tokenizer).matcher(Grammar("regex", "a"))


def test_compiled_grammars_are_kept_and_forgotten(small_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from retro_engine.generate import grammar as module

    monkeypatch.setattr(module, "MAX_COMPILED", 2)
    grammars, made = Grammars(small_store.tokenizer), []
    compile_one = grammars._compile
    monkeypatch.setattr(grammars, "_compile", lambda one: made.append(one.text) or compile_one(one))
    for text in ("a", "b", "a", "c", "a", "b"):
        matcher = grammars.matcher(Grammar("regex", text))
        matcher.accept(small_store.tokenizer.encode(text)[0])  # a copy: the next begins anew
        assert matcher.is_over
    assert made == ["a", "b", "c", "b"]
