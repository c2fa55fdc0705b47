"""Checkpoints: one folder a step, written aside and renamed; the training checkpoint is the inference checkpoint.

Reads and writes RUN/checkpoints/step-NNNNNN/: config.json, model.safetensors (or, of adapters, adapters.safetensors with
what learns and adapters.json with what they stand beside: train/adapters.py), tokenizer.json,
generation_config.json, tokenizer_config.json (where the model has a chat template or names of its own for special tokens:
`data.chat_files`), README.md, trainer.json, optimizer/*.safetensors (state and random numbers, each process writes
its shards through torch.distributed.checkpoint; any number of processes reads them) and, last, COMPLETE, which has the
SHA-256 of every other file. A checkpoint exists when COMPLETE and all that it names do. On its way in and out it has a
name (.step-NNNNNN.tmp, .old) that nobody lists, so that a kill leaves no half of one.
"""

import contextlib
import errno
import hashlib
import math
import os
import re
import threading
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retro_engine.config import LoraConfig
from retro_engine.data import files, manifests
from retro_engine.data.chat_files import CONFIG_FILE as TOKENIZER_CONFIG_FILE
from retro_engine.data.checkpoint_files import (
    ADAPTERS_FILE,
    BASE_FILE,
    COMPLETE,
    CONFIG_FILE,
    GENERATION_FILE,
    OPTIMIZER_FOLDER,
    TOKENIZER_FILE,
    TRAINER_FILE,
    WEIGHTS_FILE,
    best_of,
    complete_checkpoints,
    damaged,
    find_checkpoint,
    flaw,
    is_imported,
    newest_checkpoint,
    read_generation,
    read_trainer,
    refuse_file,
    valid_loss,
    validated_on,
    verify,
    weights_fingerprint,
)
from retro_engine.data.coding import Coding
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import (
    REMEDIES,
    OutOfResourceError,
    StoreError,
    UsageError,
    read_error,
    system_error,
    typed,
    write_error,
    writing,
)
from retro_engine.model.linear import is_sharded
from retro_engine.model.memory import safetensors_parts
from retro_engine.model.retro import RetroModel
from retro_engine.model.weights import config_to_json, read_config
from retro_engine.progress import note
from retro_engine.train.optimizer import Optimizer
from retro_engine.train.parallel import Parallel
from retro_engine.train.record import Say

__all__ = [  # whether a checkpoint is there and whole is read without PyTorch
    "ADAPTERS_FILE",
    "BASE_FILE",
    "COMPLETE",
    "complete_checkpoints",
    "find_checkpoint",
    "is_imported",
    "newest_checkpoint",
    "read_generation",
    "read_trainer",
    "verify",
    "weights_fingerprint",
]
_LEFTOVER = re.compile(r"\.step-[0-9]{1,18}\.(tmp|old|lock)")
# What a resumed run needs of trainer.json.
_STATE = ("tokens_seen", "train_s", "precision", "mean_loss", "loss_scale", "good_steps", "fingerprints", "stream")


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


@dataclass(frozen=True, kw_only=True)
class Base:
    """The checkpoint beside whose weights adapters learn."""

    folder: Path
    fingerprint: str  # of its weights
    lora: LoraConfig


