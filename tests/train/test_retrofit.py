"""Retro-fitting: step 0 is the decoder exactly, what is frozen stays, schedules resume, what does not fit is named."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_helpers import launch_several, losses

from retro_engine.config import ModelConfig, load_config
from retro_engine.data.chat_files import ChatFiles
from retro_engine.data.neighbor_table import NeighborTable
from retro_engine.data.store import Store
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import StoreError, UsageError
from retro_engine.interop.imports import Imported, write_checkpoint
from retro_engine.model.retro import RetroModel
from retro_engine.model.weights import read_config
from retro_engine.progress import Reporter
from retro_engine.train.checkpoint import find_checkpoint
from retro_engine.train.loop import train
from retro_engine.train.retrofit import crossing_layers, inherit, is_new, load_initial
from retro_engine.train.run_data import open_evaluation, run_databases

RUN = [
    "model.chunk_size=16", "model.encoder_seq_length=64", "model.enc_num_layers=1", "model.enc_cross_attention=[0]",
    "model.micro_batch_size=2", "model.data.splits_string='80,20,0'", "model.optim.lr=5e-3", "model.hidden_dropout=0",
    "model.attention_dropout=0", "model.optim.sched.warmup_steps=2", "trainer.max_steps=6", "trainer.val_check_interval=100",
    "trainer.log_every_n_steps=1", "trainer.precision=32", "model.data.neighbors=bm25", "model.dec_cross_attention=[1,2]",
]  # fmt: skip


def decoder_config(store: Store, **more: Any) -> ModelConfig:
    """As Qwen2 is: grouped queries, q, k and v biases, another base of RoPE, and rows of padding in the embedding."""
    values: dict[str, Any] = {
        "vocab_size": store.vocab_size + 20, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4,
        "num_query_groups": 2, "dec_num_layers": 3, "retrieval": False, "qk_bias": True, "v_bias": True,
        "rotary_base": 1e5, "rotary_percentage": 0.5, "layernorm_epsilon": 1e-6, "init_method_std": 0.2,
        "hidden_dropout": 0.0, "attention_dropout": 0.0,
    }  # fmt: skip
    return ModelConfig(**(values | more))


@pytest.fixture(scope="module")
def source(small_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("source") / "decoder"
    model = RetroModel(decoder_config(small_store))
    write_checkpoint(Imported(model, small_store.tokenizer, "hf"), folder, "x")
    return folder


def settings(store: Store, source: Path, *more: str, out: Path | None = None) -> list[str]:
    where = [f"exp_manager.exp_dir='{out}'"] if out is not None else []
    return [*RUN, f"model.data.store='{store.folder}'", f"model.init_from='{source}'", *where, *more]


def retrofitted(store: Store, source: Path, *more: str) -> RetroModel:
    config = load_config(settings(store, source, *more))
    inherit(config)
    torch.manual_seed(1)
    model = RetroModel(config.model)
    load_initial(source, model)
    return model.eval()


def test_step_zero_is_the_decoder_exactly(small_store: Store, source: Path) -> None:
    plain = RetroModel(read_config(source))
    plain.load_state_dict(load_file(source / "model.safetensors"))
    plain.eval()
    model = retrofitted(small_store, source)
    tokens = torch.randint(0, 300, (2, 64), generator=torch.Generator().manual_seed(0))
    neighbors = torch.randint(0, 300, (2, 4, 2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(tokens, neighbors), plain(tokens))
        model.layers[1].cross.out.weight.add_(0.1)  # and the neighbors are read
        assert not torch.equal(model(tokens, neighbors), plain(tokens))


def test_the_settings_of_the_decoder_are_inherited(small_store: Store, source: Path) -> None:
    c = retrofitted(small_store, source).config
    theirs = read_config(source)
    for name in ("num_query_groups", "rotary_base", "rotary_percentage", "layernorm_epsilon", "v_bias", "vocab_size"):
        assert getattr(c, name) == getattr(theirs, name), name
    assert c.encoder_key_value_heads == 2
    assert c.retrieval
    assert c.dec_cross_attention == [1, 2]
    assert [crossing_layers(n) for n in (2, 6, 12, 30)] == [[1], [5], [5, 8, 11], [8, 11, 14, 17, 20, 23, 26, 29]]
    no_dropout = ["model.hidden_dropout=0.1", "model.attention_dropout=0.1"]  # the defaults: the decoder's count
    assert retrofitted(small_store, source, *no_dropout).config.hidden_dropout == 0
    assert retrofitted(small_store, source, "model.hidden_dropout=0.2").config.hidden_dropout == 0.2
    wider = retrofitted(small_store, source, "model.encoder_hidden_size=48", "model.num_neighbors=1")
    assert wider.encoder_input is not None


@pytest.mark.parametrize(("more", "message"), [
    (["model.hidden_size=64"], "model.hidden_size=64 does not fit\n.*has 32\n.*leave model.hidden_size out"),
    (["model.normalization=layernorm"], "model.normalization=layernorm does not fit"),
    (["model.init=retrieval_ready"], "model.init=retrieval_ready cannot be used"),
    (["model.dec_cross_attention=[5]"], "there are 3"),
    (["model.unfreeze_step=3"], "without model.freeze_decoder"),
    (["model.freeze_decoder=true", "model.unfreeze_every=3"], "without model.unfreeze_step"),
    (["model.freeze_decoder=true", "model.data.neighbor_dropout=0.1"], "learns nothing from a batch without neighbors"),
    (["model.freeze_decoder=true", "model.retrieval=false"], "nothing else that could learn"),
])  # fmt: skip
def test_settings_that_do_not_fit(small_store: Store, source: Path, more: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        inherit(load_config(settings(small_store, source, *more)))
    with pytest.raises(UsageError, match="without model.init_from"):
        load_config(["model.freeze_decoder=true"])


def test_another_tokenizer_and_other_tensors(small_store: Store, source: Path, tmp_path: Path) -> None:
    from retro_engine.data.tokenizer import Tokenizer

    other = Tokenizer.train(["x y z"], 300)
    model = RetroModel(decoder_config(small_store))
    write_checkpoint(Imported(model, other, "hf"), tmp_path / "x", "x")
    with pytest.raises(StoreError, match=r"has tokenizer .*\n.*\n.*retro prepare --tokenizer"):
        train(load_config(settings(small_store, tmp_path / "x", out=tmp_path / "run")))
    config = load_config(settings(small_store, source))
    inherit(config)
    config.model.dec_num_layers = 2
    config.model.dec_cross_attention = [1]
    with pytest.raises(StoreError, match=r"extra .*layers.2"):
        load_initial(source, RetroModel(config.model))


PREFIX = ["model.reading=prefix", "model.dec_cross_attention=[3,4,5]"]  # the default, which means nothing then


def test_a_decoder_is_tuned_to_read_in_front(small_store: Store, source: Path, tmp_path: Path) -> None:
    tokenizer = small_store.tokenizer
    start = retrofitted(small_store, source, *PREFIX)
    assert {name for name, _ in start.named_parameters()} == set(load_file(source / "model.safetensors"))
    train(load_config(settings(small_store, source, *PREFIX, "trainer.max_steps=2", out=tmp_path / "run")))
    tuned = read_config(find_checkpoint(tmp_path / "run"))
    assert (tuned.reading, tuned.sink_id, tuned.chunk_size) == ("prefix", tokenizer.sink_id, 16)
    before, after = load_file(source / "model.safetensors"), weights(tmp_path / "run")
    assert all(after[name].isfinite().all() and not torch.equal(value, after[name]) for name, value in before.items())
    again = load_config(settings(small_store, tmp_path / "run", "model.dec_cross_attention=[3,4,5]"))
    inherit(again)  # tuned further, it reads as before
    assert again.model.reads_prefix
    assert not again.model.fit_cross_attention


def test_reading_in_front_that_cannot_be_tuned(small_store: Store, source: Path, tmp_path: Path) -> None:
    learned = RetroModel(decoder_config(small_store, position_embedding="learned", max_position_embeddings=96))
    write_checkpoint(Imported(learned, small_store.tokenizer, "hf"), tmp_path / "learned", "x")
    for where, more, message in (
        (source, "model.fit_cross_attention=true", "reading=prefix has no cross-attention"),
        (source, "model.freeze_decoder=true", "nothing else that could learn"),
        (source, "model.sink_id=100000", "sink_id is below"),
        (tmp_path / "learned", "model.num_neighbors=2", "96 positions, 65 of them for the neighbors in front"),
    ):
        with pytest.raises(UsageError, match=message):
            inherit(load_config(settings(small_store, where, *PREFIX, more)))
    model = RetroModel(decoder_config(small_store, retrieval=True, chunk_size=16, dec_cross_attention=[1], enc_num_layers=1, enc_cross_attention=[0]))  # fmt: skip
    write_checkpoint(Imported(model, small_store.tokenizer, "hf"), tmp_path / "retro", "x")
    with pytest.raises(UsageError, match=r"model\.reading=prefix does not fit\n.*cross_attention"):
        inherit(
            load_config(
                settings(small_store, tmp_path / "retro", "model.reading=prefix", "model.dec_cross_attention=[1]")
            )
        )


def weights(run: Path) -> dict[str, torch.Tensor]:
    (path,) = run.glob("checkpoints/*/model.safetensors")
    return load_file(path)


def test_a_frozen_decoder_stays_and_the_rest_learns(small_store: Store, source: Path, tmp_path: Path) -> None:
    config = load_config(settings(small_store, source, "model.freeze_decoder=true", out=tmp_path / "run"))
    result = train(config)
    before, after = load_file(source / "model.safetensors"), weights(tmp_path / "run")
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert all(is_new(name) for name in after.keys() - before.keys())
    assert after["layers.2.cross.out.weight"].abs().max() > 0
    found = open_evaluation(result.checkpoint, read_config(result.checkpoint), [], "valid")  # without the source
    assert len(found.documents) > 0


def test_unfreezing_from_the_last_layer_down(small_store: Store, source: Path, tmp_path: Path) -> None:
    more = ["model.freeze_decoder=true", "model.unfreeze_step=2", "model.unfreeze_every=2"]
    config = load_config(settings(small_store, source, *more, out=tmp_path / "run"))
    train(config)
    before, after = load_file(source / "model.safetensors"), weights(tmp_path / "run")
    moved = {
        name.split(".")[1]
        for name in before
        if name.startswith("layers.") and not torch.equal(after[name], before[name])
    }
    assert moved == {"1", "2"}, "two layers in steps 2 to 5"
    assert torch.equal(after["embedding.weight"], before["embedding.weight"])
    cut = [*more, "trainer.max_steps=3"]
    train(load_config(settings(small_store, source, *cut, out=tmp_path / "cut")))
    train(load_config(settings(small_store, source, *more, out=tmp_path / "cut")))
    whole, resumed = losses(tmp_path / "run"), losses(tmp_path / "cut")
    assert whole[6] == pytest.approx(resumed[6], rel=1e-6)
    assert len(resumed) == 6
    everything = [*more[:2], *more[3:]]
    train(load_config(settings(small_store, source, *everything, out=tmp_path / "all")))
    assert not torch.equal(weights(tmp_path / "all")["embedding.weight"], before["embedding.weight"])


LAYOUTS = {
    "dp2": [],
    "fsdp2": ["model.optim.name=distributed_fused_adam"],
    "tp2": ["model.tensor_model_parallel_size=2", "model.micro_batch_size=2"],
    "tp2 sequence": ["model.tensor_model_parallel_size=2", "model.micro_batch_size=2", "model.sequence_parallel=true"],
}


@pytest.mark.long
def test_two_processes_freeze_and_unfreeze_as_one_does(small_store: Store, source: Path, tmp_path: Path) -> None:
    exact = ["trainer.precision=64", "model.freeze_decoder=true", "trainer.max_steps=4", "model.optim.weight_decay=0.1"]
    exact += ["model.global_batch_size=4", "model.micro_batch_size=1", "trainer.limit_val_batches=1"]
    runs = {"frozen": [], "from the last": ["model.unfreeze_step=1", "model.unfreeze_every=2"]}
    adapters = [*exact[:1], *exact[2:], "model.lora.rank=2", "model.lora.targets=[q,v,up]"]
    train(load_config(settings(small_store, source, *adapters, out=tmp_path / "lora")))
    before = load_file(source / "model.safetensors")
    several = {"lora dp2": settings(small_store, source, *adapters, out=tmp_path / "lora dp2")}
    chosen = dict.fromkeys(runs, LAYOUTS) if os.environ.get("RETRO_CAMPAIGN") else {
        "frozen": {name: LAYOUTS[name] for name in ("fsdp2", "tp2")},
        "from the last": {name: LAYOUTS[name] for name in ("dp2", "tp2 sequence")},
    }  # fmt: skip
    for name, more in runs.items():
        train(load_config(settings(small_store, source, *exact, *more, out=tmp_path / name)))
        for layout, flags in chosen[name].items():
            out = tmp_path / f"{name} {layout}"
            several[out.name] = settings(small_store, source, *exact, *more, *flags, out=out)
    codes, said = launch_several(2, several, tmp_path)
    assert codes == dict.fromkeys(several, 0), said[-3000:]
    expected, found = losses(tmp_path / "lora"), losses(tmp_path / "lora dp2")
    assert max(abs(found[step] - expected[step]) for step in expected) <= 1e-9, "adapters"
    for name in runs:
        expected, alone = losses(tmp_path / name), weights(tmp_path / name)
        for layout in chosen[name]:
            found, after = losses(tmp_path / f"{name} {layout}"), weights(tmp_path / f"{name} {layout}")
            assert max(abs(found[step] - expected[step]) for step in expected) <= 1e-9, (name, layout)
            for key in before:
                is_kept = torch.equal(after[key], before[key])
                assert is_kept == torch.equal(alone[key], before[key]), (name, layout, key)
                assert is_kept or name != "frozen"


def test_a_retro_is_tuned_whole(small_store: Store, source: Path, tmp_path: Path) -> None:
    train(load_config(settings(small_store, source, "trainer.max_steps=2", out=tmp_path / "one")))
    config = load_config(
        [f"model.init_from='{tmp_path / 'one'}'", *RUN[1:2], *RUN[4:13], f"model.data.store='{small_store.folder}'",
         "model.data.neighbors=bm25", f"exp_manager.exp_dir='{tmp_path / 'two'}'", "trainer.max_steps=1",
         "model.optim.lr=1e-12", "model.optim.sched.min_lr=0"]
    )  # fmt: skip
    train(config)
    assert config.model.enc_num_layers == 1
    for name, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], value, rtol=0, atol=1e-6)


def test_the_warm_up_reads_the_text_itself(small_store: Store, source: Path, tmp_path: Path) -> None:
    from retro_engine.data.batches import Sequences

    table = NeighborTable(small_store.folder / "neighbors" / "bm25", small_store)
    sequences = Sequences(small_store, np.arange(5), 64, table, 2, 32)
    rows = sequences.in_order()[:2]
    batch = sequences.batch(rows, "self")
    assert batch.neighbors is not None
    assert batch.lengths is not None
    for b, u in zip(*np.nonzero(rows >= 0)):
        own = batch.tokens[b, u * 16 : u * 16 + 16]
        length = int(batch.lengths[b, u, 0])
        assert np.array_equal(batch.neighbors[b, u, 0, : min(length, 16)], own[: min(length, 16)])
        assert batch.lengths[b, u, 1] == 0
    assert (batch.lengths[rows < 0] == 0).all()
    more = ["model.data.self_neighbor_steps=3", "model.freeze_decoder=true"]
    train(load_config(settings(small_store, source, *more, out=tmp_path / "run")))
    train(load_config(settings(small_store, source, "model.freeze_decoder=true", out=tmp_path / "plain")))
    one, other = losses(tmp_path / "run"), losses(tmp_path / "plain")
    assert one[1] == other[1], "step 0 reads nothing yet"
    assert one[4] != other[4]


def test_the_warm_up_needs_the_text_among_the_neighbors(small_store: Store, source: Path, tmp_path: Path) -> None:
    from helpers import write_corpus

    from retro_engine.data.prepare import prepare
    from retro_engine.retrieval.neighbors import build_neighbors

    text = write_corpus(tmp_path / "q.jsonl", 8, seed=9)
    query = prepare([text], tmp_path / "q", tokenizer=str(small_store.folder), chunk_size=16)
    build_neighbors(query, [small_store], "bm25", num_neighbors=4)
    more = settings(query, source, "model.data.self_neighbor_steps=3", out=tmp_path / "run")
    with pytest.raises(UsageError, match="is not one of the stores"):
        train(load_config(more))


def test_cross_attention_is_fitted_to_the_decoder(small_store: Store, source: Path, tmp_path: Path) -> None:
    """Step 0 is the decoder's, the run says what it did, and a resumed run does not do it again."""
    torch.manual_seed(0)
    wide = decoder_config(small_store, hidden_size=96, num_attention_heads=6, rotary_percentage=1.0)
    write_checkpoint(Imported(RetroModel(wide), small_store.tokenizer, "hf"), tmp_path / "wide", "x")
    said: list[str] = []
    reporter = Reporter("quiet")
    reporter.say = said.append  # type: ignore[method-assign, assignment]
    more = ["model.fit_cross_attention=true", "model.freeze_decoder=true"]

    def run(name: str, *settings_: str) -> dict[int, float]:
        train(load_config(settings(small_store, tmp_path / "wide", *settings_, out=tmp_path / name)), reporter)
        return losses(tmp_path / name)

    plain = run("plain", more[1], "model.cca_position_embedding=none", "model.fit_cross_attention=false")
    assert not any("cross-attention fitted to" in line for line in said)
    whole = run("whole", *more)
    assert plain[1] == whole[1]
    assert plain[6] != whole[6]
    assert any("cross-attention fitted to" in line for line in said)
    run("cut", *more, "trainer.max_steps=3")
    said.clear()
    assert run("cut", *more)[6] == pytest.approx(whole[6], rel=1e-6)
    assert not any("cross-attention fitted to" in line for line in said)
    (checkpoint,) = (tmp_path / "whole" / "checkpoints").glob("step-*")
    assert len(open_evaluation(checkpoint, read_config(checkpoint), [], "valid").documents)
    assert [store.fingerprint for store in run_databases(checkpoint)] == [small_store.fingerprint]
    with pytest.raises(UsageError, match="12 rotary dimensions"):
        inherit(load_config(settings(small_store, source, *more)))
    for decoder, is_fitted in ((tmp_path / "wide", True), (source, False)):  # where nothing is said
        config = load_config(settings(small_store, decoder))
        inherit(config)
        assert config.model.fit_cross_attention is is_fitted
        assert config.model.cca_position_embedding == ("none" if is_fitted else "rope")
    with pytest.raises(UsageError, match="a plain decoder's"):
        inherit(load_config([*more[:1], f"model.init_from='{tmp_path / 'whole'}'"]))


def test_a_chat_model_stays_one(small_store: Store, tmp_path: Path) -> None:
    """Its template and its end tokens are in the checkpoints of the run, also after it was resumed."""
    tokenizer = Tokenizer(small_store.tokenizer.json)
    tokenizer.chat_files = ChatFiles({"default": "{{ messages }}"}, end_ids=(7,))
    write_checkpoint(Imported(RetroModel(decoder_config(small_store)), tokenizer, "hf"), tmp_path / "source", "x")
    for steps in (1, 2):
        overrides = settings(small_store, tmp_path / "source", f"trainer.max_steps={steps}", out=tmp_path / "run")
        train(load_config(overrides), Reporter("quiet"))
        found = Tokenizer.load(find_checkpoint(tmp_path / "run"))
        assert found.chat_files.templates == {"default": "{{ messages }}"}
        assert found.end_ids == [7, small_store.tokenizer.eod_id]
