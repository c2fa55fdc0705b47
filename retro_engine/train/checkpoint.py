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
    aside = base / f".step-{step:06d}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    files.make_folder(aside)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = {"random_state": torch.get_rng_state()}
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            tensors[f"{key}.{names[id(parameter)]}"] = value.detach().cpu().contiguous()
    contents = {
        CONFIG_FILE: config_to_json(model.config).encode(),
        WEIGHTS_FILE: to_bytes({name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}),
        TOKENIZER_FILE: tokenizer.json.encode(),
        "generation_config.json": (json.dumps(generation, indent=1) + "\n").encode(),
        "README.md": _readme(model, step).encode(),
        OPTIMIZER_FILE: to_bytes(tensors),
        TRAINER_FILE: (json.dumps({"step": step, **trainer}, indent=1) + "\n").encode(),
    }
    try:
        for name, content in contents.items():
            files.publish(aside / name, [content])
        hashes = {name: files.sha256_file(aside / name) for name in contents}
        files.publish(aside / COMPLETE, [(json.dumps(hashes, indent=1) + "\n").encode()])
        if final.exists():
            shutil.rmtree(final)
        os.rename(aside, final)
        files.sync_folder(base)
    except Exception:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for old in complete_checkpoints(run)[:-keep_last_n] if keep_last_n > 0 else []:
        shutil.rmtree(old)
    return final


def complete_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = (run / "checkpoints").glob("step-*")
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
    files.verify_files(checkpoint, entries)


def load_training_state(checkpoint: Path, model: RetroModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore weights, optimizer and random state in place; return trainer.json."""
    from safetensors.torch import load_file

    from retro_engine.model.weights import load_state

    verify(checkpoint)
    load_state(model, load_file(checkpoint / WEIGHTS_FILE), str(checkpoint / WEIGHTS_FILE))
    tensors = load_file(checkpoint / OPTIMIZER_FILE)
    torch.set_rng_state(tensors.pop("random_state"))
    for name, parameter in model.named_parameters():
        entries = {key.split(".", 1)[0]: value for key, value in tensors.items() if key.split(".", 1)[1] == name}
        if entries:
            device = parameter.device
            optimizer.state[parameter] = {key: value.to(device) for key, value in entries.items()}
    return json.loads((checkpoint / TRAINER_FILE).read_text())


def _readme(model: RetroModel, step: int) -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"# A RETRO of {count / 1e6:.1f} M parameters, step {step}\n\n"
        "Written by retro-engine. `retro generate FOLDER PROMPT --index STORE` answers with retrieval;\n"
        '`Retro.from_pretrained("FOLDER")` loads it in Python.\n'
    )
