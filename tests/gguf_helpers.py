"""Small GGUF files: a random llama or qwen2 with a byte-level tokenizer."""

from pathlib import Path
from typing import Any

import numpy as np

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HEADS, WIDTH, LAYERS = 4, 32, 2


def alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def write(path: Path, kind: str = "llama", skip: tuple[str, ...] = (), tensors: dict[str, Any] | None = None, blocks: str | None = None, **more: Any) -> Path:  # fmt: skip
    """A small GGUF file. `blocks`: ggml's type of the matrices whose rows are whole blocks of it; `more`: metadata, "__" is a dot and a leading underscore the architecture; None leaves one out."""
    import gguf

    tokens = [*SPECIAL, *alphabet(), "Th", "The"]
    values: dict[str, Any] = {
        "_attention__head_count": HEADS, "_attention__head_count_kv": 2, "_embedding_length": WIDTH,
        "_block_count": LAYERS, "_feed_forward_length": 48, "_attention__layer_norm_rms_epsilon": 1e-5,
        "_context_length": 256, "tokenizer__ggml__model": "gpt2", "tokenizer__ggml__pre": "gpt-2",
        "tokenizer__ggml__tokens": tokens, "tokenizer__ggml__token_type": [3, 3, 3] + [1] * (len(tokens) - 3),
        "tokenizer__ggml__merges": ["T h", "Th e"], "tokenizer__ggml__eos_token_id": 2,
    } | more  # fmt: skip
    writer = gguf.GGUFWriter(path, kind)
    for key, value in values.items():
        name = (kind + "." + key[1:] if key.startswith("_") else key).replace("__", ".")
        if value is None or name.rpartition(".")[2] in skip:
            continue
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        else:
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(name, value)
    for name, tensor in (weights(len(values["tokenizer__ggml__tokens"] or tokens), kind) | (tensors or {})).items():
        if tensor is not None and blocks is not None and tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            form = gguf.GGMLQuantizationType[blocks]
            writer.add_tensor(name, gguf.quants.quantize(tensor, form), raw_dtype=form)
        elif tensor is not None:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def weights(vocab: int, kind: str) -> dict[str, Any]:
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) * 0.2).astype(np.float32)

    out: dict[str, Any] = {"token_embd.weight": normal(vocab, WIDTH), "output_norm.weight": 1 + normal(WIDTH)}
    for layer in range(LAYERS):
        shapes = {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH // 2, WIDTH)}
        shapes |= {"attn_v": (WIDTH // 2, WIDTH), "attn_output": (WIDTH, WIDTH), "ffn_gate": (48, WIDTH)}
        shapes |= {"ffn_up": (48, WIDTH), "ffn_down": (WIDTH, 48)}
        out |= {f"blk.{layer}.{part}.weight": normal(*shape) for part, shape in shapes.items()}
        if kind == "qwen2":
            out |= {f"blk.{layer}.attn_{part}.bias": normal(WIDTH if part == "q" else WIDTH // 2) for part in "qkv"}
    return out
