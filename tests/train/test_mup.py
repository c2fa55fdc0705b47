"""muP: its rules on every parameter, the base file, the coordinate check, the sweep; equality at the base width."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import small_config, small_inputs, small_model

from retro_engine.cli import main
from retro_engine.config import Config, OptimConfig, TrainedModelConfig, base_config, load_config
from retro_engine.data.store import Store
from retro_engine.errors import GateError, StoreError, UsageError
from retro_engine.model.decode_cache import new_cache
from retro_engine.model.decoding import step
from retro_engine.model.initialization import width_multipliers
from retro_engine.model.retro import RetroModel
from retro_engine.progress import Reporter
from retro_engine.train import mup
from retro_engine.train.mup import CoordinateCheck, Sweep, at_width, coordinate_check, slope, write_base
from retro_engine.train.optimizer import Optimizer

# Decoder x4, encoder x3, decoder FFN x2, encoder FFN (which has no base of its own) x4.
WIDE: dict[str, Any] = {
    "mup": True, "hidden_size": 96, "ffn_hidden_size": 128, "encoder_hidden_size": 48, "encoder_ffn_hidden_size": 64,
    "num_attention_heads": 6, "num_query_groups": 2, "mup_base_hidden_size": 24, "mup_base_ffn_hidden_size": 64,
    "mup_base_encoder_hidden_size": 16, "mup_base_num_attention_heads": 3, "encoder_num_attention_heads": 2,
    "bias": True, "output_bias": True, "position_embedding": "learned",
}  # fmt: skip
BASE = {"hidden_size": 24, "ffn_hidden_size": 32, "num_attention_heads": 3}


def expected_width(name: str) -> float:
    """The rules again, by hand: what a hidden matrix of WIDE reads is this many times as wide as at the base."""
    kind = name.removesuffix(".weight").split(".")[-1]
    if not name.endswith(".weight") or "norm" in name or name in ("head.weight",) or "embedding" in name:
        return 1.0
    if name == "encoder_input.weight":
        return 4.0
    if name.startswith("neighbor_projection."):
        return 3.0
    if name.startswith("encoder.") and kind == "down":
        return 4.0
    if name.startswith("encoder.") and ".cross." in name and kind in ("k", "v"):
        return 4.0
    if name.startswith("encoder."):
        return 3.0
    return 2.0 if kind == "down" else 4.0


def rates(model: RetroModel, config: OptimConfig) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of every parameter in a step at the rate config.lr."""
    optimizer = Optimizer(model, config, width_multipliers(model))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(config.lr, 0.0)
    by_id = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.adamw.param_groups for p in g["params"]}
    return {name: by_id[id(parameter)] for name, parameter in model.named_parameters()}


