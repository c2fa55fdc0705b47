"""The memory that stands beside a model while it decodes: which folder a name means, and how much of it is believed."""

from collections.abc import Sequence
from pathlib import Path

from retro_engine.data import files
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import MissingInputError, UsageError
from retro_engine.memory.mixture import Mixture
from retro_engine.memory.next_token import MemoryBeside
from retro_engine.memory.ngram_memory import NgramMemory, ngram_folder
from retro_engine.train.run_data import training_store

NGRAM, KNN = "ngram", "knn"  # names that a command line takes in place of a folder


def ngram_place(name: str, checkpoint_folder: Path, overrides: Sequence[str] = ()) -> Path:
    """The folder of an n-gram memory: that of the store of a checkpoint's run, or `name` itself.

    Raises MissingInputError where the checkpoint names no store.
    """
    if name != NGRAM:
        return Path(name)
    store = training_store(checkpoint_folder, [*overrides])
    if store is None:
        raise MissingInputError("--memory ngram has no store", f"{checkpoint_folder} names none", "--memory FOLDER")
    return ngram_folder(store)


def read_weights(said: str, memory: str) -> Mixture:
    """A number, or a file of the memory with this fingerprint. Raises UsageError for what is no share."""
    try:
        weight = float(said)
    except ValueError:
        return Mixture.load(Path(said), memory)
    return Mixture.even(weight)


def open_beside(
    name: str, weights: str | None, checkpoint_folder: Path, tokenizer: Tokenizer, overrides: Sequence[str] = ()
) -> MemoryBeside:
    """Raises UsageError for a memory of states and for one without weights, StoreError for one of another tokenizer."""
    if weights is None:
        why = "how much of it is believed is fitted on documents"
        raise UsageError("--memory has no weights", why, "retro eval RUN --memory ngram --memory-out FILE")
    if name == KNN or files.kind_in(Path(name)) == "knn":
        why = "while decoding no states are looked up: it would take a search a token"
        raise UsageError(f"--memory {name} cannot be read while decoding", why, "--memory ngram")
    memory = NgramMemory(ngram_place(name, checkpoint_folder, overrides))
    memory.check(tokenizer.fingerprint, str(checkpoint_folder))
    return MemoryBeside(memory, read_weights(weights, memory.manifest["fingerprint"]))
