"""`retro memory`: memories of tokens, which `retro eval --memory` and `retro generate --memory` put beside a model."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from retro_engine.cli import flags
from retro_engine.errors import MissingInputError, UsageError

if TYPE_CHECKING:
    from retro_engine.api import Retro
    from retro_engine.memory.mixture import Mixture
    from retro_engine.memory.ngram_memory import NgramMemory


def add(commands: flags.Commands) -> None:
    kinds = flags.family(commands, "memory", "memories of tokens beside a model: ngram")
    sub = flags.command(kinds, "ngram", run_ngram, "every suffix of a store's text, sorted (no training)")
    sub.add_argument("store", metavar="STORE")
    sub.add_argument("--out", "-o", metavar="FOLDER", help="default: STORE/memory/ngram, where --memory ngram finds it")


def run_ngram(args: argparse.Namespace) -> int:
    from retro_engine.data.store import Store
    from retro_engine.memory.ngram_memory import build_ngram_memory, ngram_folder

    store = Store(args.store)
    made = build_ngram_memory(store, ngram_folder(store) if args.out is None else Path(args.out))
    flags.print_result(args, {"folder": str(made.folder), **made.summary()})
    return 0


def add_flags(sub: argparse.ArgumentParser, more: str) -> None:
    """What puts a memory beside a model."""
    about = "a memory beside the model: ngram (of the run's store: retro memory ngram), or the folder of one"
    sub.add_argument("--memory", metavar="NAME", help=about)
    about = f"a file of eval --memory-out, or one weight for every suffix that is found; {more}"
    sub.add_argument("--memory-weights", metavar="FILE", help=about)


def check_flags(args: argparse.Namespace, *names: str) -> None:
    """Raises UsageError for flags of a memory where there is none."""
    for name in ("memory_weights", *names):
        if getattr(args, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} is of a memory", "none is read", "--memory ngram")


def open_memory(args: argparse.Namespace, retro: "Retro") -> "NgramMemory":
    """The memory that --memory names. Raises StoreError for one of another tokenizer."""
    from retro_engine.memory.ngram_memory import NgramMemory, ngram_folder
    from retro_engine.train.run_data import training_store

    folder = Path(args.memory)
    data = [text for text in args.overrides if text.lstrip("+").startswith("model.data.")]
    if args.memory == "ngram":
        store = training_store(retro.folder, data)
        if store is None:
            raise MissingInputError("--memory ngram has no store", f"{retro.folder} names none", "--memory FOLDER")
        folder = ngram_folder(store)
    memory = NgramMemory(folder)
    memory.check(retro.tokenizer.fingerprint, str(retro.folder))
    return memory


def open_weights(args: argparse.Namespace, memory: "NgramMemory") -> "Mixture":
    """What --memory-weights names: a number, or a file of this memory. Raises UsageError for what is no share."""
    from retro_engine.memory.mixture import Mixture

    try:
        weight = float(args.memory_weights)
    except ValueError:
        return Mixture.load(Path(args.memory_weights), memory.manifest["fingerprint"])
    return Mixture.even(weight)
