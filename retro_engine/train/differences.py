"""What two runs differ in besides retrieval: a gain between them is the gain of all of that together.

Reads a checkpoint's trainer.json and, of its run, config.yaml. Of a model that was imported, or lies in a file of its own,
nothing is known but what it computes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retro_engine.config import ModelConfig, architecture, flat_keys
from retro_engine.config.yaml_file import read_yaml
from retro_engine.data.checkpoint_files import best_of, complete_checkpoints, read_trainer
from retro_engine.errors import RetroError
from retro_engine.train.record import SETTINGS_FILE

Differences = dict[str, list[Any]]  # what -> [of this run, of the other one]; JSON-ready

SHOWN = 8  # differences in one line
# Settings that are for retrieval alone: fields of a model that begin with these, and these; encoder_seq_length is every sequence's.
_OF_READING = ("enc_", "encoder_", "cca_", "dec_cross_", "mup_base_encoder_")
_READING = ("retrieval", "reading", "retrieved_length", "num_neighbors", "chunk_size", "sink_id", "mask_neighbors", "partial_chunk")  # fmt: skip
_MODEL = {"encoder_seq_length": "sequence", "dec_num_layers": "layers", "hidden_size": "width", "ffn_hidden_size": "FFN width", "num_attention_heads": "heads", "num_query_groups": "key/value heads", "vocab_size": "vocabulary"}  # fmt: skip
_ORDER = {"sequences_per_step": "batch", "seed": "seed", "splits_string": "splits", "dataloader_type": "order", "shuffle_documents": "documents shuffled", "order": "sequences", "blend": "blend"}  # fmt: skip
_LEARNS = ("model.optim.", "model.lora.", "model.init_from", "model.freeze_decoder", "model.unfreeze_", "trainer.loss_spike")  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """A model that is compared, and where it was read."""

    checkpoint: Path
    model: ModelConfig
    parameters: int


def differences(mine: Compared, other: Compared) -> Differences:
    """Of two models. Empty where only retrieval differs."""
    runs = [_run(mine), _run(other)]
    names = [name for name in {**runs[0], **runs[1]} if runs[0].get(name) != runs[1].get(name)]
    found = {name: [run.get(name) for run in runs] for name in names}
    if found.get("max_steps") == found.get("steps"):  # said already
        found.pop("max_steps", None)
    if not any(name in found for name in _shape(mine.model)):  # else an encoder is all that one has more
        found.pop("parameters", None)
    return found


def show_differences(found: Mapping[str, list[Any]]) -> str:
    """`steps 120 / 6, lr 0.003 / 0.002`; "" where there are none."""
    parts = [f"{name} {_shown(a)} / {_shown(b)}" for name, (a, b) in found.items()]
    more = [f"and {len(parts) - SHOWN} more (--json)"] if len(parts) > SHOWN else []
    return ", ".join(parts[:SHOWN] + more)


def _run(compared: Compared) -> dict[str, Any]:
    """All that may differ, what matters most first."""
    checkpoint = compared.checkpoint
    state = {} if checkpoint.is_file() else _state(checkpoint)
    is_trained = "stream" in state and "imported" not in state
    out: dict[str, Any] = {} if is_trained else {"trained": "elsewhere"}
    if is_trained:
        settings = _settings(checkpoint.parent.parent)
        stream, prints = state["stream"], state.get("fingerprints", {})
        out |= {"steps": state["step"], "max_steps": settings.get("trainer.max_steps"), "tokens": state["tokens_seen"]}
        out |= {"data": str(prints.get("store", prints.get("questions", "")))[:12]}
        out |= {name: stream[key] for key, name in _ORDER.items() if key in stream}
        out |= {"precision": state.get("precision")}
        learns = {key: value for key, value in settings.items() if key.startswith(_LEARNS)}
        out |= {key.removeprefix("model.").removeprefix("optim."): value for key, value in learns.items()}
    return out | {"parameters": compared.parameters} | _shape(compared.model)


def _state(checkpoint: Path) -> dict[str, Any]:
    """trainer.json: of a run's best checkpoint the run's newest, for how far a run came is how it was trained, and which of its
    checkpoints is read is the same choice in all of them.
    """
    complete = complete_checkpoints(checkpoint.parent.parent, lambda flaw: None)
    is_chosen = bool(complete) and checkpoint.resolve() == best_of(complete).resolve()
    return read_trainer(complete[-1] if is_chosen else checkpoint)


def _shape(model: ModelConfig) -> dict[str, Any]:
    """What the decoder computes."""
    of_all = {key: value for key, value in architecture(model).items() if key not in _READING}
    kept = {key: value for key, value in of_all.items() if key in _MODEL or not key.startswith(_OF_READING)}
    return {_MODEL.get(key, key): value for key, value in kept.items()}


def _settings(run: Path) -> dict[str, Any]:
    """A run's settings; none where they are not beside its checkpoints, or cannot be read."""
    try:
        return flat_keys(read_yaml(run / SETTINGS_FILE))
    except RetroError:
        return {}


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int) and value >= 100_000:
        return f"{value / 1e6:.4g} M"
    return f"{value:g}" if isinstance(value, float) else str(value)
