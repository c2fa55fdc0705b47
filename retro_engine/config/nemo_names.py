"""NeMo's spellings of values of settings, and of names that are settings here too: each is mapped with one note, or refused in one line.

Nothing is dropped: two settings that name one thing must agree. Reads and changes a `Config`; the CLI sees the result alone.
"""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from retro_engine.config.values import require
from retro_engine.errors import UsageError

if TYPE_CHECKING:
    from retro_engine.config.fields import Config

Say = Callable[[str], None]
PRECISIONS = {"16": "16-mixed", "bf16": "bf16-mixed", "bf16-true": "bf16-mixed", "32-true": "32", "64-true": "64"}
OPTIMIZERS = {
    "fused_adam": "adamw",
    "megatron_fused_adam": "adamw",
    "mcore_distributed_optim": "distributed_fused_adam",
}

SCHEDULES = {"WarmupAnnealing": "WSD", "WarmupPolicy": "constant"}  # a line down to min_lr; none


def refuse_unspeakable(key: str, value: Any) -> None:
    """Raise UsageError for Lightning's other ways to say trainer.devices: `auto`, and which GPUs are to be used."""
    if key != "trainer.devices":
        return
    if value == "auto":
        why = "a number of processes, or -1: one a GPU (expected int | None)"
        raise _refuse(key, value, why, f"{key}=-1, or leave it out")
    chosen = value.split(",") if isinstance(value, str) and "," in value else value
    if isinstance(chosen, list):
        do = f"CUDA_VISIBLE_DEVICES={','.join(map(str, chosen))} {key}={len(chosen)}"
        raise _refuse(key, value, "it says how many; which GPUs there are is said outside", do)


def as_list(key: str, value: Any) -> Any:
    """model.data.data_prefix of one store, or of None, which YAML reads as text, as the list that NeMo's commands have."""
    return [value] if key == "model.data.data_prefix" and isinstance(value, str) and "${" not in value else value


def map_names(config: "Config", given: set[str], say: Say) -> None:
    """Change `config`; `given` are the keys that somebody wrote, presets apart. Raises UsageError."""
    _map_store(config, say)
    if config.trainer.accelerator == "cuda":
        config.trainer.accelerator = "gpu"
        say("trainer.accelerator=cuda is gpu here")
    _map_precision(config, say)
    _map_optimizer(config, say)
    _map_schedule(config, say)
    _map_clip(config, given, say)
    _map_ratios(config, given, say)
    m = config.model
    if m.add_position_embedding:
        ready = m.init == "retrieval_ready" and m.retrieval
        why = "model.init=retrieval_ready needs RoPE in decoder, encoder and CCA"
        require(not ready, "model.add_position_embedding", "true", why, "leave it out, or model.init=standard")
        m.add_position_embedding, m.position_embedding = False, "learned"
        say("model.add_position_embedding=true is model.position_embedding=learned here")


def _refuse(key: str, value: Any, why: str, do: str = "") -> UsageError:
    return UsageError(f"{key}={value} cannot be used", why, do)


