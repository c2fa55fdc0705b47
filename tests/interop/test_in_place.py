"""A GGUF file as it is: what an import computes, from the file's own bytes; refused where it would be trained or does not fit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_helpers import WIDTH, write

from retro_engine.api import Retro
from retro_engine.errors import StoreError, UsageError
from retro_engine.interop.gguf_model import read_gguf
from retro_engine.interop.in_place import open_any
from retro_engine.model import ops
from retro_engine.model.decode_cache import new_cache
from retro_engine.model.decoding import step
from retro_engine.model.linear import BlockEmbedding, BlockLinear, Linear
from retro_engine.model.retro import RetroModel
from retro_engine.model.weights import new_model
from retro_engine.serve.service import ServiceOptions, open_service
from retro_engine.train.checkpoint import find_checkpoint

pytest.importorskip("gguf", reason="gguf is not installed")
TOKENS = torch.arange(3, 40)[None]


def in_fp32(model: RetroModel) -> RetroModel:
    """The same with every matrix dequantised."""
    for name, module in list(model.named_modules()):
        parent, _, own = name.rpartition(".")
        if isinstance(module, BlockLinear):
            plain = Linear(module.in_features, module.out_features, bias=module.bias is not None)
            plain.weight.data = ops.dequantize(module.weight, module.kind, module.in_features)
            if module.bias is not None:
                plain.bias.data = module.bias
            setattr(model.get_submodule(parent), own, plain)
        if isinstance(module, BlockEmbedding):
            weight = ops.dequantize(module.weight, module.kind, module.embedding_dim)
            setattr(model.get_submodule(parent), own, torch.nn.Embedding.from_pretrained(weight))
    return model


@pytest.mark.parametrize(("blocks", "kind"), [("Q4_0", "llama"), ("Q4_1", "qwen2"), ("Q8_0", "llama")])
def test_it_computes_what_an_import_does(tmp_path: Path, blocks: str, kind: str) -> None:
    path = write(tmp_path / "x.gguf", kind, blocks=blocks, _rope__dimension_count=6)
    before = path.read_bytes()
    config, state, *_ = read_gguf(path)
    with torch.no_grad():
        exact = new_model(config, state, "x").eval()(TOKENS)
        opened = open_any(path, device="cpu")
        found = opened.model(TOKENS)
        cache = new_cache(opened.model, 1, 64)
        decoded = [step(opened.model, cache, part) for part in (TOKENS[:, :30], *TOKENS[:, 30:].split(1, 1))]
        assert (found - exact).norm() / exact.norm() < 0.02
        assert (torch.cat(decoded, 1) - found).norm() / exact.norm() < 0.02
        assert (in_fp32(opened.model)(TOKENS) - exact).norm() / exact.norm() < 1e-5
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["x.gguf"]


def test_bytes_are_the_files_and_there_once(tmp_path: Path) -> None:
    model = open_any(write(tmp_path / "x.gguf", blocks="Q8_0"), device="cpu").model
    assert isinstance(model.head, BlockLinear)
    assert isinstance(model.embedding, BlockEmbedding)
    assert model.head.weight.data_ptr() == model.embedding.weight.data_ptr()
    assert isinstance(model.layers[0].ffn.down, Linear)  # 48 inputs are no whole blocks: the file has them in fp32
    held = sum(value.nbytes for value in {v.data_ptr(): v for v in model.state_dict().values()}.values())
    assert held < 1.01 * (tmp_path / "x.gguf").stat().st_size
    apart = open_any(
        write(tmp_path / "y.gguf", blocks="Q8_0", tensors={"output.weight": np.ones((261, WIDTH), np.float32)}),
        device="cpu",
    ).model
    assert apart.head is not None
    assert apart.head.weight.data_ptr() != apart.embedding.weight.data_ptr()


def test_other_types(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is not computed in blocks is held in fp32 and named; a type that is asked for is converted to."""
    path = write(tmp_path / "x.gguf", blocks="BF16")
    config, state, *_ = read_gguf(path)
    with torch.no_grad():
        exact = new_model(config, state, "x").eval()(TOKENS)
        assert (open_any(path, device="cpu").model(TOKENS) - exact).norm() / exact.norm() < 1e-5
        for dtype in ("int8", "int4", "bf16", torch.float32):
            found = open_any(path, dtype, "cpu").model(TOKENS).float()
            assert (found - exact).norm() / exact.norm() < (0.3 if dtype == "int4" else 0.05), dtype
    assert "held in fp32" not in capsys.readouterr().err


def test_it_generates_and_serves(tmp_path: Path) -> None:
    path = write(tmp_path / "small.gguf", blocks="Q4_0")
    found = Retro.from_pretrained(path, device="cpu").generate("The castle", max_new_tokens=5)
    assert found.finish_reason
    service = open_service(ServiceOptions(run=str(path), device="cpu"))
    try:
        assert service.name == "small"
        assert service.library is None
    finally:
        service.close()


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="retro import"):
        find_checkpoint(write(tmp_path / "x.gguf", blocks="Q4_0"))
    narrow = {"blk.0.ffn_up.weight": np.ones((40, WIDTH), np.float32)}
    with pytest.raises(StoreError, match=r"layers\.0\.ffn\.up\.weight \(40, 32\), expected \(48, 32\)"):
        open_any(write(tmp_path / "y.gguf", blocks="Q4_0", tensors=narrow), device="cpu")
    with pytest.raises(StoreError, match="missing"):
        open_any(write(tmp_path / "z.gguf", blocks="Q4_0", tensors={"blk.1.attn_q.weight": None}), device="cpu")
