"""Checkpoints: one folder a step, written aside and renamed; the training checkpoint is the inference checkpoint.

Reads and writes RUN/checkpoints/step-NNNNNN/: config.json, model.safetensors, tokenizer.json,
generation_config.json, README.md, optimizer.safetensors (with the random state), trainer.json and, last,
COMPLETE, which has the SHA-256 of every other file. A checkpoint exists when COMPLETE does.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from retro_engine.data import files
from retro_engine.data.tokenizer import FILE as TOKENIZER_FILE
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import MissingInputError, StoreError
from retro_engine.model.retro import RetroModel
from retro_engine.model.weights import CONFIG_FILE, WEIGHTS_FILE, config_to_json

COMPLETE = "COMPLETE"
OPTIMIZER_FILE = "optimizer.safetensors"
TRAINER_FILE = "trainer.json"
GENERATION_FILE = "generation_config.json"


def save(
    run: Path,
    step: int,
    model: RetroModel,
    optimizer: torch.optim.Optimizer,
    tokenizer: Tokenizer,
    trainer: dict[str, Any],
    generation: dict[str, Any],
    keep_last_n: int,
) -> Path:
    """Publish RUN/checkpoints/step-NNNNNN and remove the oldest ones. Raises OutOfResourceError for a full disk;
    earlier checkpoints are then untouched.
    """
    from safetensors.torch import save as to_bytes

    base = run / "checkpoints"
    files.make_folder(base)
    final = base / f"step-{step:06d}"
    if (final / COMPLETE).is_file():  # a run that was resumed at its end has nothing new to say
        return final
    aside = base / f".step-{step:06d}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    files.make_folder(aside)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = {"random_state": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda_random_state"] = torch.cuda.get_rng_state()
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            tensors[f"{key}.{names[id(parameter)]}"] = value.detach().cpu().contiguous()
    contents = {
        CONFIG_FILE: config_to_json(model.config).encode(),
        WEIGHTS_FILE: to_bytes({name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}),
        TOKENIZER_FILE: tokenizer.json.encode(),
        GENERATION_FILE: (json.dumps(generation, indent=1) + "\n").encode(),
        "README.md": _readme(model, step).encode(),
        OPTIMIZER_FILE: to_bytes(tensors),
        TRAINER_FILE: (json.dumps({"step": step, **trainer}, indent=1) + "\n").encode(),
    }
    try:
        for name, content in contents.items():
            files.publish(aside / name, [content])
        hashes = {name: files.sha256_file(aside / name) for name in contents}
        files.publish(aside / COMPLETE, [(json.dumps(hashes, indent=1) + "\n").encode()])
        shutil.rmtree(final, ignore_errors=True)  # never complete: see above
        os.rename(aside, final)
        files.sync_folder(base)
    except BaseException:  # a signal too: nothing half-written is left
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for old in complete_checkpoints(run)[:-keep_last_n] if keep_last_n > 0 else []:
        shutil.rmtree(old)
    return final


def complete_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in (run / "checkpoints").glob("step-*") if path.name[5:].isdigit()]
    return sorted((path for path in found if (path / COMPLETE).is_file()), key=lambda path: int(path.name[5:]))


def find_checkpoint(path: str | Path) -> Path:
    """A checkpoint folder, or the newest complete checkpoint of a run's folder. Raises MissingInputError."""
    path = Path(path)
    if (path / COMPLETE).is_file():
        return path
    found = complete_checkpoints(path)
    if not found:
        why = "it has no complete checkpoint" if path.is_dir() else "there is no such folder"
        raise MissingInputError(f"{path} is not a trained run", why, "retro train writes one")
    return found[-1]


def verify(checkpoint: Path) -> None:
    """Compare every file with COMPLETE. Raises StoreError for the first that is damaged."""
    try:
        hashes = json.loads((checkpoint / COMPLETE).read_text())
        entries = {str(name): str(value) for name, value in hashes.items()}
    except (ValueError, AttributeError) as error:
        raise StoreError(f"{checkpoint / COMPLETE} is damaged", str(error), "resume from another checkpoint") from error
    missing = {
        CONFIG_FILE,
        WEIGHTS_FILE,
        TOKENIZER_FILE,
        GENERATION_FILE,
        OPTIMIZER_FILE,
        TRAINER_FILE,
    } - entries.keys()
    if missing:
        raise StoreError(
            f"{checkpoint / COMPLETE} is damaged",
            f"it does not name {', '.join(sorted(missing))}",
            "resume from another checkpoint",
        )
    files.verify_files(checkpoint, entries)


def load_training_state(checkpoint: Path, model: RetroModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore weights, optimizer and random state in place; return trainer.json."""
    from safetensors.torch import load_file

    from retro_engine.model.weights import load_state

    verify(checkpoint)
    load_state(model, load_file(checkpoint / WEIGHTS_FILE), str(checkpoint / WEIGHTS_FILE))
    tensors = load_file(checkpoint / OPTIMIZER_FILE)
    torch.set_rng_state(tensors.pop("random_state"))
    cuda_random_state = tensors.pop("cuda_random_state", None)
    if cuda_random_state is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda_random_state)
    for name, parameter in model.named_parameters():
        entries = {key.split(".", 1)[0]: value for key, value in tensors.items() if key.split(".", 1)[1] == name}
        if entries:
            device = parameter.device
            optimizer.state[parameter] = {key: value.to(device) for key, value in entries.items()}
    return read_trainer(checkpoint)


def read_trainer(checkpoint: Path) -> dict[str, Any]:
    """trainer.json of a checkpoint. Raises StoreError when it is missing or damaged."""
    try:
        state = json.loads((checkpoint / TRAINER_FILE).read_text())
        return {**state, "step": int(state["step"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{checkpoint / TRAINER_FILE} is damaged", str(error), "resume from another checkpoint"
        ) from error


def read_generation(checkpoint: Path) -> dict[str, Any]:
    """How the model samples when nothing is said: greedy, temperature, top_k, top_p."""
    try:
        values = json.loads((checkpoint / GENERATION_FILE).read_text())
        return {key: values[key] for key in ("greedy", "temperature", "top_k", "top_p")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{checkpoint / GENERATION_FILE} is damaged", str(error)) from error


def _readme(model: RetroModel, step: int) -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"# A RETRO of {count / 1e6:.1f} M parameters, step {step}\n\n"
        "Written by retro-engine. `retro generate FOLDER PROMPT --index STORE` answers with retrieval;\n"
        '`Retro.from_pretrained("FOLDER")` loads it in Python.\n'
    )
