"""A question to a user's documents: the passages that fit it, a reader's answer, and where in them it stands.

An `Asker` keeps the model open, and what it encoded of passages; `retro_engine.ask` is one question to one. What
`retro serve` answers under /v1/ask is made of the same parts (`passages_of`, `request_of`, `answer_of`).
"""

import functools
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from retro_engine.data.inputs import checked_inputs
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.generate.generator import Generator, encode_neighbors
from retro_engine.generate.request import Request
from retro_engine.model.passage_choice import absence
from retro_engine.progress import Reporter
from retro_engine.readers.ahead import Ahead, Comparing, checked_question, compare, search
from retro_engine.readers.places import nobody
from retro_engine.readers.reader import open_reader
from retro_engine.readers.reader_file import Reader, find_reader, with_settings
from retro_engine.readers.spans import Span, find_span
from retro_engine.retrieval.hit import Found, Hit

if TYPE_CHECKING:
    from retro_engine.library.file_states import Synced
    from retro_engine.readers.documents import Documents

NOT_FOUND = "The documents do not hold the answer."
AROUND = 240  # characters on either side of what is marked


@dataclass(frozen=True, kw_only=True)
class Source:
    """A passage that was found; the first is the one that was read."""

    document: str  # its id: of a file its path, of a row file:line
    title: str
    chunk: int
    score: float
    text: str  # what was read of it


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of a question. `span` is the stretch of sources[span.passage].text that the answer was copied from."""

    question: str
    answer: str  # where it was not found, NOT_FOUND
    found: bool
    span: Span | None
    sources: list[Source]
    why: str = ""  # it was not found: nothing was read, or the model made something up
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        span = self.span and {
            "source": self.span.passage,
            **{n: getattr(self.span, n) for n in ("start", "end", "text")},
        }
        return asdict(self) | {"span": span}


def passages_of(found: Found, tokenizer: Tokenizer) -> list[tuple[Hit, str]]:
    """What was found, as the texts that are read."""
    pairs = found.pairs()
    return list(zip([hit for hit, _ in pairs], tokenizer.decode_batch([tokens.tolist() for _, tokens in pairs])))


def choose(
    generator: Generator, reader: Reader, question: str, passages: Sequence[tuple[Hit, str]]
) -> list[tuple[Hit, str]]:
    """The passages, first the one that is read: of which the reader says least that it does not hold the answer."""
    if len(passages) < 2:
        return list(passages)
    model, tokenizer = generator.model, generator.tokenizer
    texts = [reader.shown(hit.title, text) for hit, text in passages]
    tokens, lengths = map(torch.from_numpy, encode_neighbors(tokenizer, texts, reader.reading.retrieved_length))
    prompt, absent_id = tokenizer.encode(reader.prompt(question)), tokenizer.encode(f" {reader.absent}")[0]
    encode = None if generator.encodings is None else generator.encodings.of
    best = int(
        absence(
            model,
            prompt,
            passages_KR=tokens,
            lengths_K=lengths,
            absent_id=absent_id,
            pad_id=tokenizer.pad_id,
            encode=encode,
        ).argmin()
    )
    return [passages[best], *passages[:best], *passages[best + 1 :]]


def request_of(reader: Reader, question: str, passages: Sequence[tuple[Hit, str]]) -> Request:
    """What the model is asked behind the first passage: greedily, up to the end of the line."""
    texts = [reader.shown(hit.title, text) for hit, text in passages[:1]]
    return Request(reader.prompt(question), reader.max_new_tokens, neighbors=texts, stop=("\n",))


def answer_of(reader: Reader, question: str, passages: Sequence[tuple[Hit, str]], text: str) -> Answer:
    """What the model's text says. That it says nothing, or what stands in no passage, counts as its saying that the answer is absent."""
    said = text.strip().split("\n", 1)[0].strip()
    names = ("document", "title", "chunk", "score")
    sources = [Source(**{name: getattr(hit, name) for name in names}, text=read) for hit, read in passages]
    if _is_absent(said, reader.absent):
        return Answer(question=question, answer=NOT_FOUND, found=False, span=None, sources=sources)
    texts = [source.text for source in sources]
    span = find_span(said, texts[:1]) or find_span(said, texts)  # where it was read, before where it stands too
    if span is None:  # it was made up
        why = f"what the model said stands in no passage: {said!r:.80}"
        return Answer(question=question, answer=NOT_FOUND, found=False, span=None, sources=sources, why=why)
    return Answer(question=question, answer=said, found=True, span=span, sources=sources)


