"""Where a run goes on: which checkpoint, and whether model, data and order are those it began with."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from retro_engine.config import Config, architecture, flat_keys, spelled_out
from retro_engine.config.yaml_file import read_yaml
from retro_engine.errors import RetroError, StoreError, UsageError
from retro_engine.model.weights import read_config
from retro_engine.train import checkpoint, record
from retro_engine.train.run_data import RunData, stream_settings

# beside the optimizer's own settings, and precision, of which the checkpoint itself tells
LEARNS = ("trainer.max_steps", "trainer.max_time_s", "trainer.loss_spike", "model.unfreeze_step")
ANOTHER = "--resume never --out ANOTHER starts a new run"


def find_start(
    config: Config, run: Path, resume: str, base: checkpoint.Base | None, say: Callable[[str], None]
) -> Path | None:
    """The checkpoint to go on from; None = a new run. `resume` is `loop.train`'s, `base` what its adapters stand beside.

    Raises UsageError where the run's folder would hold two histories, or has another model.
    """
    existing = checkpoint.complete_checkpoints(run, say)
    start = existing[-1] if existing else None
    if resume not in ("auto", "never"):
        named = checkpoint.newest_checkpoint(resume)
        if start is not None and named.resolve() != start.resolve():
            raise UsageError(
                f"{run} has checkpoint {start.name}",
                f"going on from {named} would leave two histories in one folder",
                "choose another --out, or remove the later checkpoints",
            )
        start = named
    elif start is not None and (resume == "never" or not config.exp_manager.resume_if_exists):
        raise UsageError(f"{run} holds a run", "it is not overwritten", f"choose another --out, or rm -r {run}")
    if start is not None:
        saved = architecture(spelled_out(read_config(start))) | _adapters(checkpoint.read_base(start))
        now = architecture(spelled_out(config.model)) | _adapters(base)
        if saved != now:
            why = "a run goes on with the model it began with"
            raise UsageError(f"{start} has another model: {_difference(saved, now)}", why, ANOTHER)
    return start


def _adapters(base: checkpoint.Base | None) -> dict[str, Any]:
    if base is None:
        return {}
    return {"base": base.fingerprint, **{f"lora.{name}": value for name, value in asdict(base.lora).items()}}


def read_start(start: Path, config: Config, data: RunData) -> dict[str, Any]:
    """trainer.json of the checkpoint to go on from. Raises StoreError unless its data and order are this run's."""
    if checkpoint.is_imported(start):
        raise UsageError(
            f"{start} was imported", "there is no training to go on with", f"--init-from {start} begins one"
        )
    state = checkpoint.read_state(start)
    for name, now in (("fingerprints", data.fingerprints), ("stream", stream_settings(config))):
        if state[name] != now:
            why = "a run goes on with the data and the order it began with"
            raise StoreError(f"{start} was trained with {_difference(state[name], now)}", why, ANOTHER)
    return state


def changes(start: Path, config: Config) -> list[str]:
    """What is other of how the run that wrote a checkpoint learns than in `config`, which is what it goes on with: each as
    text. Nothing where that run's settings are not beside it, or cannot be read.
    """
    try:
        before = flat_keys(read_yaml(start.parent.parent / record.SETTINGS_FILE))
    except RetroError:
        return []
    now = flat_keys(config)
    keys = [key for key in now if key in LEARNS or key.startswith("model.optim.")]
    differing = [key for key in keys if key in before and before[key] != now[key]]
    return [f"{key}={now[key]}; before it was {before[key]}" for key in differing]


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    keys = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    shorten = lambda value: value[:12] if isinstance(value, str) else value  # noqa: E731
    return ", ".join(f"{key} {shorten(before.get(key))} -> {shorten(now.get(key))}" for key in keys[:6])