def stds(model: RetroModel) -> dict[str, float]:
    return {name: float(parameter.detach().std()) for name, parameter in model.named_parameters() if parameter.dim() == 2}  # fmt: skip


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_rules_on_every_parameter(is_tied: bool) -> None:
    model = RetroModel(small_config(**WIDE, share_embeddings=is_tied), torch.Generator().manual_seed(0))
    assert ("head.weight" in dict(model.named_parameters())) != is_tied
    optim = OptimConfig(lr=1e-2, weight_decay=0.1)
    found, found_stds = rates(model, optim), stds(model)
    for name, parameter in model.named_parameters():
        w = expected_width(name)
        decay = 0.1 * w if parameter.dim() == 2 and "embedding" not in name else 0.0
        assert found[name] == pytest.approx((1e-2 / w, decay)), name
        if parameter.dim() == 2:
            depth = 2 if name.startswith("encoder.") else 3
            is_residual = name.endswith(("out.weight", "down.weight"))
            std = 0.02 / math.sqrt(w) / (math.sqrt(2 * depth) if is_residual else 1)
            assert found_stds[name] == pytest.approx(std, rel=5 / math.sqrt(2 * parameter.numel())), name


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_same_rules_as_microsoft_mup(is_tied: bool) -> None:
    """Its `set_base_shapes`, `init.normal_` and `MuAdamW` on the same model. Its bias and embedding decay is left out."""
    theirs = pytest.importorskip("mup")
    config = small_config(**WIDE, share_embeddings=is_tied)
    model = RetroModel(config, torch.Generator().manual_seed(0))
    wider = replace(config, hidden_size=192, ffn_hidden_size=256, encoder_hidden_size=96, encoder_ffn_hidden_size=128, num_attention_heads=12, num_query_groups=4)  # fmt: skip
    base, delta = RetroModel(base_config(config)), RetroModel(replace(wider, mup=False))
    theirs.set_base_shapes(model, base, delta=delta, rescale_params=False, do_assert=False)
    optim = OptimConfig(lr=1e-2, weight_decay=0.1)
    groups = theirs.MuAdamW(model.parameters(), lr=optim.lr, weight_decay=optim.weight_decay).param_groups
    their_rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    ours, before = rates(model, optim), stds(model)
    for name, parameter in model.named_parameters():
        rate, decay = their_rates[id(parameter)]
        assert ours[name][0] == pytest.approx(rate), name
        if ours[name][1]:
            assert ours[name][1] == pytest.approx(decay), name
        if parameter.dim() == 2:
            theirs.init.normal_(parameter, std=0.02)
            depth = 2 if name.startswith("encoder.") else 3
            gain = 1 / math.sqrt(2 * depth) if name.endswith(("out.weight", "down.weight")) else 1.0
            their_std = float(parameter.detach().std()) * gain
            assert before[name] == pytest.approx(their_std, rel=8 / math.sqrt(2 * parameter.numel())), name
    head = model.embedding.weight if is_tied else model.head.weight  # type: ignore[union-attr]
    assert model.output_scale == pytest.approx(1 / head.infshape.width_mult())  # as their MuReadout divides


def test_an_encoder_that_is_as_wide_as_the_decoder_at_the_base_alone() -> None:
    config = small_config(mup=True, hidden_size=96, encoder_hidden_size=48, mup_base_hidden_size=24, mup_base_encoder_hidden_size=24)  # fmt: skip
    widths = width_multipliers(RetroModel(config))
    assert widths["encoder_input.weight"] == 4.0
    assert widths["neighbor_projection.k.0.weight"] == 2.0


@pytest.mark.parametrize("is_tied", [True, False])
def test_at_the_base_width_it_is_the_same_function(is_tied: bool) -> None:
    more = {**BASE, "share_embeddings": is_tied, "encoder_hidden_size": 12}
    plain = RetroModel(small_config(**more), torch.Generator().manual_seed(3)).double()
    scaled = RetroModel(
        small_config(**more, mup=True, mup_base_hidden_size=24), torch.Generator().manual_seed(3)
    ).double()
    tokens, neighbors = small_inputs(plain)
    assert torch.equal(plain(tokens, neighbors), scaled(tokens, neighbors))


@pytest.mark.parametrize("more", [{}, {"share_embeddings": False, "encoder_hidden_size": 12, "mup_base_num_attention_heads": 1}])  # fmt: skip
def test_cached_decoding_equals_the_full_pass(more: dict[str, Any]) -> None:
    model = small_model(mup=True, mup_base_hidden_size=6, **({"mup_base_num_attention_heads": 3} | more))
    assert model.output_scale == 0.25
    tokens, neighbors = small_inputs(model)
    whole = model(tokens, neighbors)
    cache, parts = new_cache(model, 2, 19), []
    for place in range(19):
        done = (place + 1) // 4 - place // 4
        fresh = neighbors[:, place // 4 : place // 4 + 1] if done else None
        parts.append(step(model, cache, tokens[:, place : place + 1], fresh))
    assert float((torch.cat(parts, 1) - whole).detach().abs().max()) < 1e-10


def test_a_base_file_gives_the_base_widths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "folder" / "base.yaml"
    assert main(["mup", "base", "--preset", "tiny", "--out", str(path), "model.init=standard"]) == 0
    target = load_config(
        [f"model.shape_file='{path}'", "model.mup=true", "model.init=standard", "model.hidden_size=512",
         "model.ffn_hidden_size=1024", "model.num_attention_heads=8"], "tiny")  # fmt: skip
    base = base_config(target.model)
    assert (base.hidden_size, base.ffn_hidden_size, base.num_attention_heads, base.encoder_width) == (128, 512, 4, 128)
    plain = TrainedModelConfig(retrieval=False)
    assert "model.mup_base_encoder_hidden_size" not in write_base(plain, tmp_path / "plain.yaml")
    config = load_config([f"model.shape_file='{tmp_path / 'plain.yaml'}'", "model.mup=true", "model.retrieval=false"])
    assert base_config(config.model).num_attention_heads == 12
    capsys.readouterr()


@pytest.mark.parametrize(
    "text", ["model.hidden_size: 3", "model.mup_base_depth: 3", "model.mup_base_hidden_size: wide", "model.mup_base_hidden_size: 0"]
)  # fmt: skip
def test_a_base_file_with_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "base.yaml").write_text(text + "\n")
    with pytest.raises(UsageError):
        load_config([f"model.shape_file='{tmp_path / 'base.yaml'}'", "model.mup=true"])


