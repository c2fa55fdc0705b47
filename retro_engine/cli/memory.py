"""`retro memory`: memories of tokens, which `retro eval --memory` and `retro generate --memory` put beside a model."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from retro_engine.cli import flags
from retro_engine.errors import UsageError

if TYPE_CHECKING:
    from retro_engine.api import Retro
    from retro_engine.memory.knn_memory import KnnMemory
    from retro_engine.memory.ngram_memory import NgramMemory


def add(commands: flags.Commands) -> None:
    kinds = flags.family(commands, "memory", "memories of tokens beside a model: ngram, knn")
    sub = flags.command(kinds, "ngram", run_ngram, "every suffix of a store's text, sorted (no training)")
    sub.add_argument("store", metavar="STORE")
    sub.add_argument("--out", "-o", metavar="FOLDER", help="default: STORE/memory/ngram, where --memory ngram finds it")

    about = "what came after the states of a run's model over its training documents (none is trained)"
    sub = flags.command(kinds, "knn", run_knn, about, ("model.data.",))
    sub.add_argument("path", metavar="RUN", help=flags.RUN_HELP)
    flags.add_device(sub)
    sub.add_argument("--out", "-o", metavar="FOLDER", help="default: RUN/memory/knn, where --memory knn finds it")
    sub.add_argument("--limit", type=int, help="batches, spread evenly (default: all of the training share)")
    sub.add_argument("--share", default="train", choices=["train", "all"], help="which documents")


def run_knn(args: argparse.Namespace) -> int:
    from retro_engine.api import Retro
    from retro_engine.data.batches import Sequences
    from retro_engine.data.files import check_unused
    from retro_engine.evaluate.memories import score_tokens
    from retro_engine.memory.knn_memory import KnnWriter
    from retro_engine.train.run_data import open_evaluation

    flags.check_limit(args.limit)
    retro = Retro.from_pretrained(args.path, device=args.device)
    out = knn_folder(retro) if args.out is None else Path(args.out)
    check_unused(out)
    sequences = open_evaluation(retro.folder, retro.model.config, args.overrides, args.share)
    if not isinstance(sequences, Sequences):
        raise UsageError("retro memory knn cannot be made", "this run is trained on questions", "a run of documents")
    count = flags.count_sequences(args, sequences)
    config = retro.model.config
    writer = KnnWriter(config.hidden_size, count * config.encoder_seq_length)
    with flags.reporter(args).progress("remembering", count, "sequences") as meter:
        mode = "on" if config.retrieval else "off"
        score_tokens(retro.model, sequences, mode, limit=args.limit, advance=meter.advance, record=writer.add)
    made = writer.publish(out, _weights_of(retro), retro.tokenizer.fingerprint)
    flags.print_result(args, {"folder": str(made.folder), **made.summary()})
    return 0


def knn_folder(retro: "Retro") -> Path:
    """Where the memory of a model's states lies: beside its checkpoints, or in an imported one."""
    from retro_engine.data.checkpoint_files import is_imported

    _weights_of(retro)
    folder = retro.folder if is_imported(retro.folder) else retro.folder.parent.parent
    return folder / "memory" / "knn"


def _weights_of(retro: "Retro") -> str:
    """The fingerprint of a checkpoint's weights. Raises UsageError for a model in a file of its own."""
    from retro_engine.data.checkpoint_files import weights_fingerprint

    if retro.folder.is_file():
        raise UsageError(f"{retro.folder} has no memory of states", "it is no checkpoint", "retro import it first")
    return weights_fingerprint(retro.folder)


def run_ngram(args: argparse.Namespace) -> int:
    from retro_engine.data.store import Store
    from retro_engine.memory.ngram_memory import build_ngram_memory, ngram_folder

    store = Store(args.store)
    made = build_ngram_memory(store, ngram_folder(store) if args.out is None else Path(args.out))
    flags.print_result(args, {"folder": str(made.folder), **made.summary()})
    return 0


def add_flags(sub: argparse.ArgumentParser, more: str) -> None:
    """What puts a memory beside a model."""
    about = (
        "a memory beside the model: ngram (of the run's store: retro memory), knn (of its states), or the folder of one"
    )
    sub.add_argument("--memory", metavar="NAME", help=about)
    about = f"a file of eval --memory-out, or one weight for every suffix that is found; {more}"
    sub.add_argument("--memory-weights", metavar="FILE", help=about)


def check_flags(args: argparse.Namespace, *names: str) -> None:
    """Raises UsageError for flags of a memory where there is none."""
    for name in ("memory_weights", *names):
        if getattr(args, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} is of a memory", "none is read", "--memory ngram")


def open_memory(args: argparse.Namespace, retro: "Retro") -> "NgramMemory | KnnMemory":
    """The memory that --memory names. Raises StoreError for one of another tokenizer, or of another model's states."""
    from retro_engine.data import files
    from retro_engine.generate.open_memory import KNN, ngram_place
    from retro_engine.memory.knn_memory import KnnMemory
    from retro_engine.memory.ngram_memory import NgramMemory

    is_of_states = args.memory == KNN
    folder = knn_folder(retro) if is_of_states else ngram_place(args.memory, retro.folder, args.overrides)
    if is_of_states or files.kind_in(folder) == "knn":
        states = KnnMemory(folder)
        states.check(retro.tokenizer.fingerprint, _weights_of(retro), str(retro.folder))
        return states
    memory = NgramMemory(folder)
    memory.check(retro.tokenizer.fingerprint, str(retro.folder))
    return memory