class Saver:
    """Saves in the background: a step waits only while the state is copied, and for the save before it."""

    def __init__(
        self,
        run: Path,
        parallel: Parallel,
        keep_last_n: int,
        keeps_best: bool,
        say: Say = note,
        *,
        base: Base | None = None,
    ):
        """With a `base` only what learns is saved. Removes what a killed writer left half-written or half-removed: the
        caller has the run's lock.
        """
        self.run, self.parallel, self.keep_last_n, self.keeps_best = run, parallel, keep_last_n, keeps_best
        self.say, self.base = say, base
        if parallel.is_main:
            for path in (run / "checkpoints").glob(".step-*"):
                if _LEFTOVER.fullmatch(path.name):
                    files.remove_tree(path)
                    if path.suffix == files.LOCK:  # the run's own lock is held
                        path.unlink(missing_ok=True)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        step: int,
        model: RetroModel,
        optimizer: Optimizer,
        tokenizer: Tokenizer,
        trainer: dict[str, Any],
        generation: dict[str, Any],
    ) -> None:
        """Begin to write RUN/checkpoints/step-NNNNNN. Raises what the save before it met (`wait`)."""
        self.wait()
        final = folder_of(self.run, step)
        is_there = self.parallel.is_main and (final / COMPLETE).is_file() and not flaw(final)
        if self.parallel.from_main(is_there):  # a run that was resumed at its end
            return
        publishing, aside = contextlib.ExitStack(), final
        if self.parallel.is_main:
            aside = publishing.enter_context(files.publish_folder(final))
            files.make_folder(aside / OPTIMIZER_FOLDER)
        aside = self.parallel.from_main(aside)  # nobody writes before the folder is there
        learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        weights = _whole(model, self.parallel.is_main, None if self.base is None else learns)
        contents = _contents(model, tokenizer, {"step": step, **trainer}, generation)
        if self.base is not None:
            contents[BASE_FILE] = _base_json(self.base, final)
        write_shards = _staged(optimizer, aside / OPTIMIZER_FOLDER, self.parallel)
        self._thread = threading.Thread(
            target=self._write, args=(write_shards, publishing, aside, final, weights, contents)
        )
        self._thread.start()

    def _write(
        self,
        write_shards: Callable[[], None],
        publishing: contextlib.ExitStack,
        aside: Path,
        final: Path,
        weights: dict[str, Tensor],
        contents: dict[str, bytes],
    ) -> None:
        """In the background: shards of every process; then the first one adds the rest and publishes."""
        try:
            with publishing:
                write_shards()
                hashes = self._shard_hashes(aside)
                if not self.parallel.is_main:
                    return
                name = WEIGHTS_FILE if self.base is None else ADAPTERS_FILE
                _complete(aside, contents, {name: weights}, hashes)
                with writing(final):
                    _discard(final)  # never whole: see above
            self._prune()
        except BaseException as error:  # noqa: B036 (kept for `wait`, which raises it)
            self._error = _typed(error, final)

    def _shard_hashes(self, aside: Path) -> dict[str, str]:
        """Of the optimizer's files, when they are on the disk: each process reads a share."""
        own, met = dict[str, str](), None
        try:
            folder = aside / OPTIMIZER_FOLDER
            for path in sorted(folder.iterdir())[self.parallel.rank :: self.parallel.world]:
                files.sync(path)
                own[f"{OPTIMIZER_FOLDER}/{path.name}"] = files.sha256_file(path)
        except OSError as error:
            met = write_error(error, aside)
        return self.parallel.joined(own, met)

    def wait(self) -> None:
        """Until the last save is published. Raises what it met, in every process; earlier checkpoints are then untouched."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if not self.parallel.any(int(error is not None)):
            return
        if error is None:
            what = "another process could not save its part of the checkpoint"
            raise OutOfResourceError(
                what, "it says why; earlier checkpoints are untouched", "run the same command again"
            )
        raise error

    def _prune(self) -> None:
        """Remove all but the last ones and the one with the lowest validation loss."""
        if self.keep_last_n == 0:
            return
        complete = complete_checkpoints(self.run, self.say)
        best: Path | None = None
        if self.keeps_best:
            best = best_of(complete) if complete else None
        for path in complete[: -self.keep_last_n]:
            if path != best:
                try:
                    _discard(path)
                except OSError as error:  # what was saved is saved
                    self.say(f"{path} cannot be removed: {error.strerror}")


def _typed(error: BaseException, final: Path) -> BaseException:
    """What a save met, naming the checkpoint. Writers of other projects hide the system's error in theirs."""
    from safetensors import SafetensorError
    from torch.distributed.checkpoint import CheckpointException

    if isinstance(error, CheckpointException):  # of any process; where there is one alone, its error comes bare
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError):
        return write_error(error, final)
    if isinstance(error, SafetensorError):
        return write_error(system_error(error) or OSError(errno.EIO, str(error)), final)
    if isinstance(error, MemoryError):
        return write_error(system_error(error) or OSError(errno.ENOMEM, str(error)), final)
    return typed(error) or error


def best_loss(run: Path, mark: str | None) -> float:
    """The lowest validation loss of a run's checkpoints that was measured on what `mark` names; infinite where none was."""
    complete = complete_checkpoints(run, lambda flaw: None)  # who looked where to go on has said it
    alike = [path for path in complete if validated_on(read_trainer(path)) == mark]
    return min(map(valid_loss, alike), default=math.inf)