def _map_store(config: "Config", say: Say) -> None:
    data, retro = config.model.data, config.model.retro
    prefix = [path for path in data.data_prefix or [] if path.lower() != "none"]
    key = "model.data.data_prefix"
    has_weights = bool(prefix) and len(prefix) % 2 == 0 and all(map(_is_number, prefix[::2]))
    paths = prefix[1::2] if has_weights else prefix
    if len(paths) > 1 and not has_weights:
        raise _refuse(key, prefix, "several stores need weights", "[.5,A,.5,B]")
    if len(paths) > 1:
        if data.blend is not None and data.blend != prefix:
            raise _refuse(key, prefix, f"it names stores, and so does model.data.blend={data.blend}", "name them once")
        say(f"{key} is model.data.blend={prefix} here")
        data.blend, paths = prefix, []
    elif has_weights:
        say(f"{key}: the weight {prefix[0]} means nothing: there is one store")
    for name, path in ((key, paths[0] if paths else None), ("model.retro.retro_project_dir", retro.retro_project_dir)):
        if path is None:
            continue
        if data.store is not None and os.path.abspath(data.store) != os.path.abspath(path):
            raise _refuse(name, path, f"it names a store, and so does model.data.store={data.store}", "name one")
        if data.store is None:
            say(f"{name} is model.data.store={path} here")
        data.store = path
    data.data_prefix, retro.retro_project_dir = None, None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _map_precision(config: "Config", say: Say) -> None:
    trainer, asked = config.trainer, config.trainer.precision
    if asked == "16-true":
        raise _refuse(
            "trainer.precision", asked, "small updates are lost in fp16 weights", "trainer.precision=16-mixed"
        )
    if asked not in PRECISIONS:
        return
    trainer.precision = PRECISIONS[asked]
    is_o2 = config.model.megatron_amp_O2 or asked == "bf16-true"
    config.model.megatron_amp_O2 = is_o2
    text = f"trainer.precision={asked} is {trainer.precision}"
    if asked == "bf16-true":
        say(f"{text} with model.megatron_amp_O2=true here: bf16 weights, with fp32 masters in the optimizer")
    elif not asked.endswith("-true"):
        say(f"{text}, as in NeMo" + ("; megatron_amp_O2 keeps bf16 weights" if is_o2 and asked == "bf16" else ""))


def _map_optimizer(config: "Config", say: Say) -> None:
    optim = config.model.optim
    if optim.name == "adam":
        why = "it adds the weight decay to the gradient; here it is decoupled from it"
        raise _refuse("model.optim.name", "adam", why, "model.optim.name=adamw")
    if optim.name in OPTIMIZERS:
        say(f"model.optim.name={optim.name} is {OPTIMIZERS[optim.name]} here: fused AdamW")
        optim.name = OPTIMIZERS[optim.name]


def _map_schedule(config: "Config", say: Say) -> None:
    sched = config.model.optim.sched
    name = SCHEDULES.get(sched.name)
    if name is None:
        return
    key = "model.optim.sched.name"
    if sched.constant_steps or sched.constant_ratio:
        raise _refuse(key, sched.name, "it has no constant steps", f"{key}=CosineAnnealing, or {key}=WSD")
    say(f"{key}={sched.name} is {name} here")
    sched.name = name


def _map_clip(config: "Config", given: set[str], say: Say) -> None:
    key, trainer, optim = "trainer.gradient_clip_val", config.trainer, config.model.optim
    if key not in given:
        return
    value, trainer.gradient_clip_val = trainer.gradient_clip_val, None
    if value is not None and not value >= 0:
        raise _refuse(key, value, "must be at least 0 (0 = off)")
    clip = value or None
    if "model.optim.clip" in given and optim.clip != clip:
        raise _refuse(key, value, f"model.optim.clip={optim.clip} says otherwise", "name one")
    if optim.clip != clip:
        say(f"{key} is model.optim.clip={'null' if clip is None else clip} here")
    optim.clip = clip


def _map_ratios(config: "Config", given: set[str], say: Say) -> None:
    sched = config.model.optim.sched
    total = sched.max_steps or config.trainer.max_steps
    for name in ("warmup", "constant"):
        key, ratio = f"model.optim.sched.{name}_ratio", getattr(sched, f"{name}_ratio")
        if ratio is None:
            continue
        if not 0 <= ratio <= 1:
            raise _refuse(key, ratio, "a share of the steps, from 0 to 1")
        steps = int(ratio * total)
        steps_key = f"model.optim.sched.{name}_steps"
        if steps_key in given and getattr(sched, f"{name}_steps") != steps:
            raise _refuse(key, ratio, f"{steps_key}={getattr(sched, f'{name}_steps')} says otherwise", "name one")
        say(f"{key}={ratio} is {steps_key}={steps} here, of {total} steps")
        setattr(sched, f"{name}_steps", steps)
        setattr(sched, f"{name}_ratio", None)
