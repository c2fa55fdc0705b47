"""Which files a checkpoint's folder consists of, which checkpoints are complete, which one of a run is read, and whether they
are what was written.

Reads RUN/checkpoints/step-NNNNNN/: COMPLETE, trainer.json, generation_config.json (train/checkpoint.py writes them). Without
PyTorch, so that a command can hash what it opens while PyTorch is loaded.
"""

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from retro_engine.data import files, manifests
from retro_engine.data.inputs import nearest_path
from retro_engine.errors import MissingInputError, RetroError, StoreError, UsageError
from retro_engine.progress import note

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
COMPLETE = "COMPLETE"
ADAPTERS_FILE, BASE_FILE = "adapters.safetensors", "adapters.json"
OPTIMIZER_FOLDER = "optimizer"
TRAINER_FILE = "trainer.json"
GENERATION_FILE = "generation_config.json"
_NAME = re.compile(r"step-([0-9]{1,18})")

Say = Callable[[str], None]


def complete_checkpoints(run: Path, say: Say = note) -> list[Path]:
    """The complete checkpoints of a run, oldest first. What is there and cannot be read is said by name and left out."""
    steps = {path: _NAME.fullmatch(path.name) for path in (run / "checkpoints").glob("step-*")}
    found = []
    for path, step in sorted((path, int(name[1])) for path, name in steps.items() if name is not None):
        if (path / COMPLETE).is_file():
            if why := flaw(path):
                say(f"{path} cannot be read and is passed over: {why}")
            else:
                found.append((step, path))
    return [path for _, path in sorted(found)]


def flaw(checkpoint: Path) -> str:
    """Why a checkpoint cannot be read, as far as one sees without hashing it; "" = it can."""
    try:
        missing = [name for name in hashes_of(checkpoint) if not (checkpoint / name).is_file()]
        if missing:
            return f"{missing[0]} is missing"
        read_trainer(checkpoint)
    except StoreError as error:
        return ": ".join(part for part in (error.what, error.why) if part)
    return ""


def refuse_file(path: Path) -> None:
    """Raises UsageError for a GGUF file, of which only who generates or evaluates losses makes a model as it is."""
    if path.suffix == ".gguf" and path.is_file():
        why = "its weights are in blocks, which generate, serve and eval (losses) read as they are"
        raise UsageError(
            f"{path} cannot be used here", why, f"retro import {path} --out FOLDER makes a checkpoint of it"
        )


def find_checkpoint(path: str | Path) -> Path:
    """A checkpoint folder; or of a run's folder, or of one that holds a run, the complete checkpoint with the lowest
    validation loss (`best_of`). Raises MissingInputError, UsageError where a folder holds several runs.
    """
    path = Path(path)
    if (path / COMPLETE).is_file():
        return path
    found = _checkpoints_of(path)
    best = best_of(found)
    newest = found[-1]
    if best != newest:
        why = "was not validated" if math.isinf(valid_loss(newest)) else "has a higher one"
        note(f"{best} is read, for its validation loss: {newest.name}, the newest, {why}")
    return best


def newest_checkpoint(path: str | Path) -> Path:
    """As `find_checkpoint`, but the newest: where a run goes on."""
    path = Path(path)
    return path if (path / COMPLETE).is_file() else _checkpoints_of(path)[-1]


def best_of(checkpoints: Sequence[Path]) -> Path:
    """The one with the lowest validation loss, of those that were validated on what the newest one was that was validated
    at all: losses on other data say nothing of each other. The last where none was measured, or the last is as good.
    """
    states = [read_trainer(checkpoint) for checkpoint in checkpoints]
    measured = [state for state in states if state.get("valid_loss") is not None]
    if not measured:
        return checkpoints[-1]
    mark = validated_on(measured[-1])
    alike = [path for path, state in zip(checkpoints, states) if validated_on(state) == mark]
    return min(reversed(alike), key=valid_loss)


def validated_on(state: Mapping[str, Any]) -> str | None:
    """The mark of what trainer.json's validation loss was measured on; None in those of earlier versions."""
    return state.get("validated_on")


def valid_loss(checkpoint: Path) -> float:
    """Of its own step; infinite where none was measured, or none that is a number."""
    loss = read_trainer(checkpoint).get("valid_loss")
    return loss if isinstance(loss, float) and math.isfinite(loss) else math.inf