def nothing_found(question: str, why: str) -> Answer:
    """No passage has a word of the question: the model is not asked."""
    return Answer(question=question, answer=NOT_FOUND, found=False, span=None, sources=[], why=why)


def _is_absent(said: str, absent: str) -> bool:
    """Also where it is said as a sentence: "It is not in the documents."."""
    plain = [text.strip(" .!\"'").casefold() for text in (said, absent)]
    return not plain[0] or plain[0].endswith(plain[1])


class Asker:
    """An open reader over documents that it follows as they change."""

    def __init__(
        self,
        documents: str | Path | Sequence[str | Path],
        reader: Reader | str | Path | None = None,
        base: str | Path | Comparing | None = None,
        *,
        k: int | None = None,
        max_new_tokens: int | None = None,
        dtype: str | None = None,
        reporter: Reporter | None = None,
        format: str | None = None,
    ):
        """`documents`: files, folders and patterns; `reader`: a name or a folder (None: the package's own); `base`: its GGUF
        file (None: where `retro fetch` puts it), or what `compare` began for this reader and `dtype`; `k` passages are read; `format`: what every file is, whatever its suffix.

        Raises UsageError, MissingInputError and StoreError for what cannot be used, is not there, or is another.
        """
        found = reader if isinstance(reader, Reader) else find_reader(reader)
        self.reader = with_settings(found, k, max_new_tokens)
        self.inputs = checked_inputs([documents] if isinstance(documents, str | Path) else list(documents))
        say = nobody if reporter is None else reporter.say
        comparing = base if isinstance(base, Comparing) else compare(self.reader, base, dtype)
        opened = open_reader(self.reader, comparing, dtype, say)
        self.tokenizer, self.generator = opened.tokenizer, Generator(opened.model, opened.tokenizer)
        self._reporter, self._format = reporter, format
        self.synced: Synced | None = None  # of the last question

    @functools.cached_property
    def documents(self) -> "Documents":
        """Made for the first question whose search has not begun elsewhere."""
        from retro_engine.readers.documents import Documents

        reading = self.reader.reading
        cut = reading.chunk_size, reading.stride
        return Documents(self.inputs, self.tokenizer, *cut, self._reporter, format=self._format)

    def ask(self, question: str, ahead: Ahead | None = None) -> Answer:
        """`ahead`: the search for its passages, which has begun already. Raises UsageError for a question that cannot be used,
        MissingInputError where there is no document.
        """
        question, begin = checked_question(question), time.monotonic()
        searched = (ahead and ahead.result()) or search(self.documents, question, self.reader.reading)
        found, self.synced = searched.found, searched.synced
        if found.hits:
            passages = choose(self.generator, self.reader, question, passages_of(found, self.tokenizer))
            out = self.generator.generate_all([request_of(self.reader, question, passages)])[0]
            answer = answer_of(self.reader, question, passages, out.text)
        else:
            answer = nothing_found(question, searched.why)
        return replace(answer, seconds=time.monotonic() - begin)


def marked(text: str, span: Span | None, before: str, after: str) -> str:
    """A passage on one line, with its span between two marks and as much around it as one reads at a glance; what a terminal
    would obey is left out.
    """
    if span is None:
        return _plain(text).strip()
    left, said, right = text[: span.start], text[span.start : span.end], text[span.end :]
    return f"{_end_of(_plain(left))}{before}{_plain(said).strip()}{after}{_end_of(_plain(right)[::-1])[::-1]}"


def _plain(text: str) -> str:
    """Without line breaks and control characters; a space at either end stays one."""
    clean = "".join(letter if letter.isprintable() else " " for letter in text)
    return f"{' ' * clean[:1].isspace()}{' '.join(clean.split())}{' ' * clean[-1:].isspace()}" if clean.strip() else ""


def _end_of(text: str) -> str:
    """The last AROUND characters, from where a word begins; of text that is turned around, the first."""
    if len(text) <= AROUND:
        return text.lstrip()
    return f"... {text[-AROUND:].partition(' ')[2]}"


def terminal_marks(is_terminal: bool) -> tuple[str, str]:
    """Around what is marked: letters in reverse on a terminal, brackets elsewhere and where NO_COLOR is set."""
    return ("\x1b[7m", "\x1b[0m") if is_terminal and not os.environ.get("NO_COLOR") else ("[[", "]]")
