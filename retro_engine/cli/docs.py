"""The command `retro docs`: a live library from the command line, a folder's or a server's."""

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from retro_engine.cli import flags
from retro_engine.errors import MissingInputError, UsageError

if TYPE_CHECKING:
    from retro_engine.data.corpus import Document, FieldValue
    from retro_engine.library.importer import Importer, Job
    from retro_engine.library.library import Library
    from retro_engine.progress import Reporter
    from retro_engine.serve.client import RemoteLibrary

BATCH = 256  # documents added at once


def add(commands: flags.Commands) -> None:
    """The flags of every `retro docs WHAT`."""
    whats = flags.family(commands, "docs", "a live library: add, list, get, rm, reset, query, import")

    def what(name: str, run: Callable[[argparse.Namespace], int], about: str) -> argparse.ArgumentParser:
        sub = flags.command(whats, name, run, about)
        sub.add_argument("library", metavar="LIBRARY", help="a folder, or a server's URL (its key in RETRO_API_KEY)")
        sub.add_argument("--namespace", default="default")
        return sub

    sub = what("add", run_add, "add files, or replace what has their names")
    sub.add_argument("inputs", nargs="+", metavar="IN", help=flags.INPUTS_HELP)
    sub.add_argument("--id", metavar="ID", help="of the text from standard input")
    sub.add_argument("--text-key", default="text", help="key of the text in rows")
    flags.add_format(sub)
    sub.add_argument("--errors", default="strict", choices=["strict", "replace"], help="replace repairs bad UTF-8")
    _add_making(sub)
    sub.add_argument(
        "--metadata", metavar="KEY=VALUE", action="append", default=[], help="of each, to filter by; repeat"
    )
    sub = what("sync", run_sync, "follow a folder: read what is new or changed in it, delete what is gone")
    sub.add_argument("folder", metavar="DIR")
    sub.add_argument("--forget", action="store_true", help="delete what was read of it, and follow it no more")
    _add_making(sub)
    sub = what("import", run_import, "add a large file of rows; goes on when it was interrupted")
    rows = ".jsonl .json .tsv .csv .parquet, compressed or not; - for JSON lines from standard input"
    sub.add_argument("input", metavar="IN", help=rows)
    _add_making(sub)
    sub = what("list", run_list, "documents by id, and the library's counts")
    sub.add_argument("--after", default="", metavar="ID", help="documents after this one")
    sub.add_argument("--limit", type=int, default=100, metavar="N")
    what("get", run_get, "print a document").add_argument("id", metavar="ID")
    what("rm", run_rm, "delete documents").add_argument("ids", nargs="+", metavar="ID")
    sub = what("reset", run_reset, "delete every document of the namespace")
    sub.add_argument("--yes", action="store_true", required=True, help="there is no way back")
    what("vacuum", run_vacuum, "give the space of what was deleted back, and make one segment of the index")
    flags.add_reading(
        what("reread", run_reread, "read the words of all documents anew, as this version does or the flags say")
    )
    _add_query(what("query", run_query, "the best chunks for a text"))


