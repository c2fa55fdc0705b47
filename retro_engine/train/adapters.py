"""The weights of a checkpoint, whole: its own, or those of its base with its adapters merged into them.

Reads model.safetensors, or adapters.safetensors and adapters.json (train/checkpoint.py) with the base that they name,
whose own weights may be adapters again. Everything is compared with its checksums, and the base with its fingerprint.
"""

from pathlib import Path

import torch
from torch import Tensor

from retro_engine.errors import MissingInputError, RetroError, StoreError
from retro_engine.model.lora import merged
from retro_engine.model.retro import RetroModel
from retro_engine.model.weights import WEIGHTS_FILE, load_state, new_model, read_config, read_tensors
from retro_engine.train import checkpoint


def load_model(folder: str | Path, dtype: torch.dtype | None = None) -> RetroModel:
    """The model of a checkpoint folder, in evaluation mode, without adapters; `dtype` None = as saved."""
    folder = Path(folder)
    model = new_model(read_config(folder), read_weights(folder), str(folder / _file(folder)))
    return model.to(dtype or model.embedding.weight.dtype).eval()


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a plain model. Raises MissingInputError without the base, StoreError for another in its place."""
    base = checkpoint.read_base(folder)
    state = _read(folder, base)
    return state if base is None else merged(state, base.lora, str(folder / _file(folder)))


def resume_weights(folder: Path, model: RetroModel) -> None:
    """Restore the weights of a model that is not spread yet, its adapters' too, in the type they were saved in."""
    load_state(model, _read(folder, checkpoint.read_base(folder)), str(folder / _file(folder)))


def _file(folder: Path) -> str:
    return WEIGHTS_FILE if checkpoint.read_base(folder) is None else checkpoint.ADAPTERS_FILE


def _read(folder: Path, base: checkpoint.Base | None) -> dict[str, Tensor]:
    """What a checkpoint's file has, over what its base has, in the wider of their types."""
    if base is None:
        return read_tensors(folder / WEIGHTS_FILE)
    own = read_tensors(folder / checkpoint.ADAPTERS_FILE)
    state = _of_base(folder, base) | own
    wide = torch.bfloat16
    for value in state.values():
        wide = torch.promote_types(wide, value.dtype)
    return {name: value.to(wide) for name, value in state.items()}


def _of_base(folder: Path, base: checkpoint.Base) -> dict[str, Tensor]:
    what = f"{folder} holds adapters beside the weights of {base.folder}"
    try:
        found = checkpoint.weights_fingerprint(base.folder)
        checkpoint.verify(base.folder)
    except RetroError as error:
        do = f"put that checkpoint there again; retro import MODEL --out {base.folder}, where it was imported"
        kind = MissingInputError if not (base.folder / checkpoint.COMPLETE).is_file() else StoreError
        raise kind(what, f"{error.what}: {error.why}", do) from error
    if found != base.fingerprint:
        why = f"there are others now: {found[:12]}, and the adapters were trained beside {base.fingerprint[:12]}"
        raise StoreError(what, why, "put the checkpoint that they were trained beside there again")
    return read_weights(base.folder)
