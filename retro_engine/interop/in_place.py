"""What generates, opened: a run's checkpoint, or a GGUF file as it is.

Of a GGUF file nothing is written and nothing in blocks is converted: its bytes are mapped into memory, matrices compute in
their blocks (kernels/blocks.py), rows of the embedding are made when they are looked up, and the rotary pairs of a llama lie
beside each other as in the file. What is not in blocks that are computed with is held in fp32, and a note says so.
"""

from collections import Counter
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from retro_engine.config import ModelConfig
from retro_engine.errors import StoreError
from retro_engine.generate.open_model import OpenedModel, open_model
from retro_engine.interop.gguf_file import GgufFile, GgufTensor, read_gguf_file
from retro_engine.interop.gguf_model import FACTORS, name_of, read_header
from retro_engine.interop.huggingface import check_names, check_tokenizer, read_decoder
from retro_engine.interop.imports import GREEDY, import_model
from retro_engine.model import ops
from retro_engine.model.device import pick_device
from retro_engine.model.linear import BlockEmbedding, BlockLinear
from retro_engine.model.quantize import use_weights
from retro_engine.model.retro import RetroModel
from retro_engine.model.weights import undrawn_model
from retro_engine.progress import note

BLOCKS = {kind.number: name for name, kind in ops.BLOCK_TYPES.items()}
FLOATS = (0, 1, 30)  # ggml's F32, F16 and BF16: no loss in fp32


def open_any(
    path: str | Path | Future[Path], dtype: str | torch.dtype | None = None, device: str | torch.device = "auto"
) -> OpenedModel:
    """`open_model`, and where PATH is a GGUF file its model; with `dtype`, or on a GPU, with weights that are converted in memory.

    Raises StoreError for a file that is damaged or asks for what is not computed, and what `open_model` raises.
    """
    if isinstance(path, Future) or Path(path).suffix != ".gguf":
        return open_model(path, dtype, device)
    place = pick_device(device) if isinstance(device, str) else device
    if dtype is None and place.type == "cpu":
        return _open_gguf(Path(path))
    imported = import_model(path, "gguf", dtype=dtype if isinstance(dtype, torch.dtype) else torch.float32)
    if isinstance(dtype, str):
        use_weights(imported.model, dtype)
    model = imported.model.to(place)
    return OpenedModel(folder=Path(path), model=model, tokenizer=imported.tokenizer, generation=dict(GREEDY))


def _open_gguf(path: Path) -> OpenedModel:
    file = read_gguf_file(path)
    values, tokenizer, notes = read_header(file)
    config, names, more = read_decoder(values, len(file.tensors), file.name)
    check_tokenizer(tokenizer, config, file.name)
    if values["model_type"] == "llama":
        config = replace(config, rotary_interleaved=True)
    theirs = {name_of(name): tensor for name, tensor in file.tensors.items() if name != FACTORS}
    check_names(set(theirs), set(names.values()), file.name)
    model = _model(config, file, {ours: theirs[name] for ours, name in names.items()})
    for line in (*notes, *more, *_held_in_fp32(file)):
        note(line)
    return OpenedModel(folder=path, model=model, tokenizer=tokenizer, generation=dict(GREEDY))


def _model(config: ModelConfig, file: GgufFile, tensors: dict[str, GgufTensor]) -> RetroModel:
    """`tensors`: of each of our names."""
    model = undrawn_model(config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    wrong = [f"{name} {tensors[name].shape}, expected {s}" for name, s in expected.items() if tensors[name].shape != s]
    if wrong:
        raise StoreError(f"{file.name} does not fit its metadata", "; ".join(wrong[:8]), "take another of its files")
    for name in [name for name, _ in model.named_modules()]:
        weight = tensors.get(f"{name}.weight")
        if weight is not None and weight.kind in BLOCKS:
            _replace(model, name, weight, file, tensors.get(f"{name}.bias"))
    missing = [name for name, value in model.state_dict().items() if value.is_meta]
    whole = {name: file.values(tensors[name].name) for name in missing}
    model.load_state_dict(whole, strict=False, assign=True)
    if isinstance(model.embedding, BlockEmbedding) and model.head is None:
        embedding = model.embedding
        model.head = BlockLinear(embedding.weight, embedding.kind, embedding.embedding_dim)
    assert not any(value.is_meta for value in model.state_dict().values())
    return model.requires_grad_(False).eval()


def _replace(model: RetroModel, name: str, weight: GgufTensor, file: GgufFile, bias: GgufTensor | None) -> None:
    """The module of that name with the file's bytes."""
    blocks, kind = _mapped(weight), BLOCKS[weight.kind]
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(model.get_submodule(name), nn.Embedding):
        setattr(parent, name.rpartition(".")[2], BlockEmbedding(blocks, kind, weight.shape[1]))
        return
    added = None if bias is None else file.values(bias.name)
    setattr(parent, name.rpartition(".")[2], BlockLinear(blocks, kind, weight.shape[1], added))


def _mapped(tensor: GgufTensor) -> Tensor:
    """[o, x], the memory of the file."""
    return torch.from_numpy(tensor.data.reshape(tensor.shape[0], -1))


def _held_in_fp32(file: GgufFile) -> list[str]:
    from gguf.constants import GGMLQuantizationType

    kinds = Counter(t.kind for t in file.tensors.values() if t.kind not in BLOCKS and t.kind not in FLOATS)
    said = ", ".join(f"{count} of {GGMLQuantizationType(kind).name}" for kind, count in sorted(kinds.items()))
    known = ", ".join(name.upper() for name in ops.BLOCK_TYPES)
    return [f"{file.name} has tensors that are held in fp32: {said} (in their blocks: {known})"] if said else []