def test_a_model_at_another_width() -> None:
    m = small_config(**BASE, encoder_hidden_size=12, num_query_groups=1)
    wide = at_width(m, 48, True)
    assert (wide.ffn_hidden_size, wide.encoder_hidden_size, wide.head_width, wide.key_value_heads) == (64, 24, 16, 1)
    assert (wide.mup_base_hidden_size, base_config(wide)) == (24, base_config(at_width(m, 24, True)))
    more = at_width(m, 48, True, keeps_head_width=True)
    assert (more.head_width, more.num_attention_heads, base_config(more).num_attention_heads) == (8, 6, 3)
    with pytest.raises(UsageError, match="multiple"):
        at_width(m, 25, True)


def test_slopes() -> None:
    assert slope({8: [2.0, 2.0], 16: [4.0, 4.0], 32: [8.0, 8.0]}) == pytest.approx(1)
    assert slope({8: [1.0], 16: [1.0]}) == pytest.approx(0)
    assert math.isnan(slope({8: [0.0], 16: [1.0]}))
    assert math.isnan(slope({8: [1.0], 16: [math.nan]}))


def test_the_gate_of_the_check() -> None:
    flat, steep, broken = {8: [1.0], 16: [1.01]}, {8: [1.0], 16: [2.0]}, {8: [1.0], 16: [math.nan]}
    CoordinateCheck({"logits": flat}, {"logits": steep}).gate()
    for with_mup, without in ((steep, steep), (broken, steep), (flat, flat)):
        with pytest.raises(GateError):
            CoordinateCheck({"logits": with_mup}, {"logits": without}).gate()


CHECK = [
    "model.ffn_hidden_size=128",
    "model.dec_num_layers=2",
    "model.dec_cross_attention=[1]",
    "model.enc_num_layers=1",
]


def test_activations_change_alike_at_every_width_with_mup_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    config = mup.open_config(CHECK, None, None)
    check = coordinate_check(config, [64, 256], 5, 2, False, Reporter("quiet"))
    names = {"logits", "encoder", "layer 0", "layer 1", "attention 0", "attention 1", "cca 1"}
    assert check.slopes(True).keys() == names
    check.gate()
    assert all(value > 0.3 for name, value in check.slopes(False).items() if name != "encoder")  # a norm bounds it
    mup.save_check(check, config, 5, tmp_path)
    assert json.loads((tmp_path / "coordinates.json").read_text())["slopes"]["mup"] == pytest.approx(check.slopes(True))
    assert (tmp_path / "coordinates.png").stat().st_size > 10_000


def test_the_check_sees_a_broken_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hidden matrices' rates not divided by w."""
    monkeypatch.setattr(mup, "width_multipliers", lambda model: {})
    check = coordinate_check(mup.open_config(CHECK, None, None), [64, 128], 3, 1, False, Reporter("quiet"))
    with pytest.raises(GateError, match="layer 1"):
        check.gate()


SWEEP = ["model.hidden_size=16", "model.ffn_hidden_size=32", "model.num_attention_heads=2", "model.dec_num_layers=2",
         "model.dec_cross_attention=[1]", "model.enc_num_layers=1", "model.micro_batch_size=2", "model.optim.sched.warmup_steps=1",
         "model.data.splits_string='100,0,0'"]  # fmt: skip