def _discard(folder: Path) -> None:
    """Remove a checkpoint, or what is at its place: in one step it is no checkpoint any more, then it is emptied."""
    if folder.is_symlink():  # somebody's own place for it: what is there stays
        folder.unlink()
    elif folder.exists():
        aside = folder.with_name(f".{folder.name}.old")
        files.remove_tree(aside)
        os.rename(folder, aside)
        files.sync(folder.parent)
        files.remove_tree(aside)


def publish_model(
    folder: Path, model: RetroModel, tokenizer: Tokenizer, trainer: dict[str, Any], generation: dict[str, Any]
) -> None:
    """A checkpoint that no training wrote: FOLDER with weights, tokenizer and settings, without an optimizer.

    Raises UsageError for a folder that holds something.
    """
    files.check_unused(folder)
    weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    contents = _contents(model, tokenizer, {"step": 0, **trainer}, generation)
    with files.publish_folder(folder) as aside:
        _complete(aside, contents, {WEIGHTS_FILE: weights}, {})


def _contents(
    model: RetroModel, tokenizer: Tokenizer, trainer: dict[str, Any], generation: dict[str, Any]
) -> dict[str, bytes]:
    """The files of a checkpoint but for tensors."""
    named = tokenizer.chat_files.tokenizer_config()
    return {
        CONFIG_FILE: config_to_json(model.config).encode(),
        TOKENIZER_FILE: tokenizer.json_beside(None).encode(),
        GENERATION_FILE: files.json_bytes(generation | {"eos_token_id": tokenizer.end_ids}),
        **({TOKENIZER_CONFIG_FILE: files.json_bytes(named)} if named else {}),
        "README.md": _readme(model, trainer["step"]).encode(),
        TRAINER_FILE: files.json_bytes(trainer),
    }


def _complete(
    folder: Path, contents: dict[str, bytes], tensors: dict[str, dict[str, Tensor]], hashes: dict[str, str]
) -> None:
    """Write the files, and COMPLETE, with their hashes and `hashes` of those that are there; all are on the disk before."""
    with writing(folder):
        files.sync_tree(folder)
    written: dict[str, list[bytes | memoryview]] = {name: [content] for name, content in contents.items()}
    written |= {name: safetensors_parts(those) for name, those in tensors.items()}
    for name, parts in written.items():
        files.publish(folder / name, parts)
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        hashes = {**hashes, name: digest.hexdigest()}
    files.publish(folder / COMPLETE, [files.json_bytes(hashes, is_sorted=True)])


