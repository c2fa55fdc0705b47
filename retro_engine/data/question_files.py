"""Files of questions with answers, in the layouts that people have, to `Question`s; a bad row is set aside with its place.

JSON lines, a JSON array, one object, TSV, CSV or Parquet, compressed or not, of rows like
{"question", "answer" or "answers", "neighbors" (texts) or "documents" (ids of the store)}, or
{"messages": [{"role", "content"}, ...]} whose last is the assistant's. Also SQuAD's: {"data": [{"paragraphs": ...}]} and
Hugging Face's flat rows; DPR's "positive_ctxs", FiD's and NeMo's "ctxs", Atlas' "passages"; "query" for the question, "target"
for the answer. Passages with titles become NeMo's "title: ..., source: ...". A null, which tables have for what a row lacks, is
as if the key were not there.
"""

import ast
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retro_engine.data.identity import ID_KEYS, is_missing
from retro_engine.data.inputs import SetAside, check_file, shown
from retro_engine.data.rows import Row, RowReader
from retro_engine.data.streams import Unusable
from retro_engine.errors import MissingInputError, StoreError

TEMPLATE = "question: {question}\nanswer:"  # NeMo's
MAX_ROW_BYTES = 64 << 20
MAX_LIST = 1 << 20  # characters of a list in a table's cell
SAID = 20  # rows set aside that are named one by one
QUESTIONS = ("question", "query")  # the first that a row has
ANSWERS = ("target", "answer", "answers")  # all that it has: the first one is learned
PASSAGES = ("neighbors", "positive_ctxs", "ctxs", "passages", "context")  # the first that it has
DOCUMENTS = ("documents", "passage")
COLUMNS = (*ID_KEYS, *QUESTIONS, *ANSWERS, *PASSAGES, *DOCUMENTS, "messages")


@dataclass(frozen=True)
class Question:
    """One row: the prompt as the model reads it, what retrieval asks with, and what the row says."""

    id: str
    prompt: str
    query: str
    answers: tuple[str, ...]
    neighbors: tuple[str, ...]
    documents: tuple[str, ...]
    line: int


def read_questions(
    path: str | Path, template: str = TEMPLATE, say: Callable[[str], None] | None = None
) -> list[Question]:
    """The questions of a file. With `say`, rows that cannot be used are set aside and said; without, the first one raises
    StoreError with its file, line and reason. Raises MissingInputError where no question is left.
    """
    found, bad = load_questions(path, template)
    tell_bad(found, bad, path, say)
    return found


def load_questions(path: str | Path, template: str = TEMPLATE) -> tuple[list[Question], list[SetAside]]:
    """The questions of a file, and the rows of it that cannot be used. Raises MissingInputError for what is no file."""
    check_file(Path(path))
    rows = list(_questions(Path(path), template))
    return [row for row in rows if isinstance(row, Question)], [row for row in rows if isinstance(row, SetAside)]


def tell_bad(
    found: Sequence[Question], bad: Sequence[SetAside], path: str | Path, say: Callable[[str], None] | None
) -> None:
    """Say what is set aside, and refuse as `read_questions` does."""
    first = f"{bad[0].source}: {bad[0].reason}" if bad else "expected a JSON object a line"
    if bad and say is None:
        raise StoreError(first, "a question that cannot be used", "mend or remove the row")
    if bad and say is not None:
        for row in bad[:SAID]:
            say(f"set aside: {row.source}: {row.reason}")
        say(f"{len(bad):,} of {len(bad) + len(found):,} questions of {shown(path)} set aside")
    if not found:
        raise MissingInputError(f"{shown(path)} has no questions", first)


def _questions(path: Path, template: str) -> Iterator[Question | SetAside]:
    for row in RowReader("strict", MAX_ROW_BYTES, COLUMNS).read(path):
        if isinstance(row, SetAside):
            yield row
            continue
        try:
            parts = list(_flat(row))
        except Unusable as error:
            yield SetAside(row.source, str(error))
            continue
        for part in parts:
            try:
                yield _question(part, template)
            except Unusable as error:
                yield SetAside(part.source, str(error))
            except RecursionError:
                yield SetAside(part.source, "lists nested too deeply")


def _flat(row: Row) -> Iterator[Row]:
    """The rows in SQuAD's nested layout: articles, their paragraphs, and the questions about each; others as they are."""
    data = row.values.get("data")
    if not isinstance(data, list) or "question" in row.values:
        yield row
        return
    number = 0
    for article in data:
        is_nested = isinstance(article, dict) and "paragraphs" in article
        for paragraph in _objects(article, "paragraphs") if is_nested else [article]:
            for values in _objects(paragraph, "qas") if is_nested else [article]:
                number += 1
                if not isinstance(values, dict):
                    raise Unusable(f"row {number} of data is {type(values).__name__}, not an object")
                shared = {"context": paragraph["context"]} if "context" in paragraph else {}
                yield Row({**shared, **values}, f"{row.source}, question {number}", number)


