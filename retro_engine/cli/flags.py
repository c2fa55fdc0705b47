"""What the commands share: how one is declared, the flags that mean the same in all of them, where words and results go."""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from retro_engine.errors import UsageError
from retro_engine.train.__main__ import DEVICES

if TYPE_CHECKING:
    from retro_engine.api import Retro
    from retro_engine.data.batches import Sequences
    from retro_engine.data.questions import Questions
    from retro_engine.data.store import Store
    from retro_engine.generate.generator import Generator
    from retro_engine.memory.next_token import MemoryBeside
    from retro_engine.progress import Reporter
    from retro_engine.retrieval.analyzer import Analyzer
    from retro_engine.retrieval.hit import NeighborSource
    from retro_engine.retrieval.search import Retriever

Commands = Any  # argparse's sub-parsers: it has no public name for them
EVERY_SETTING = None  # of `reads`
INPUTS_HELP = "text, HTML, PDF, Word (.docx), JSON, TSV, CSV, Parquet, compressed or not; folders; - for standard input"
RUN_HELP = "a run's folder (its best checkpoint), or a checkpoint"
MODEL_HELP = f"{RUN_HELP}, or a .gguf file as it is"
IN_FRONT = ("model.reading", "model.num_neighbors", "model.retrieved_length", "model.sink_id")  # how a decoder reads
RETRIEVER_HELP = "lexical (bm25), dense, hybrid, or by name bm25, hash, minilm, a SentenceTransformers model"
TAKEN = ("on", "off", "random", "given", "prompt")  # what figures are called that need no other run
WEIGHTS = ("fp32", "bf16", "int8", "int4")


def command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int],
    about: str,
    reads: Sequence[str] | None = (),
) -> argparse.ArgumentParser:
    """A command; `reads` names the settings that it takes beside its flags (what ends with a point is a section)."""
    sub: argparse.ArgumentParser = commands.add_parser(name, help=about, description=about)
    sub.set_defaults(run=run, reads=reads)
    sub.add_argument("--json", action="store_true", help="events and results as JSON lines")
    sub.add_argument("--quiet", action="store_true")
    return sub


def family(commands: Commands, name: str, about: str) -> Commands:
    """A command that consists of commands: `retro NAME WHAT`."""
    sub = commands.add_parser(name, help=about, description=about)
    return sub.add_subparsers(dest="what", metavar="WHAT", required=True)