def _whole(model: RetroModel, is_main: bool, only: set[str] | None) -> dict[str, Tensor]:
    """The weights (of `only` these names), gathered and copied to the first process's host memory."""
    whole = {}
    for name, value in model.state_dict().items():
        if only is not None and name not in only:
            continue
        tensor = value.full_tensor() if is_sharded(value) else value
        if is_main:
            whole[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return whole


def _staged(optimizer: Optimizer, folder: Path, parallel: Parallel) -> Callable[[], None]:
    """Copy this process's optimizer state and random numbers; what is returned writes them."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    state = {name: value.detach().to("cpu", copy=True) for name, value in optimizer.state().items()}
    state[f"random_state.{parallel.rank}"] = torch.get_rng_state()
    if parallel.device.type == "cuda":
        state[f"cuda_random_state.{parallel.rank}"] = torch.cuda.get_rng_state()

    def write() -> None:
        writer = HuggingFaceStorageWriter(path=str(folder), save_distributed=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "assuming the intent is to save in a single process": it is
            dcp.save(state, storage_writer=writer, process_group=parallel.background, no_dist=parallel.world == 1)

    return write


def read_coding(folder: Path, chunk_size: int) -> Coding:
    """What the stores that a checkpoint's model reads must have; a plain decoder reads chunks of any size, `chunk_size`."""
    refuse_file(folder)
    config = read_config(folder)
    tokenizer = Tokenizer.load(folder).fingerprint
    return Coding(str(folder), tokenizer, config.chunk_size if config.retrieval else chunk_size, "model")


def _base_json(base: Base, checkpoint: Path) -> bytes:
    """adapters.json; the base's folder as it lies from the checkpoint, so that both can be moved together."""
    place = os.path.relpath(base.folder.resolve(), checkpoint.resolve())
    return files.json_bytes({"base": place, "fingerprint": base.fingerprint, **asdict(base.lora)})


def read_base(checkpoint: Path) -> Base | None:
    """What a checkpoint's adapters stand beside; None = it has all of its weights. Raises StoreError when it is damaged."""
    path = checkpoint / BASE_FILE
    if not path.is_file():
        return None
    try:
        values = files.read_object(path)
        manifests.ADAPTERS(values, BASE_FILE)
    except ValueError as error:
        raise damaged(path, str(error)) from error
    lora = LoraConfig(**{name: values[name] for name in asdict(LoraConfig())})
    folder = Path(os.path.normpath(checkpoint.resolve() / values["base"]))
    return Base(folder=folder, fingerprint=values["fingerprint"], lora=lora)


def load_optimizer(checkpoint: Path, optimizer: Optimizer, parallel: Parallel) -> None:
    """Restore the optimizer's state and, where this process had one, its random numbers.

    Raises StoreError for what cannot be read, or is not of this model, UsageError for another optimizer's state.
    """
    from safetensors import SafetensorError
    from torch.distributed.checkpoint import CheckpointException

    # RuntimeError: also nesting, and random numbers' states. CheckpointException: what any process met while it read.
    flaws = (
        SafetensorError,
        OSError,
        CheckpointException,
        LookupError,
        ValueError,
        TypeError,
        RuntimeError,
        MemoryError,
    )
    try:
        _load_shards(str(checkpoint / OPTIMIZER_FOLDER), optimizer, parallel)
    except (torch.OutOfMemoryError, UsageError):
        raise
    except (*flaws, AssertionError) as error:
        met = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        refused = met if isinstance(met, OSError) else system_error(met)
        if refused is not None and refused.errno in REMEDIES:
            raise read_error(refused, checkpoint / OPTIMIZER_FOLDER) from error
        why = f"{type(met).__name__}: {str(met)[:200]}"
        what = f"{checkpoint / OPTIMIZER_FOLDER} cannot be read"
        raise StoreError(what, why, "resume from another checkpoint, or --init-from takes its weights alone") from error


def _load_shards(folder: str, optimizer: Optimizer, parallel: Parallel) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    names = set(HuggingFaceStorageReader(folder).read_metadata().state_dict_metadata)
    own = {f"random_state.{parallel.rank}": torch.get_rng_state()}
    if parallel.device.type == "cuda":
        own[f"cuda_random_state.{parallel.rank}"] = torch.cuda.get_rng_state()
    own = {name: value for name, value in own.items() if name in names}
    state = optimizer.template(sorted(name for name in names if "random_state." not in name)) | own
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "assuming the intent is to load in a single process": it is
        dcp.load(
            state,
            storage_reader=HuggingFaceStorageReader(folder),
            process_group=parallel.background,
            no_dist=parallel.world == 1,
        )
    for name in own:
        if name.startswith("cuda"):
            torch.cuda.set_rng_state(state[name])
        else:
            torch.set_rng_state(state[name])


def read_state(checkpoint: Path) -> dict[str, Any]:
    """trainer.json of a checkpoint that a run goes on from. Raises StoreError naming what it does not have."""
    state = read_trainer(checkpoint)
    missing = [name for name in _STATE if name not in state]
    if missing:
        raise damaged(checkpoint / TRAINER_FILE, f"it has no {', '.join(missing)}")
    return state


def _readme(model: RetroModel, step: int) -> str:
    c = model.config
    if not c.retrieval:
        kind, command = "plain decoder, which reads no neighbors,", "`retro generate FOLDER PROMPT` goes on with a text"
    else:
        kind = "decoder that reads neighbors in front of its own keys" if c.reads_prefix else "RETRO"
        command = "`retro generate FOLDER PROMPT --stores STORE` answers with retrieval"
    return (
        f"# A {kind} of {model.num_parameters / 1e6:.1f} M parameters, step {step}\n\n"
        f'Written by retro-engine. {command};\n`Retro.from_pretrained("FOLDER")` loads it in Python.\n'
    )