def _objects(parent: Any, key: str) -> list[dict[str, Any]]:
    found = parent.get(key) if isinstance(parent, dict) else None
    if not isinstance(found, list) or not all(isinstance(value, dict) for value in found):
        raise Unusable(f"{key} is no list of objects, as SQuAD's is")
    return found


def _question(row: Row, template: str) -> Question:
    """Raises Unusable."""
    values = {key: value for key, value in row.values.items() if not is_missing(value)}
    if "messages" in values:
        prompt, query, answers = _of_messages(values["messages"])
    else:
        key = next((key for key in QUESTIONS if key in values), None)
        if key is None:
            raise Unusable(f"no question (it has {', '.join(list(values)[:6])})")
        query = _text(values[key], key)
        prompt = template.replace("{question}", query)
        answers = tuple(dict.fromkeys(text for key in ANSWERS if key in values for text in _answers(values[key], key)))
        if not answers:
            why = ": it cannot be answered, the row says" if values.get("is_impossible") is True else ""
            raise Unusable(f'no answer ("answer", or "answers" with at least one){why}')
    found = next((key for key in PASSAGES if values.get(key)), None)
    neighbors = tuple(_passages(values[found], found)) if found else ()
    named = next((key for key in DOCUMENTS if key in values), None)
    documents = _list_of(values[named], named, _label) if named else ()
    identifier = next((values[key] for key in ID_KEYS if values.get(key, "") != ""), None)
    name = str(row.number) if identifier is None else _label(identifier, "id")
    return Question(name, prompt, query, answers=answers, neighbors=neighbors, documents=documents, line=row.number)


def _of_messages(messages: Any) -> tuple[str, str, tuple[str, ...]]:
    if not isinstance(messages, list) or len(messages) < 2 or not all(isinstance(m, dict) for m in messages):
        raise Unusable("messages cannot be read: expected two or more objects with role and content")
    parts = [(_text(m.get("role"), "role"), _content(m.get("content"))) for m in messages]
    if parts[-1][0] != "assistant":
        raise Unusable(f"the last message is the {parts[-1][0]}'s: the assistant's answer is what is learned")
    prompt = "".join(f"{role}: {content}\n" for role, content in parts[:-1]) + "assistant:"
    asked = [content for role, content in parts[:-1] if role == "user"]
    return prompt, asked[-1] if asked else prompt, (parts[-1][1],)


def _content(value: Any) -> str:
    """A message's text; OpenAI's parts of type text are joined."""
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        value = "".join(_text(part.get("text"), "content") for part in value)
    return _text(value, "content")


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise Unusable(f"{key} is no text: {str(value)[:60]!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Unusable(f"{key} is not UTF-8, or holds half of a surrogate pair") from error
    return value.strip()


def _label(value: Any, key: str) -> str:
    """A text or a number as text; true and false are neither."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas writes whole numbers beside missing ones so
    return _text(str(value) if is_number else value, key)


def _answers(value: Any, key: str) -> tuple[str, ...]:
    """A text, a number or lists of them; {"text": [...]} as in SQuAD, {"value", "aliases"} as in TriviaQA. Empty ones are
    none.
    """
    if isinstance(value, dict):
        if "text" in value:
            return _answers(value["text"], key)
        return tuple(text for part in ("value", "aliases") if part in value for text in _answers(value[part], key))
    if isinstance(value, str) and key == "answers":
        value = _written_list(value)
    if isinstance(value, list):
        return tuple(text for part in value for text in _answers(part, key))
    is_none = is_missing(value) or (isinstance(value, str) and not value.strip())
    return () if is_none else (_label(value, key),)


def _written_list(text: str) -> Any:
    """The list that a cell of a table holds as Python or JSON writes it, as DPR's and pandas' do; else the text."""
    if not (text.startswith("[") and text.rstrip().endswith("]") and len(text) <= MAX_LIST):
        return text
    try:
        found = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    return found if isinstance(found, list) and all(isinstance(part, str) for part in found) else text


def _list_of(value: Any, key: str, one: Callable[[Any, str], str]) -> tuple[str, ...]:
    return tuple(one(part, key) for part in value) if isinstance(value, list) else (one(value, key),)


def _passages(value: Any, key: str) -> Iterator[str]:
    """Texts; {"title", "text"}; [title, sentences] or columns of them, as in HotpotQA."""
    if isinstance(value, list):
        if len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], list):
            yield _titled(value[0], "".join(_text(part, key) + " " for part in value[1]), key)
            return
        for part in value:
            yield from _passages(part, key)
    elif isinstance(value, dict):
        texts = next((value[name] for name in ("text", "contents", "sentences") if name in value), None)
        titles = value.get("title")
        if isinstance(titles, list) and isinstance(texts, list) and len(titles) == len(texts):
            for title, text in zip(titles, texts):
                yield _titled(title, " ".join(text) if isinstance(text, list) else text, key)
        else:
            yield _titled(titles, texts, key)
    else:
        yield _text(value, key)


def _titled(title: Any, text: Any, key: str) -> str:
    body = _text(text, key)
    return f"title: {title.strip()}, source: {body}" if isinstance(title, str) and title.strip() else body