def add_device(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", choices=DEVICES, help="a GPU where there is one (auto), or trainer.accelerator=")


def add_format(sub: argparse.ArgumentParser) -> None:
    names = ("text", "markdown", "html", "pdf", "docx", "jsonl", "json", "tsv", "csv", "parquet")
    sub.add_argument("--format", choices=names, help="read every file as one, whatever its suffix (default: by suffix)")


def add_share(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--share", default="valid", choices=["train", "valid", "test", "all"], help="which documents")


def add_against(sub: argparse.ArgumentParser) -> None:
    about = "plain decoders to compare with, paired; NAME=RUN calls one NAME"
    sub.add_argument("--against", action="extend", nargs="+", metavar="[NAME=]RUN", default=[], help=about)


def named_runs(args: argparse.Namespace) -> dict[str, str]:
    """The runs of `add_against` by name: the one that is given, else the path. Raises UsageError for a name that is taken."""
    found: dict[str, str] = {}
    for text in args.against:
        name, separator, path = text.partition("=")
        if not separator or os.path.exists(text):
            name, path = text, text
        if not name or not path or name in found or name in TAKEN:
            why = f"{name} is taken" if name in found or name in TAKEN else "a run, or a name of your choice and a run"
            raise UsageError(f"--against {text} cannot be read", why, "--against plain=runs/plain")
        found[name] = path
    return found


def add_reading(sub: argparse.ArgumentParser) -> None:
    """Flags of the commands that decide how words are read."""
    sub.add_argument(
        "--stemmer", metavar="LANGUAGE", help="Snowball's, of words before BM25 compares them (default none)"
    )
    sub.add_argument(
        "--stop-words", metavar="LANG", help="what BM25 leaves out: a language, none, or a file (default en)"
    )


def reading(args: argparse.Namespace) -> "Analyzer | None":
    """The analyzer of `add_reading`'s flags, None where none is given."""
    from retro_engine.retrieval.analyzer import make_analyzer

    if args.stemmer is None and args.stop_words is None:
        return None
    return make_analyzer(None if args.stemmer == "none" else args.stemmer, args.stop_words or "en")


def add_retriever(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--retriever", default="lexical", metavar="NAME", help=f"{RETRIEVER_HELP} (default lexical)")
    sub.add_argument("--embedder", default="minilm", metavar="MODEL", help="of dense and hybrid (default minilm)")


def add_neighbors(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--neighbors", action="append", metavar="TEXT", help="a given neighbor; may be repeated")


def add_in_front(sub: argparse.ArgumentParser) -> None:
    """Whether a plain decoder reads, for the commands that take the settings IN_FRONT."""
    about = "of a plain decoder: neighbors in front of its own keys (where it has something to read), or none"
    sub.add_argument("--reading", choices=("prefix", "none"), help=about)


def settle_reading(args: argparse.Namespace, retro: "Retro", has_something: bool, changes_count: bool = False) -> bool:
    """Whether the model reads neighbors: as it was trained, or where a plain decoder `has_something` to read or is told to.
    `changes_count`: one that was trained to read them by cross-attention takes as many as model.num_neighbors says.

    Raises UsageError for a flag or setting that says otherwise, or that means nothing then.
    """
    from retro_engine.generate.open_model import check_reading

    asked, c = _in_front(args), retro.model.config
    setting = asked.pop("reading", None)
    if setting is not None and args.reading not in (None, setting):
        raise UsageError(f"--reading {args.reading} and model.reading={setting}", "they differ", "name one")
    if not c.retrieval and setting == "cross_attention":
        raise UsageError(
            "model.reading=cross_attention", "a plain decoder has none", "retro train --init-from makes it"
        )
    reading = args.reading or (setting if setting != "cross_attention" else None)
    check_reading(retro.model, reading)
    if changes_count and c.retrieval and not c.reads_prefix and "num_neighbors" in asked:
        retro.model.config = c = replace(c, num_neighbors=asked["num_neighbors"])
    for name, value in asked.items():
        if c.retrieval and value != getattr(c, name):
            raise UsageError(
                f"model.{name}={value} cannot be used", f"the model has {getattr(c, name)}", "leave it out"
            )
    reads = c.retrieval or reading == "prefix" or (reading is None and has_something)
    if not reads and (has_something or asked):
        what = ", ".join(f"model.{name}={value}" for name, value in asked.items()) or "something to read was given"
        raise UsageError(what, "this model is a plain decoder, which reads nothing now", "--reading prefix")
    return reads


def read_in_front(args: argparse.Namespace, retro: "Retro", chunk_size: int | None) -> None:
    """Let a plain decoder read, in chunks of `chunk_size` (None: its own); a model that was trained to reads already."""
    if not retro.model.config.retrieval:
        asked = _in_front(args)
        asked.pop("reading", None)
        retro.read_in_front(chunk_size, asked)


def _in_front(args: argparse.Namespace) -> dict[str, Any]:
    """The settings IN_FRONT that are named, by their fields."""
    from retro_engine.config import load_config, named_keys

    typed = {text: named_keys([text], with_environment=False) & {*IN_FRONT} for text in args.overrides}
    config = load_config([text for text, keys in typed.items() if keys], say=lambda note: None).model
    names = [key.removeprefix("model.") for keys in typed.values() for key in keys]
    return {name: getattr(config, name) for name in names}


def add_sources(sub: argparse.ArgumentParser) -> None:
    """What a model reads from."""
    sub.add_argument("--stores", nargs="+", metavar="STORE", help="to retrieve from (default: the run's)")
    add_retriever(sub)


def add_encodings(sub: argparse.ArgumentParser) -> None:
    about = "of retro encode, elsewhere than beside their store"
    sub.add_argument("--encodings", nargs="+", default=[], metavar="FOLDER", help=about)


def open_generator(
    args: argparse.Namespace, retro: "Retro", source: "NeighborSource | None", beside: "MemoryBeside | None" = None
) -> "Generator":
    """The model with what it reads: neighbors that are encoded already (`add_encodings`) are not encoded again."""
    from retro_engine.generate.generator import Generator

    stores, encoded = source.stores if source is not None else [], []
    if stores or args.encodings:
        from retro_engine.generate.encode_store import open_encodings

        encoded = open_encodings(retro.folder, retro.model.config, retro.tokenizer, stores, args.encodings)
    for file in encoded:
        reporter(args).say(f"encoded neighbors are read from {file.folder}")
    return Generator(retro.model, retro.tokenizer, source, encoded=encoded, beside=beside)


def open_stores(paths: Sequence[str]) -> "list[Store]":
    from retro_engine.data.store import Store

    return [Store(path) for path in paths]


def open_retriever(args: argparse.Namespace, retro: "Retro", retriever: str | None = None) -> "Retriever":
    """`add_sources`' stores, or those of the run, with its retriever (or another one)."""
    from retro_engine.retrieval.search import Building, Retriever
    from retro_engine.train.run_data import run_databases

    stores = open_stores(args.stores) if args.stores else run_databases(retro.folder)
    for store in stores:
        _ = store.tokenizer  # read at the first search: what is damaged shows before the work begins
    return Retriever(stores, retriever or args.retriever, building=Building(embedder=args.embedder))


def library_mode(retriever: str, embedder: str | None = None) -> str:
    """How a library is searched: its words are bm25's, and its vectors those of the `embedder` it was made with."""
    return {"bm25": "lexical", embedder: "dense"}.get(retriever, retriever)


def say_device(args: argparse.Namespace, retro: "Retro") -> None:
    """What --device led to, before the first computation."""
    from retro_engine.model.device import describe_device

    reporter(args).say(describe_device(retro.device))


def check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit} cannot be used", "at least one batch is evaluated")


def count_sequences(args: argparse.Namespace, sequences: "Sequences | Questions") -> int:
    """Sequences of a mode; a batch has 8."""
    count = len(sequences.in_order())
    return count if args.limit is None else min(8 * args.limit, count)


def reporter(args: argparse.Namespace) -> "Reporter":
    from retro_engine.progress import Reporter

    mode = "json" if args.json else "quiet" if args.quiet else "text"
    return Reporter(mode, is_yes=getattr(args, "yes", True))


def print_result(args: argparse.Namespace, result: dict[str, Any]) -> None:
    print(json.dumps(result) if args.json else "\n".join(f"{key}: {value}" for key, value in result.items()))
