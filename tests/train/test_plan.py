"""The calculator against what a small model really has, keeps and computes, and docs/scaling.md against the calculator."""

import gc
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from retro_kernels import cpp
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from retro_engine.cli import main
from retro_engine.config import ModelConfig, OptimConfig, load_config, preset_model
from retro_engine.errors import UsageError
from retro_engine.model.flops import attention_flops, forward_flops
from retro_engine.model.retro import RetroModel
from retro_engine.train.optimizer import Optimizer
from retro_engine.train.plan import Layout, activations, parameters, plan

PAGE = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
BATCH = 3
ONE = Layout(1, 1, "none", False, BATCH, 1, None, "32", False, keeps_normed=True)
MODELS: dict[str, dict[str, Any]] = {
    "rmsnorm": {},
    "layernorm": {"normalization": "layernorm", "activation": "gelu", "bias": True, "num_query_groups": 2},
    "narrow encoder": {
        "encoder_hidden_size": 32,
        "encoder_num_attention_heads": 2,
        "enc_cross_attention": [0, 1],
        "share_embeddings": False,
        "output_bias": True,
        "position_embedding": "learned",
    },
    "no retrieval": {"retrieval": False, "decoder_final_norm": False},
}


def small(name: str) -> ModelConfig:
    values: dict[str, Any] = {
        "vocab_size": 211,
        "encoder_seq_length": 128,
        "chunk_size": 16,
        "hidden_size": 64,
        "ffn_hidden_size": 160,
        "num_attention_heads": 4,
        "dec_num_layers": 5,
        "enc_num_layers": 2,
        "dec_cross_attention": [1, 3, 4],
        "enc_cross_attention": [0],
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return preset_model("base", **(values | MODELS[name]))


def loss_of(model: RetroModel) -> torch.Tensor:
    """Of a batch in which everything is full."""
    c = model.config
    tokens = torch.randint(0, c.vocab_size, (BATCH, c.encoder_seq_length))
    if not c.retrieval:
        return model(tokens, labels=tokens)
    neighbors = torch.randint(0, c.vocab_size, (BATCH, c.encoder_seq_length // c.chunk_size, c.num_neighbors, c.r))
    return model(tokens, neighbors, torch.full(neighbors.shape[:3], c.r), torch.zeros_like(tokens), tokens)


def sizes(c: ModelConfig) -> tuple[int, int]:
    """Decoder tokens and neighbor tokens of that batch."""
    tokens = BATCH * c.encoder_seq_length
    return tokens, tokens // c.chunk_size * c.num_neighbors * c.r if c.retrieval else 0


def settings(c: ModelConfig, *more: str) -> list[str]:
    names = ("vocab_size", "encoder_seq_length", "chunk_size", "hidden_size", "ffn_hidden_size", "num_attention_heads")
    names += ("dec_num_layers", "enc_num_layers", "dec_cross_attention", "enc_cross_attention")
    return [*(f"model.{name}={getattr(c, name)}" for name in names), *more]


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_weight_bytes_are_the_models(name: str) -> None:
    c = small(name)
    with torch.device("meta"):
        model = RetroModel(c)
    found = parameters(c).total
    assert found.total == sum(p.numel() for p in model.parameters())
    assert found.tensors == len(list(model.parameters()))
    assert found.whole == sum(
        p.numel() for n, p in model.named_parameters() if "norm" in n or n.startswith(("position", "encoder_input"))
    ) + sum(p.numel() for n, p in model.named_parameters() if n.endswith(("out.bias", "down.bias")))
    if name == "rmsnorm":
        assert plan(load_config(settings(c)), 1)["bytes"]["weights"] == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("optim", ["adamw", "muon"])
@pytest.mark.parametrize("is_o2", [False, True])
def test_weights_gradients_and_optimizer_bytes(is_o2: bool, optim: str) -> None:
    c = small("rmsnorm")
    given = ("trainer.precision=bf16-mixed", f"model.megatron_amp_O2={is_o2}", f"model.optim.name={optim}")
    figures = plan(load_config(settings(c, *given)), 1)
    model = RetroModel(c).to(torch.bfloat16 if is_o2 else torch.float32)
    optimizer = Optimizer(model, OptimConfig(name=optim), {}, has_master=is_o2)
    loss_of(model).backward()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    optimizer.collect()
    if is_o2:
        gradients += sum(p.grad.nbytes for p in optimizer.parameters.values() if p.grad is not None)
    optimizer.step(1e-3, 1.0)
    assert figures["bytes"]["weights"] == sum(p.nbytes for p in model.parameters())
    assert figures["bytes"]["gradients"] == gradients
    assert figures["bytes"]["optimizer"] == sum(t.nbytes for t in optimizer.state().values())


class _Storages(TorchDispatchMode):
    """Every storage that an operation makes, without keeping it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                known = self.seen.get(storage._cdata)
                if known is None or known[0].expired():
                    self.seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result


def alive_after_forward(model: RetroModel, precision: str) -> int:
    """Bytes between forward and backward pass, without the weights."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    storages = _Storages()
    gc.disable()  # so that what the pass makes is still young at its end: all else is not looked through
    with storages, torch.autocast("cpu", torch.bfloat16, enabled=precision != "32"):
        loss = loss_of(model)
    gc.collect(0)
    gc.enable()
    assert loss.requires_grad
    return sum(size for key, (ref, size) in storages.seen.items() if key not in weights and not ref.expired())


@pytest.mark.skipif(not cpp.is_available(), reason="plain PyTorch attention keeps rotated copies")
@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
@pytest.mark.parametrize("recompute", [None, "selective", "full"])
@pytest.mark.parametrize("name", ["rmsnorm", "layernorm", "no retrieval"])
def test_activation_bytes(name: str, recompute: str | None, precision: str) -> None:
    """What is alive between forward and backward pass; and without recomputation and in full, what autograd saved
    (selective keeps its outputs where the hooks do not see them).
    """
    c = small(name)
    model = RetroModel(c)
    model.set_recompute(recompute)
    planned = activations(c, replace(ONE, recompute=recompute, precision=precision)).kept
    alive = alive_after_forward(model, precision)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    tolerance = 0.02 if precision == "32" else 0.2  # autocast keeps some copies longer than it needs
    assert planned == pytest.approx(alive, rel=tolerance)
    if recompute == "selective":
        return
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=precision != "32"):
        loss_of(model)
    assert planned == pytest.approx(sum(storage.nbytes() for storage in saved.values()), rel=0.02)


@pytest.mark.skipif(not cpp.is_available(), reason="plain PyTorch attention keeps rotated copies")
@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
@pytest.mark.parametrize("name", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("sink_id", [None, 3])
def test_activation_bytes_with_neighbors_in_front(sink_id: int | None, name: str, precision: str) -> None:
    c = replace(small(name), reading="prefix", sink_id=sink_id)
    model = RetroModel(c)
    planned = activations(c, replace(ONE, precision=precision)).kept
    assert planned == pytest.approx(alive_after_forward(model, precision), rel=0.02)
    if sink_id is None:
        assert plan(load_config(settings(c, "model.reading=prefix")), 1)["bytes"]["activations"] > 0


def counted(model: RetroModel, has_backward: bool) -> tuple[int, int]:
    """FLOPs of the products and of the attention cores (these of the forward pass alone)."""
    core = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def flops(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return sdpa_flop_count(q, k, v)

    with FlopCounterMode(display=False, custom_mapping={core: flops}) as counter:
        loss = loss_of(model)
        if has_backward:
            loss.backward()
    cores = counter.get_flop_counts()["Global"].get(core, 0)
    return counter.get_total_flops() - cores, cores


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_the_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly, with what the formula says otherwise: a causal core is half of the square that SDPA is counted as, the
    loss makes the head's gradients in the forward pass.
    """
    monkeypatch.setenv("RETRO_BACKEND", "reference")
    c = small(name)
    T, W = sizes(c)
    products, cores = counted(RetroModel(c), has_backward=False)
    half_cores = T * c.dec_num_layers * 2 * c.encoder_seq_length * c.hidden_size
    head = 2 * T * c.hidden_size * c.vocab_size
    assert products + cores == forward_flops(c, T, W) + half_cores + 2 * head
    assert cores == attention_flops(c, T, W) + half_cores


def test_products_of_neighbors_in_front_are_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETRO_BACKEND", "reference")
    c = replace(small("rmsnorm"), reading="prefix")
    T, W = sizes(c)
    products, _ = counted(RetroModel(c), has_backward=False)
    head = 2 * T * c.hidden_size * c.vocab_size
    assert products == forward_flops(c, T, W) - attention_flops(c, T, W) + 2 * head


@pytest.mark.parametrize("name", ["rmsnorm", "layernorm", "no retrieval"])
def test_recomputed_flops_are_the_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETRO_BACKEND", "reference")
    c = small(name)
    T, _ = sizes(c)
    model = RetroModel(c)
    plain_products, plain_cores = counted(model, has_backward=True)
    model.set_recompute("full")
    products, cores = counted(model, has_backward=True)
    more = ("model.activations_checkpoint_granularity=full", f"model.micro_batch_size={BATCH}")
    extra = [f"model.{key}={value}" for key, value in MODELS[name].items()]
    figures = plan(load_config(settings(c, *more, *extra)), 1)
    half_cores = T * c.dec_num_layers * 2 * c.encoder_seq_length * c.hidden_size
    assert figures["recomputed_flops"] + half_cores == products + cores - plain_products - plain_cores
    assert 3 * forward_flops(c, *sizes(c)) == figures["flops"]


def test_sharding_and_communication() -> None:
    """The plain cases by hand: N parameters of which each process has a share."""
    base = settings(small("rmsnorm"), "trainer.precision=32")
    N = parameters(small("rmsnorm")).total
    ddp = plan(load_config([*base, "trainer.strategy=ddp"]), 8)
    assert ddp["data_bytes"] == round(2 * 7 / 8 * 4 * N.total)  # a ring's all-reduce
    fsdp = plan(load_config([*base, "trainer.strategy=fsdp"]), 8)
    root = parameters(small("rmsnorm")).root.total
    assert fsdp["data_bytes"] == round(7 / 8 * 4 * (3 * N.total - root))  # two gathers, one scatter
    assert fsdp["bytes"]["weights"] == round(4 * N.total / 8) == fsdp["bytes"]["gradients"]
    assert ddp["tensor_bytes"] == fsdp["tensor_bytes"] == 0
    more = plan(load_config([*base, "trainer.strategy=fsdp", "trainer.accumulate_grad_batches=4"]), 8)
    assert more["bytes"]["gradients"] == 4 * N.total  # accumulated before they are sharded
    tensor = plan(load_config([*base, "model.tensor_model_parallel_size=4"]), 4)
    assert tensor["bytes"]["weights"] == round(4 * (N.cut / 4 + N.whole))
    assert tensor["tensor_bytes"] > 0 == tensor["data_bytes"]
    sequence = plan(load_config([*base, "model.tensor_model_parallel_size=4", "model.sequence_parallel=true"]), 4)
    assert sequence["bytes"]["activations"] < tensor["bytes"]["activations"]


@pytest.mark.parametrize(
    ("more", "processes", "words"),
    [
        ((), 0, "--processes 0"),
        (("model.tensor_model_parallel_size=4",), 6, "multiple of model.tensor_model_parallel_size=4"),
        (("model.global_batch_size=12",), 2, "model.global_batch_size=12"),
        (("model.vocab_size=0",), 1, "model.vocab_size=0"),
    ],
)
def test_what_does_not_fit_is_refused(more: tuple[str, ...], processes: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        plan(load_config([*settings(small("rmsnorm")), *more]), processes)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["inspect", "--plan", "--preset", "tiny", "--processes", "8", "model.vocab_size=1000"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "MFU" in shown and "nothing was run" in shown
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["processes"] == 8
    for wrong in (
        ["inspect"],
        ["inspect", "x", "--plan"],
        ["inspect", "x", "--processes", "2"],
        ["inspect", "x", "a=1"],
    ):
        assert main(wrong) == 2, wrong
        assert "retro inspect" in capsys.readouterr().err


def commands() -> list[tuple[str, list[str]]]:
    """The page's rows, and the command that made each."""
    rows = [line for line in PAGE.splitlines() if re.match(r"\| \d", line)]
    models = dict(re.findall(r"^(\S+B): `(.*)`$", PAGE, re.M))
    found = []
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        found.append((row, ["--processes", cells[1], *models[cells[0]].split(), *cells[2].strip("`").split()]))
    return found


def test_the_rows_of_the_page_are_the_calculators(capsys: pytest.CaptureFixture[str]) -> None:
    rows = commands()
    assert len(rows) >= 12
    for row, words in rows:
        assert main(["inspect", "--plan", "--json", *words]) == 0
        assert (
            row_of(json.loads(capsys.readouterr().out)) == [cell.strip() for cell in row.strip("|").split("|")][3:]
        ), row


def row_of(f: dict[str, Any]) -> list[str]:
    """The figures of a row: memory and its greatest parts, work, communication, time."""
    b = f["bytes"]
    assert f["fits"]
    state = b["weights"] + b["gradients"] + b["optimizer"] + b["gathered"]
    return [
        f"{f['global_batch']:,}",
        f"{state / 1e9:.1f} + {b['activations'] / 1e9:.1f}",
        f"{b['total'] / 1e9:.1f}",
        f"{f['flops'] / 1e12:.0f}",
        f"{f['data_bytes'] / 1e9:.1f} / {f['tensor_bytes'] / 1e9:.1f}",
        f"{f['seconds']['step']:.2f}",
        f"{f['tokens_per_s'] / 1e3:,.0f}",
        f"{100 * f['mfu']:.0f} %",
    ]
