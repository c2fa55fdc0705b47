"""Runs whose weights stay while adapters beside them learn: what is saved, read again with its base, resumed and exported."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_helpers import losses

from retro_engine.cli.artefacts import Checkpoint, open_artefact
from retro_engine.config import ModelConfig, check, load_config
from retro_engine.data.store import Store
from retro_engine.errors import MissingInputError, RetroError, StoreError, UsageError
from retro_engine.generate.open_model import open_model
from retro_engine.interop.exports import export_model
from retro_engine.interop.imports import Imported, import_model, write_checkpoint
from retro_engine.model.lora import is_adapter
from retro_engine.model.retro import RetroModel
from retro_engine.progress import Reporter
from retro_engine.train import checkpoint
from retro_engine.train.adapters import load_model, read_weights
from retro_engine.train.loop import train
from retro_engine.train.plan import plan
from retro_engine.train.retrofit import inherit, is_new
from retro_engine.train.run_data import open_evaluation

RUN = [
    "model.chunk_size=16", "model.encoder_seq_length=64", "model.enc_num_layers=1", "model.enc_cross_attention=[0]",
    "model.micro_batch_size=2", "model.data.splits_string='80,20,0'", "model.optim.lr=1e-2", "model.lora.rank=2",
    "model.optim.sched.warmup_steps=2", "trainer.max_steps=4", "trainer.val_check_interval=100", "model.lora.dropout=0.1",
    "trainer.log_every_n_steps=1", "trainer.precision=32", "model.data.neighbors=bm25", "model.optim.sched.max_steps=4",
]  # fmt: skip
PREFIX = ["model.reading=prefix", "model.sink_id=0"]


def decoder(store: Store, folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 2, "dec_num_layers": 2}
    config = ModelConfig(vocab_size=store.vocab_size, retrieval=False, hidden_dropout=0, attention_dropout=0, **sizes)
    write_checkpoint(Imported(RetroModel(config), store.tokenizer, "hf"), folder, "x")
    return folder


@pytest.fixture(scope="module")
def source(small_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder(small_store, tmp_path_factory.mktemp("source") / "decoder")


def settings(store: Store, source: Path, out: Path, *more: str) -> list[str]:
    return [*RUN, f"model.data.store='{store.folder}'", f"model.init_from='{source}'", f"exp_manager.exp_dir='{out}'", *more]  # fmt: skip


def run(store: Store, source: Path, out: Path, *more: str) -> Path:
    """The checkpoint of a run."""
    return train(load_config(settings(store, source, out, *more)), Reporter("quiet")).checkpoint


@pytest.fixture(scope="module")
def tuned(small_store: Store, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a decoder that was tuned to read neighbors in front."""
    return run(small_store, source, tmp_path_factory.mktemp("tuned") / "run", *PREFIX)


def test_adapters_alone_are_saved(small_store: Store, source: Path, tuned: Path) -> None:
    own = load_file(tuned / "adapters.safetensors")
    assert own
    assert all(is_adapter(name) for name in own)
    assert all(value.abs().max() > 0 for value in own.values()), "every one has learned"
    assert not (tuned / "model.safetensors").exists()
    (shard,) = (tuned / "optimizer").iterdir()
    state = {name.split(".", 1)[1] for name in load_file(shard) if "random_state" not in name}
    assert state == own.keys(), "the optimizer knows of nothing else"
    before, after = load_file(source / "model.safetensors"), read_weights(tuned)
    assert after.keys() == before.keys()
    for name, value in before.items():
        has_adapter = name.removesuffix("weight") + "adapter.a" in own
        assert torch.equal(after[name], value) == (not has_adapter), name
    base = checkpoint.read_base(tuned)
    assert base is not None
    assert (base.folder, base.lora.rank) == (source.resolve(), 2)
    with open_artefact(tuned) as artefact:
        assert isinstance(artefact, Checkpoint)
        assert artefact.summary()["base"] == str(base.folder)
    opened = open_model(tuned.parent.parent, device="cpu").model
    assert opened.config.reads_prefix
    assert all(torch.equal(value, after[name]) for name, value in opened.state_dict().items())
    assert len(open_evaluation(tuned, opened.config, [], "valid").documents) > 0


