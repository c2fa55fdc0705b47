"""What both demos do: they begin in a folder of their own, refuse settings that would make them false, and train."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from retro_engine.config import Config, named_keys
from retro_engine.errors import StoppedError, UsageError
from retro_engine.progress import Reporter
from retro_engine.train.loop import TrainingResult, train


def refuse_held(out: Path, begun: str) -> None:
    """Raise UsageError where `out` holds a demo already, which `begun` in it tells."""
    if (out / begun).exists():
        raise UsageError(f"{out} holds a demo", "it is not overwritten", f"choose another --out, or rm -r {out}")


def refuse_own(overrides: Sequence[str], own: Mapping[str, str], why: str) -> None:
    """Raise UsageError for a setting that is the demo's own; `own`: what to do instead, by key."""
    for key in sorted(named_keys(overrides, with_environment=False)):
        if key in own:
            raise UsageError(f"{key} is the demo's own", why, own[key])


def trained(config: Config, again: str, reporter: Reporter) -> TrainingResult:
    """A run to its end. Raises StoppedError where a signal came before; `again`: what to do then."""
    result = train(config, reporter)
    if result.exit_code:
        saved = f"the checkpoint of step {result.step} is saved"
        raise StoppedError(result.exit_code, saved, again)
    return result