@pytest.mark.parametrize("row", ["{}", '{"mup": true, "width": "x", "rate": 1.0, "seed": 1, "loss": 1.0}', '{"mup": true, "width": 8, "rate": 1.0, "seed": 1, "loss": []}'])  # fmt: skip
def test_cells_that_no_sweep_wrote(tmp_path: Path, row: str) -> None:
    path = tmp_path / "cells.jsonl"
    path.write_text(f"{row}\n")
    with pytest.raises(StoreError, match="is not what a sweep wrote"):
        mup._read_cells(path)
    assert path.read_text() == f"{row}\n"


def test_a_sweep_is_done_in_pieces(small_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    trained: list[mup.Cell] = []
    train_cell = mup._train_cell
    monkeypatch.setattr(
        mup, "_train_cell", lambda c, d, m, rate, seed, steps: trained.append((m.mup, m.hidden_size, rate, seed)) or train_cell(c, d, m, rate, seed, steps)
    )  # fmt: skip

    def run(widths: list[int], steps: int = 4) -> Sweep:
        config: Config = mup.open_config([*SWEEP, "model.data.neighbors=bm25"], None, str(small_store.folder))
        return mup.sweep(config, widths, [1e-3, 2e-3], 1, steps, tmp_path / "out", False, Reporter("quiet"))

    run([16])
    assert len(trained) == 4
    cells = tmp_path / "out" / "cells.jsonl"
    lines = cells.read_text()
    cells.write_text(lines[:-9])  # killed while it wrote
    result = run([16, 32])
    assert len(trained) == 4 + 1 + 4
    assert set(lines.splitlines()) < set(cells.read_text().splitlines())  # the same model, the same loss
    assert result.widths(True) == [16, 32]
    assert result.losses[True, 16, 1e-3, 1234] == result.losses[False, 16, 1e-3, 1234]  # the base width
    assert len(run([16, 32]).losses) == 8
    assert len(trained) == 9
    with pytest.raises(UsageError, match="steps"):
        run([16], steps=5)
    assert (tmp_path / "out" / "sweep.png").exists()


def test_the_best_rate_and_how_far_it_moved() -> None:
    losses = {(True, w, rate, 0): abs(math.log2(rate) + 8) for w in (64, 128) for rate in (2**-9, 2**-8, 2**-7)}
    losses |= {(False, w, rate, 0): abs(math.log2(rate * w) + 1) for w in (64, 256) for rate in (2**-9, 2**-8, 2**-7)}
    losses[True, 64, 2**-6, 0] = math.nan

    result = Sweep(losses)
    assert result.best(True) == {64: 2**-8, 128: 2**-8}
    assert (result.moved(True), result.moved(False)) == (0.0, -2.0)
    assert "edge" in result.table()
    assert Sweep({(True, 64, 0.1, 0): math.nan}).moved(True) is None


@pytest.mark.parametrize(
    "words",
    [
        ["base"],
        ["check", "--widths", "64"],
        ["check", "--widths", "64,x"],
        ["check", "--widths", "64,64"],
        ["check", "--seeds", "0"],
        ["check", "--steps", "0"],
        ["check", "--preset", "tiny"],  # retrieval_ready
        ["sweep"],
        ["check", "trainer.max_steps=7"],  # what it does not read
        ["check", "exp_manager.exp_dir=x"],
        ["base", "--out", "x.yaml", "inference.greedy=false"],
        ["sweep", "store", "model.optim.lr=1e-3"],
    ],
)
def test_bad_input(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mup", *words]) == 2
    assert "error:" in capsys.readouterr().err


def test_a_warm_up_as_long_as_the_run_is_refused(small_store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mup", "sweep", str(small_store.folder), "--steps", "10"]) == 2
    assert "warmup_steps" in capsys.readouterr().err


def test_a_sweep_below_min_lr_and_a_gpu_are_refused(small_store: Store, tmp_path: Path) -> None:
    """Such a rate would go up to min_lr instead of down; the check runs on the CPU alone."""
    config = mup.open_config([], None, str(small_store.folder))
    with pytest.raises(UsageError, match=r"below model\.optim\.sched\.min_lr=6e-05"):
        mup.sweep(config, [64], [1e-3, 1e-5], 1, 300, tmp_path / "out", False, Reporter("quiet"))
    with pytest.raises(UsageError, match="checked on the CPU"):
        mup.open_config(["trainer.accelerator=gpu"], None, None)