def _add_making(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--store", metavar="STORE", help="make LIBRARY with its tokenizer and chunk size")
    sub.add_argument("--stride", type=int, metavar="TOKENS", help="between starts of chunks (default: no overlap)")
    names = "none, hash, minilm (extra offline), or a SentenceTransformers folder or hub id (extra dense)"
    sub.add_argument("--embedder", metavar="NAME", help=f"of a new library's vectors, for dense and hybrid: {names}")
    flags.add_reading(sub)


def _add_query(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("text", metavar="TEXT")
    sub.add_argument("--k", type=int, default=5)
    fields = "only documents whose metadata says so; repeat for several, all of which must hold"
    sub.add_argument("--where", metavar="KEY=VALUE", action="append", default=[], help=fields)
    retriever = "of the library: lexical (bm25), dense (its embedder's) or hybrid (default lexical)"
    sub.add_argument("--retriever", default="lexical", metavar="NAME", help=retriever)
    sub.add_argument("--fusion", nargs=2, type=float, default=[1.0, 1.0], metavar="W", help="hybrid: lexical, dense")
    sub.add_argument("--stores", nargs="+", metavar="STORE", default=[], help="to search as well, by words")
    weights = "of the library and --stores"
    sub.add_argument("--source-weights", nargs=2, type=float, default=[1.0, 1.0], metavar="W", help=weights)


def with_url(words: list[str]) -> list[str]:
    """`retro docs WHAT ... --url URL` as `retro docs WHAT URL ...`."""
    for place, word in enumerate(words[:-1]):
        if word == "--url" and words[0] == "docs" and place > 1:
            return [*words[:2], words[place + 1], *words[2:place], *words[place + 2 :]]
    return words


def _is_url(args: argparse.Namespace) -> bool:
    return args.library.startswith(("http://", "https://"))


def _open(args: argparse.Namespace, is_read_only: bool = False) -> "Library | RemoteLibrary":
    """The library; made first where a store is named."""
    if _is_url(args):
        from retro_engine.serve.client import RemoteLibrary

        _refuse_folder_flags(args)
        return RemoteLibrary(args.library)
    return _open_folder(args, is_read_only)


def _refuse_folder_flags(args: argparse.Namespace) -> None:
    for name in ("store", "stores", "stemmer", "stop_words", "embedder"):
        if getattr(args, name, None):
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} is for a library in a folder", f"{args.library} is a server's", "leave it out")


def _open_folder(args: argparse.Namespace, is_read_only: bool = False) -> "Library":
    from retro_engine.data.store import Store
    from retro_engine.library.embedders import check_named, new_embedder
    from retro_engine.library.file import is_made
    from retro_engine.library.library import Library
    from retro_engine.library.live import library_coding

    folder = Path(args.library)
    store = Store(args.store) if hasattr(args, "embedder") and args.store is not None else None
    if hasattr(args, "embedder") and not is_made(folder):
        if store is None:
            raise MissingInputError(f"{folder} does not exist", "a new library needs a tokenizer", "--store STORE")
        embedder = new_embedder(args.embedder, store.tokenizer)
        Library.create(
            folder,
            store.tokenizer,
            chunk_size=store.chunk_size,
            stride=args.stride,
            embedder=embedder,
            analyzer=flags.reading(args),
        )
    with contextlib.ExitStack() as stack:
        library = stack.enter_context(Library(folder, is_read_only=is_read_only))
        if store is not None:  # one that was there keeps what it was made with
            store.coding.check(library_coding(library))
        if getattr(args, "embedder", None) is not None:
            check_named(library.file.settings, args.embedder, str(folder))
        wanted = flags.reading(args) if hasattr(args, "stemmer") else None
        if wanted is not None and wanted != library.file.analyzer:
            raise UsageError(
                f"{folder} reads words with {library.file.analyzer.describe()}",
                f"the flags say {wanted.describe()}: a library keeps the reading it was made with",
                "leave --stemmer and --stop-words out, or make another library",
            )
        stack.pop_all()
    return library


def fields_of(pairs: list[str]) -> "dict[str, FieldValue]":
    """Metadata of KEY=VALUE, where a value that is a number or true or false is that. Raises UsageError."""
    from retro_engine.library.filters import check_metadata, scalar

    fields = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or name in fields:
            raise UsageError(f"--metadata {pair} cannot be used", "each says one field's value", "--metadata KEY=VALUE")
        fields[name] = scalar(text)
    check_metadata(fields)
    return fields


def run_add(args: argparse.Namespace) -> int:
    from retro_engine.data.corpus import Document, Reader
    from retro_engine.data.inputs import SetAside, find_files, standard_input, tell
    from retro_engine.data.streams import read_text
    from retro_engine.library.documents import MAX_DOCUMENT_BYTES, check_document

    about = fields_of(args.metadata)
    rows: Iterator[Document | SetAside]
    if args.inputs == ["-"]:
        if args.id is None:
            raise UsageError("a text from standard input needs an id", "", "--id ID")
        for flag, is_given in (("--text-key", args.text_key != "text"), ("--format", args.format is not None)):
            if is_given:
                raise UsageError(f"{flag} cannot be used", "standard input is one text, not rows", "leave it out")
        text = read_text(standard_input(), MAX_DOCUMENT_BYTES, "standard input", args.errors)
        rows = iter([Document(args.id, "", text)])
    elif args.id is not None:
        raise UsageError("--id cannot be used", "it is of the text from standard input, -", "leave it out")
    else:
        paths, passed_over = find_files(args.inputs, of_any_kind=args.format is not None)
        tell(passed_over, flags.reporter(args).say)
        rows = Reader(args.text_key, args.errors, MAX_DOCUMENT_BYTES, args.format).read(paths)
    num_added = num_set_aside = 0
    with _open(args) as library:
        while batch := list(islice(rows, BATCH)):
            good = []
            documents = _identified(library, [row for row in batch if isinstance(row, Document)], args.namespace)
            for document in [replace(one, metadata={**one.metadata, **about}) for one in documents]:
                try:
                    check_document(document)
                    good.append(document)
                except UsageError as error:
                    batch.append(SetAside(document.source, f"{error.what}: {error.why}"))
            for row in batch:
                if isinstance(row, SetAside):
                    num_set_aside += 1
                    flags.reporter(args).say(f"set aside: {row.source}: {row.reason}")
            if good:
                library.add(good, args.namespace)
            num_added += len(good)
        flags.print_result(args, {"added": num_added, "set_aside": num_set_aside, "version": library.version})
    if not num_added:
        raise MissingInputError("nothing was added", "every document was set aside", "name other files")
    return 0


def _identified(library: "Library | RemoteLibrary", documents: "list[Document]", namespace: str) -> "list[Document]":
    """Documents with ids that do not depend on how they came in; a server's are paths from here."""
    from retro_engine.library.identity import identified, identified_in
    from retro_engine.library.library import Library

    if isinstance(library, Library):
        return identified_in(library, documents, namespace)
    return [identified(document, Path.cwd()) for document in documents]


def run_sync(args: argparse.Namespace) -> int:
    """Follow a folder once: run it again, by hand or by cron, to follow it on."""
    from retro_engine.library import following

    if _is_url(args):
        why = f"{args.library} is a server's, which has it open"
        raise UsageError("sync is for a library in a folder", why, "where it runs: retro serve RUN --follow DIR")
    reporter = flags.reporter(args)
    with _open_folder(args) as library:
        if args.forget:
            number = following.forget(library, args.folder, args.namespace)
            flags.print_result(args, {"forgotten": number, "version": library.version})
            return 0
        done = following.sync(library, args.folder, args.namespace, reporter)
        names = {"files": done.num_files, "documents": done.num_documents, "read": done.num_read}
        more = {"removed": done.num_removed, "set_aside": done.num_aside, "version": library.version}
        flags.print_result(args, {**names, **more})
    return 0


def run_import(args: argparse.Namespace) -> int:
    job = _import_remotely(args) if _is_url(args) else _import_here(args)
    for source, reason in job.errors:
        flags.reporter(args).say(f"set aside: {source}: {reason}")
    names = ("number", "state", "done", "added", "failed", "reason")
    flags.print_result(args, {name: getattr(job, name) for name in names})
    return 0 if job.state == "done" else 3


def _import_remotely(args: argparse.Namespace) -> "Job":
    import tempfile

    from retro_engine.data.corpus import spool_json_lines
    from retro_engine.data.inputs import standard_input
    from retro_engine.serve.client import RemoteLibrary

    _refuse_folder_flags(args)
    with tempfile.TemporaryFile() as file, RemoteLibrary(args.library) as remote:
        if args.input != "-":
            spool_json_lines(Path(args.input), file)
        *_, job = remote.import_rows(standard_input() if args.input == "-" else file, args.namespace)
    return job


def _import_here(args: argparse.Namespace) -> "Job":
    from retro_engine.data.inputs import standard_input
    from retro_engine.library.importer import Importer

    with _open_folder(args) as library, Importer(library) as importer:
        number = importer.start(standard_input() if args.input == "-" else args.input, args.namespace)
        return _follow(importer, number, flags.reporter(args))


def _follow(importer: "Importer", number: int, reporter: "Reporter") -> "Job":
    """Wait for a job, and say now and then how far it is."""
    from retro_engine.progress import LINE_EVERY_S

    while (job := importer.wait(number, LINE_EVERY_S)).state == "running":
        reporter.say(f"importing: {job.done:,} rows, {job.added:,} added, {job.failed:,} set aside")
    return job


def run_list(args: argparse.Namespace) -> int:
    with _open(args, is_read_only=True) as library:
        for entry in library.entries(args.namespace, args.after, args.limit):
            shown = vars(entry)
            print(
                json.dumps(shown)
                if args.json
                else f"{entry.id}\t{entry.chunks} chunks\t{entry.bytes} bytes\t{entry.title}"
            )
        if not args.json and not args.quiet:
            flags.reporter(args).say(json.dumps(library.statistics()))
    return 0


def run_get(args: argparse.Namespace) -> int:
    with _open(args, is_read_only=True) as library:
        document = library.get(args.id, args.namespace)
    if document is None:
        raise MissingInputError(
            f"document {args.id} does not exist", f"in namespace {args.namespace}", "retro docs list"
        )
    print(
        json.dumps({name: getattr(document, name) for name in ("id", "title", "metadata", "text")})
        if args.json
        else document.text
    )
    return 0


def run_rm(args: argparse.Namespace) -> int:
    with _open(args) as library:
        flags.print_result(args, {"deleted": library.delete(args.ids, args.namespace), "version": library.version})
    return 0


def run_reset(args: argparse.Namespace) -> int:
    with _open(args) as library:
        flags.print_result(args, {"deleted": library.reset(args.namespace), "version": library.version})
    return 0


def run_vacuum(args: argparse.Namespace) -> int:
    if _is_url(args):
        raise UsageError("vacuum is for a library in a folder", f"{args.library} is a server's", "run it where it lies")
    with _open_folder(args) as library:
        flags.print_result(args, {"bytes": library.vacuum(), "version": library.version})
    return 0


def run_reread(args: argparse.Namespace) -> int:
    from retro_engine.library.file import set_analyzer
    from retro_engine.library.library import Library
    from retro_engine.retrieval.analyzer import Analyzer

    if _is_url(args):
        raise UsageError(
            "reread is for a library in a folder", f"{args.library} is a server's", "stop the server first"
        )
    Library(args.library).close()  # raises where there is none, or it is in use
    set_analyzer(Path(args.library), flags.reading(args) or Analyzer())
    with Library(args.library) as library:
        flags.print_result(args, {"words": library.file.analyzer.describe(), "version": library.version})
    return 0


def run_query(args: argparse.Namespace) -> int:
    from retro_engine.library import filters
    from retro_engine.library.library import Library
    from retro_engine.library.live import LiveRetriever
    from retro_engine.retrieval.search import Retriever

    where = filters.where(args.where)
    with _open(args, is_read_only=True) as library:
        if isinstance(library, Library):
            if where is not None and args.stores:
                raise UsageError("--where with --stores", "documents of stores have no metadata", "leave --stores out")
            static = Retriever(flags.open_stores(args.stores)) if args.stores else None
            mode = flags.library_mode(args.retriever, library.file.settings["embedder"])
            source = LiveRetriever(library, static, args.source_weights, mode, args.namespace)
            hits = source.search(args.text, args.k, weights=args.fusion, where=where).hits
            unknown = "" if where is None else library.unknown_fields(where, args.namespace)
        else:
            mode = flags.library_mode(args.retriever)
            hits = library.search(args.text, args.k, mode, args.namespace, args.fusion, where)
            unknown = library.note if hits else ""
        if not hits:
            beside = f", nor in {' '.join(args.stores)}" if args.stores else ""
            flags.reporter(args).say(f"no hit: {library.why_nothing(args.text, args.namespace, where)}{beside}")
        elif unknown:
            flags.reporter(args).say(unknown)
    for hit in hits:
        text = " ".join(hit.text.split())
        shown = f"{hit.score:8.3f}  {hit.where}: {text}"
        print(json.dumps(vars(hit)) if args.json else shown)
    return 0
