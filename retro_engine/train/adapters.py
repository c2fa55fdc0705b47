"""The weights of a checkpoint, whole: its own, or those of its base with its adapters merged into them.

Reads model.safetensors, or adapters.safetensors and adapters.json (train/checkpoint.py) with the base that they name,
whose own weights may be adapters again. Everything is compared with its checksums, and the base with its fingerprint.
"""

from pathlib import Path

import torch
from torch import Tensor

from retro_engine.data.checkpoint_files import WEIGHTS_FILE
from retro_engine.errors import MissingInputError, RetroError, StoreError
from retro_engine.model.lora import merged
from retro_engine.model.memory import MappedTensors
from retro_engine.model.quantize import check_weights, keep, use_weights
from retro_engine.model.retro import RetroModel
from retro_engine.model.weights import load_state, new_model, read_config
from retro_engine.train import checkpoint


def load_model(folder: str | Path, dtype: str | torch.dtype | None = None) -> RetroModel:
    """The model of a checkpoint folder, in evaluation mode, without adapters, on the file's own pages where its weights stay
    what they are. `dtype`: fp32, bf16 or int8, for generation; one of torch's; None = as saved.
    """
    folder = Path(folder)
    if isinstance(dtype, str):
        check_weights(dtype)
    state = read_weights(folder)
    model = new_model(read_config(folder), state, str(folder / _file(folder))).eval()
    if isinstance(dtype, str):
        return use_weights(model, dtype, state.drop if isinstance(state, MappedTensors) else keep)
    return model.to(dtype or model.dtype)


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
        return MappedTensors(folder / WEIGHTS_FILE)
    own = MappedTensors(folder / checkpoint.ADAPTERS_FILE)
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
