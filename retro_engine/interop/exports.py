"""`retro export`: a checkpoint of ours as a Hugging Face folder. Needs no transformers.

Writes config.json, model.safetensors, tokenizer.json, tokenizer_config.json, generation_config.json, and
modeling_retro.py, which imports retro_engine: `AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`, or
`import retro_engine.interop.transformers_model` first.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from retro_engine.config import ModelConfig, architecture
from retro_engine.data import files
from retro_engine.data.tokenizer import FILE as TOKENIZER_FILE
from retro_engine.errors import StoreError
from retro_engine.generate.open_model import open_model
from retro_engine.model.weights import read_architecture

MODEL_TYPE = "retro_engine_hf"  # of retro_engine.interop.transformers_model
PREFIX = "model."  # of its tensors' names
MODULE = (
    '"""Loads retro-engine\'s model for transformers; pip install retro-engine."""\n\n'
    "from retro_engine.interop.transformers_model import RetroConfig, RetroForCausalLM  # noqa: F401\n"
)


def export_model(path: str | Path, folder: str | Path) -> Path:
    """Write the best checkpoint at `path` as a Hugging Face folder. Raises UsageError for a folder that holds something."""
    from safetensors.torch import save as to_bytes

    folder = Path(folder)
    files.check_unused(folder)
    opened = open_model(path, device="cpu")
    model, tokenizer = opened.model, opened.tokenizer
    weights = {f"{PREFIX}{name}": value.contiguous() for name, value in model.state_dict().items()}
    sampling = opened.generation
    ids = {"eos_token_id": _one_or_all(tokenizer.end_ids), "pad_token_id": tokenizer.pad_id}
    config: dict[str, Any] = {
        "model_type": MODEL_TYPE,
        "architectures": ["RetroForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_retro.RetroConfig",
            "AutoModelForCausalLM": "modeling_retro.RetroForCausalLM",
        },
        "dtype": str(model.dtype).removeprefix("torch."),
        **ids,
        "retro": architecture(model.config),
    }
    generation = {
        "do_sample": not sampling["greedy"],
        **({} if sampling["greedy"] else {k: sampling[k] for k in ("temperature", "top_k", "top_p")}),
        **ids,
    }
    special = {"eos_token": tokenizer.backend.id_to_token(tokenizer.eod_id)}
    special["pad_token"] = tokenizer.backend.id_to_token(tokenizer.pad_id)
    named = tokenizer.chat_files.tokenizer_config()
    text = {"padding_side": "left", "clean_up_tokenization_spaces": False}
    tokenizer_config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **text, **special, **named}
    contents = {
        "config.json": files.json_bytes(config),
        "generation_config.json": files.json_bytes(generation),
        "tokenizer_config.json": files.json_bytes(tokenizer_config),
        TOKENIZER_FILE: tokenizer.json_beside(str(tokenizer_config["eos_token"])).encode(),
        "modeling_retro.py": MODULE.encode(),
        "model.safetensors": to_bytes(weights, {"format": "pt"}),
    }
    with files.publish_folder(folder) as aside:
        for name, content in contents.items():
            files.publish(aside / name, [content])
    return folder


def read_export(values: dict[str, Any], state: dict[str, Tensor], name: str) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and weights of what `export_model` wrote, from its config.json and its tensors."""
    kept = values.get("retro")
    if not isinstance(kept, dict):
        raise StoreError(f"{name} has no architecture", "config.json of an export has it under retro")
    odd = sorted(key for key in state if not key.startswith(PREFIX))
    if odd:
        raise StoreError(
            f"{name} has tensors that are none of an export: {', '.join(odd[:8])}", f"they begin with {PREFIX}"
        )
    return read_architecture(kept, f"{name}: retro"), {key.removeprefix(PREFIX): value for key, value in state.items()}


def _one_or_all(ids: list[int]) -> int | list[int]:
    return ids[0] if len(ids) == 1 else list(ids)
