"""The contestants of the model benches: what they compute, what they measure, and who is left out."""

import pytest
import torch

from retro_engine.bench import model, peers
from retro_engine.bench.peers import SHAPES, Contestant, Inputs, Shape

TINY = Shape(6, 32, 2, 64, length=128, batch=1)


@pytest.mark.parametrize("name", ["ours", "ours, full", "gpt2"])
def test_steps_learn_and_decoding_runs(name: str) -> None:
    if reason := peers.missing(name):
        pytest.skip(reason)
    module, step, decode = peers.build(name, TINY)
    inputs = Inputs.draw(TINY)
    first = step(inputs)
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
    for _ in range(4):
        last = step(inputs)
    assert last < first
    with torch.inference_mode():
        decode(inputs.tokens[:, :64], inputs.neighbors, 65)


def test_a_contestant_answers_from_its_own_process() -> None:
    contestant = Contestant("ours", TINY, 1)
    try:
        seconds, mib, loss = contestant.step(2)
        assert seconds > 0 and mib > 0 and 0 < loss < 10
        assert contestant.parameters > 10_000
    finally:
        contestant.close()


def test_sizes_are_what_they_say() -> None:
    for size, shape in SHAPES.items():
        from retro_engine.model.retro import RetroModel

        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in RetroModel(shape.config()).parameters())
        assert count / 1e6 == pytest.approx(float(size.removesuffix("M")), rel=0.15), size


def test_peers_that_are_absent_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    rows = model.run(["tiny"], ["ours", "megatron-core"], rounds=1)
    assert [row.implementation for row in rows] == ["ours"]
    assert "megatron-core is left out" in capsys.readouterr().out
