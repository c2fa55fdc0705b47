"""Parity with two removed implementations: their float64 logits and gradients, from the shared golden files."""

import pytest
import torch
import torch.nn.functional as F
from helpers import SHARED

from retro_engine.interop.megatron import import_state_dict
from retro_engine.model.retro import RetroModel

FILES = ["mcore_learned_9l", "mcore_rope_9l_partial", "nemo_v1_4l", "nemo_v2_4l"]


@pytest.fixture(params=FILES, scope="module")
def golden(request: pytest.FixtureRequest) -> tuple[RetroModel, dict[str, torch.Tensor], dict[str, str], str]:
    from safetensors import safe_open

    path = SHARED / "golden" / f"{request.param}.safetensors"
    if not path.exists():
        pytest.skip("parity not checked: the golden files are absent")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    source = request.param.split("_")[0]
    weights = {name.removeprefix("weight."): value for name, value in tensors.items() if name.startswith("weight.")}
    return import_state_dict(weights, metadata, source), tensors, metadata, source


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


def test_logits(golden) -> None:
    model, tensors, _, _ = golden
    found = model(tensors["input.tokens"], tensors["input.neighbors"])
    assert found.dtype == torch.float64
    assert relative(found, tensors["output.logits"]) <= 1e-9


def test_padded_logits(golden) -> None:
    model, tensors, metadata, _ = golden
    if "input_padded.tokens" not in tensors:
        pytest.skip("this file has no padded inputs")
    tokens, neighbors, pad = tensors["input_padded.tokens"], tensors["input_padded.neighbors"], int(metadata["pad_id"])
    is_token = tokens != pad
    lengths = (neighbors != pad).sum(-1)
    for given in (lengths, None):  # the pad id in the metadata is enough
        found = model(tokens, neighbors, given)
        assert relative(found[is_token], tensors["output_padded.logits"][is_token]) <= 1e-9


def test_gradients(golden) -> None:
    model, tensors, metadata, source = golden
    model.zero_grad()
    logits = model(tensors["input.tokens"], tensors["input.neighbors"])
    losses = F.cross_entropy(logits.float().flatten(0, 1), tensors["input.labels"].flatten(), reduction="none")
    assert relative(losses, tensors["output.loss"].flatten()) <= 1e-6
    losses.mean().backward()
    expected = {name.removeprefix("grad."): value for name, value in tensors.items() if name.startswith("grad.")}
    assert expected
    renamed = dict(import_state_dict(expected, metadata, source).named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        error = (parameter.grad - renamed[name]).norm() / renamed[name].norm().clamp(min=1e-12)
        norm = renamed[name].norm()
        assert error <= 1e-5 or norm < 1e-7, f"{name}: relative error {error:.2e}, norm {norm:.2e}"