def _checkpoints_of(path: Path) -> list[Path]:
    """Those of a run, or of the one run in a folder (a demo's), which is said; oldest first, at least one."""
    refuse_file(path)
    found = complete_checkpoints(path)
    if found:
        return found
    inside = [folder for folder in sorted(path.glob("*/checkpoints")) if any(folder.glob(f"step-*/{COMPLETE}"))]
    runs = [folder.parent for folder in inside if complete_checkpoints(folder.parent)]
    if len(runs) > 1:
        names = ", ".join(run.name for run in runs)
        raise UsageError(f"{path} holds {len(runs)} runs: {names}", "one is read", f"name one: {runs[0]}")
    if not runs:
        why = "it has no complete checkpoint" if path.is_dir() else nearest_path(path) or "there is no such folder"
        raise MissingInputError(f"{path} is not a trained run", why, "retro train writes one")
    note(f"{runs[0]} is the run in {path}")
    return complete_checkpoints(runs[0])


def verify(checkpoint: Path, has_state: bool = True, part: tuple[int, int] = (0, 1)) -> None:
    """Compare every file with COMPLETE; `has_state` False: but for the optimizer's, which who does not train does not read.
    `part` (i, n): the i-th of n shares of them, which n processes compare beside each other.

    Raises StoreError for the first that is damaged.
    """
    entries = hashes_of(checkpoint)
    weights = {ADAPTERS_FILE, BASE_FILE} if ADAPTERS_FILE in entries else {WEIGHTS_FILE}
    missing = {CONFIG_FILE, TOKENIZER_FILE, GENERATION_FILE, TRAINER_FILE, *weights} - entries.keys()
    is_trained = TRAINER_FILE in missing or "imported" not in read_trainer(checkpoint)
    state = {name for name in entries if name.startswith(f"{OPTIMIZER_FOLDER}/")}
    if is_trained and not state:
        missing.add(OPTIMIZER_FOLDER)
    if missing:
        raise damaged(checkpoint / COMPLETE, f"it does not name {', '.join(sorted(missing))}")
    read = {name: value for name, value in entries.items() if has_state or name not in state}
    names = sorted(read)[part[0] :: part[1]]
    files.verify_files(checkpoint, {name: read[name] for name in names}, depth=2)  # optimizer/shard-...


def opened(path: str | Path) -> Path:
    """`find_checkpoint`, whose files are what was written: what can be read for generation."""
    folder = find_checkpoint(path)
    verify(folder, has_state=False)
    return folder


def opening(path: str | Path) -> Future[Path]:
    """`opened` beside what the caller does meanwhile."""
    pool = ThreadPoolExecutor(1, "opening")
    future = pool.submit(opened, path)
    pool.shutdown(wait=False)
    return future


def damaged(path: Path, why: str) -> StoreError:
    return StoreError(f"{path} is damaged", why, "resume from another checkpoint")


def hashes_of(checkpoint: Path) -> dict[str, str]:
    """COMPLETE: file -> SHA-256. Raises StoreError when it is damaged."""
    path = checkpoint / COMPLETE
    try:
        hashes = files.read_object(path)
    except MissingInputError as error:
        raise StoreError(f"{path} cannot be read", error.why, "resume from another checkpoint") from error
    try:
        manifests.COMPLETE(hashes, COMPLETE)
    except ValueError as error:
        raise damaged(path, str(error)) from error
    return hashes


def weights_fingerprint(checkpoint: Path) -> str:
    """Of a checkpoint's weights: the file's hash; of adapters also their base's. Raises StoreError where COMPLETE is damaged."""
    hashes = hashes_of(checkpoint)
    names = (ADAPTERS_FILE, BASE_FILE) if ADAPTERS_FILE in hashes else (WEIGHTS_FILE,)
    parts = [hashes.get(name, "") for name in names]
    return parts[0] if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()


def is_imported(checkpoint: Path) -> bool:
    """Whether a checkpoint comes from `retro import`, not from a run."""
    return (checkpoint / TRAINER_FILE).is_file() and "imported" in read_trainer(checkpoint)


def read_trainer(checkpoint: Path) -> dict[str, Any]:
    """trainer.json of a checkpoint. Raises StoreError when it is missing or damaged."""
    path = checkpoint / TRAINER_FILE
    try:
        state = files.read_object(path)
        manifests.TRAINER(state, TRAINER_FILE)
    except (MissingInputError, ValueError) as error:
        raise damaged(path, error.why if isinstance(error, RetroError) else str(error)) from error
    return state


def read_generation(checkpoint: Path) -> dict[str, Any]:
    """How the model samples when nothing is said: greedy, temperature, top_k, top_p."""
    try:
        values = files.read_object(checkpoint / GENERATION_FILE)
        manifests.GENERATION(values, GENERATION_FILE)
        return {key: values[key] for key in ("greedy", "temperature", "top_k", "top_p")}
    except (MissingInputError, StoreError):
        raise
    except ValueError as error:
        raise StoreError(f"{checkpoint / GENERATION_FILE} is damaged", str(error)) from error