def test_frozen_weights_stay_and_the_rest_of_a_retrofit_learns(
    small_store: Store, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoder and cross-attention are new: they learn whole, and are saved beside the adapters."""
    states: list[dict[str, torch.Tensor]] = []
    save = checkpoint.Saver.save

    def spy(self: checkpoint.Saver, step: int, model: RetroModel, *rest: Any, **named: Any) -> None:
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        save(self, step, model, *rest, **named)

    monkeypatch.setattr(checkpoint.Saver, "save", spy)
    folder = run(small_store, source, tmp_path / "run", "model.lora.targets=[q,v]", "model.data.neighbor_dropout=0.2")
    before, own = load_file(source / "model.safetensors"), load_file(folder / "adapters.safetensors")
    (during,) = states
    assert all(torch.equal(during[name], value) for name, value in before.items())
    assert {name for name in own if is_adapter(name)} == {
        f"layers.{layer}.attention.{kind}.adapter.{part}" for layer in (0, 1) for kind in "qv" for part in "ab"
    }
    new = {name for name in during if is_new(name)}
    assert own.keys() == new | {name for name in own if is_adapter(name)}
    assert during["layers.1.cross.out.weight"].abs().max() > 0
    assert read_weights(folder).keys() == before.keys() | new


def test_the_first_loss_is_the_bases(small_store: Store, source: Path, tuned: Path, tmp_path: Path) -> None:
    train(load_config(settings(small_store, source, tmp_path / "whole", *PREFIX, "model.lora.rank=0", "model.lora.dropout=0", "trainer.max_steps=1")), Reporter("quiet"))  # fmt: skip
    assert losses(tmp_path / "whole")[1] == losses(tuned.parent.parent)[1]


def test_a_resumed_run_is_the_same(small_store: Store, source: Path, tuned: Path, tmp_path: Path) -> None:
    """Losses, adapters and the optimizer's state to the last bit; dropout is on."""
    out = tmp_path / "cut"
    for steps in ("2", "4"):
        last = run(small_store, source, out, *PREFIX, f"trainer.max_steps={steps}")
    assert losses(out) == losses(tuned.parent.parent)
    for path in ("adapters.safetensors", next((tuned / "optimizer").iterdir()).relative_to(tuned)):
        mine, theirs = load_file(last / path), load_file(tuned / path)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    for more, named in (("model.lora.rank=4", "lora.rank 2 -> 4"), ("model.lora.alpha=8", "lora.alpha 16.0 -> 8"),
                        ("model.lora.targets=[q]", r"lora.targets None -> \['q'\]")):  # fmt: skip
        with pytest.raises(UsageError, match=named):
            run(small_store, source, out, *PREFIX, "trainer.max_steps=5", more)
    other = decoder(small_store, tmp_path / "other", seed=1)
    with pytest.raises(UsageError, match="another model: base "):
        run(small_store, other, out, *PREFIX, "trainer.max_steps=5")


def test_an_export_is_a_plain_model(tuned: Path, tmp_path: Path) -> None:
    export_model(tuned, tmp_path / "hf")
    again = import_model(tmp_path / "hf").model.state_dict()
    merged = read_weights(tuned)
    assert again.keys() == merged.keys()
    assert all(torch.equal(again[name], value) for name, value in merged.items())


def test_questions_are_tuned_on_adapters_beside_adapters(small_store: Store, tuned: Path, tmp_path: Path) -> None:
    """The base may have adapters itself; what it reads is inherited."""
    row = {"question": "what is it", "answer": "a stone", "neighbors": ["the river and the stone"]}
    (tmp_path / "q.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    asked = [f"model.data.questions='{tmp_path / 'q.jsonl'}'", "model.data.splits_string='100,0,0'"]
    folder = run(
        small_store, tuned.parent.parent, tmp_path / "qa", *asked, "model.data.neighbors=null", "trainer.max_steps=2"
    )
    base = checkpoint.read_base(folder)
    assert base is not None
    assert base.folder == tuned.resolve()
    opened = open_model(folder, device="cpu").model
    assert opened.config.reads_prefix
    name = "layers.1.attention.q.weight"
    assert not torch.equal(opened.state_dict()[name], read_weights(tuned)[name])
    assert losses(tmp_path / "qa")[2] > 0


def test_another_base_or_none(small_store: Store, source: Path, tuned: Path, tmp_path: Path) -> None:
    """Moved together they are found; without the base, or with another in its place, nothing is loaded."""
    kept = tmp_path / "there"
    relative = Path(json.loads((tuned / "adapters.json").read_text())["base"])
    assert not relative.is_absolute()
    folder = kept / "a" / "b" / "c" / "d" / "e"
    place = folder / relative
    shutil.copytree(tuned, folder)
    with pytest.raises(
        MissingInputError, match=r"holds adapters beside the weights of .*\n(.*\n)*.*retro import MODEL --out"
    ):
        open_model(folder, device="cpu")
    shutil.copytree(source, place)
    open_model(folder, device="cpu")
    shutil.rmtree(place.resolve())
    decoder(small_store, place.resolve(), seed=1)
    with pytest.raises(StoreError, match="there are others now: .* were trained beside"):
        open_model(folder, device="cpu")
    shutil.rmtree(place.resolve())
    shutil.copytree(source, place.resolve())
    weights = place.resolve() / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.unlink()
    weights.write_bytes(raw)
    with pytest.raises(StoreError, match="model.safetensors"):
        open_model(folder, device="cpu")


@pytest.mark.parametrize(("name", "change", "why"), [
    ("adapters.json", {"rank": 0}, r"adapters.json.rank is 0"),
    ("adapters.json", {"fingerprint": "x"}, "adapters.json.fingerprint"),
    ("adapters.json", {"rank": 3}, "of rank 3"),
    ("adapters.safetensors", {"layers.0.attention.q.adapter.a": torch.zeros(2, 9)}, "of rank 2"),
    ("adapters.safetensors", {"layers.7.attention.q.weight": torch.zeros(2, 9)}, "extra .*layers.7"),
])  # fmt: skip
def test_adapters_that_are_damaged(tuned: Path, name: str, change: dict[str, Any], why: str) -> None:
    """Refused by their checksum, and by what they hold where that is right."""
    folder = tuned.with_name("damaged")
    shutil.copytree(tuned, folder)
    path = folder / name
    values = json.loads(path.read_text()) if name.endswith("json") else load_file(path)
    path.unlink()
    if name.endswith("json"):
        path.write_text(json.dumps(values | change))
    else:
        save_file(values | change, path)
    try:
        with pytest.raises(StoreError, match=name):
            open_model(folder, device="cpu")
        with pytest.raises(RetroError, match=why):
            load_model(folder)
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize(("more", "message"), [
    (["model.lora.rank=-1"], "model.lora.rank=-1 cannot be used\n.*at least 0"),
    (["model.lora.rank=33"], "model.lora.rank=33 cannot be used\n.*at most model.hidden_size=32"),
    (["model.lora.rank=0"], "model.lora.dropout=0.1 cannot be used\n.*without model.lora.rank"),
    (["model.lora.targets=[q,w1]"], r"model.lora.targets=\['q', 'w1'\] cannot be used\n.*q, k, v, out, gate, up, down"),
    (["model.lora.targets=[]"], "model.lora.targets"),
    (["model.unfreeze_step=3", "model.freeze_decoder=true"], "model.unfreeze_step=3 cannot be used\n.*stay"),
    (["model.tensor_model_parallel_size=2"], "model.lora.rank=2 cannot be used\n.*not cut\n.*tensor_model_parallel_size=1"),
    (["model.optim.name=distributed_fused_adam"], "model.lora.rank=2 cannot be used\n.*whole in every process"),
    (["trainer.strategy=fsdp"], "model.lora.rank=2 cannot be used\n.*whole in every process"),
    ([*PREFIX, "model.freeze_decoder=true"], "model.freeze_decoder=True cannot be used\n.*nothing else"),
])  # fmt: skip
def test_settings_that_cannot_apply(small_store: Store, source: Path, more: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        inherit(load_config(settings(small_store, source, Path("x"), *more)))


def test_settings_that_mean_nothing_with_adapters() -> None:
    with pytest.raises(UsageError, match="model.lora.rank=8 cannot be used\n.*given and stay\n.*model.init_from"):
        load_config(["model.lora.rank=8"])
    beside = ["model.lora.rank=8", "model.init_from=x"]
    for others, rule in (
        (["model.activation=gelu", "model.lora.targets=[gate]"], "model.activation=gelu has no gate"),
        (["model.mup=true", "model.mup_base_hidden_size=384"], "do not transfer"),
    ):
        with pytest.raises(UsageError, match=rule):
            check(load_config([*beside, *others]))
    with pytest.raises(UsageError, match="model.lora.rank=8 cannot be planned"):
        plan(load_config([*beside, "model.vocab_size=100"]), 1)
    check(load_config([*beside, "model.activation=gelu"]))
