"""Settings: precedence, types, names that are nearly right."""

import errno
import os
from pathlib import Path

import pytest
from training_helpers import NEMO_TRAINING

from retro_engine.config import PRESETS, Config, check_model, flat_keys, load_config, preset_model, splits, to_yaml
from retro_engine.config.yaml_file import read_yaml
from retro_engine.errors import MissingInputError, OutOfResourceError, UsageError


def test_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """defaults < preset < file < environment < overrides"""
    assert load_config().model.optim.lr == 6e-4
    assert load_config(preset_name="tiny").model.optim.lr == 3e-3
    (tmp_path / "c.yaml").write_text("model:\n  optim:\n    lr: 0.5\ntrainer:\n  max_steps: 7\n")
    assert load_config(None, "tiny", str(tmp_path / "c.yaml")).model.optim.lr == 0.5
    monkeypatch.setenv("RETRO_CONFIG__MODEL__OPTIM__LR", "0.25")
    assert load_config(None, "tiny", str(tmp_path / "c.yaml")).model.optim.lr == 0.25
    config = load_config(["model.optim.lr=1e-3", "++trainer.max_steps=9"], "tiny", str(tmp_path / "c.yaml"))
    assert (config.model.optim.lr, config.trainer.max_steps) == (1e-3, 9)
    assert load_config(["~model.optim.lr"], "tiny").model.optim.lr == 6e-4


@pytest.mark.parametrize(("override", "found"), [
    ("model.micro_batch_sizee=2", "did you mean model.micro_batch_size"),
    ("model.hiden_size=2", "did you mean model.hidden_size"),
    ("trainer.maxsteps=2", "did you mean trainer.max_steps"),
    ("lr=2", "did you mean model.optim.lr"),
    ("model.hidden_size=wide", "does not fit"),
    ("model.hidden_size", "is not an override"),
    ("model.hidden_size=1,2", "sweep"),
    ("~model.nothing", "no such setting"),
    ("model.encoder_seq_length=100", "whole chunks"),
    ("model.hidden_size=100", "multiple of num_attention_heads"),
    ("model.dec_cross_attention=[9]", "0-based"),
    ("model.dec_cross_attention=[]", "plain decoder"),
    ("model.normalization=rms", "did you mean rmsnorm"),
    ("model.global_batch_size=6", "multiple of model.micro_batch_size"),
    ("model.data.splits_string='1,2'", "three shares"),
    ("model.hidden_dropout=1.5", "at most"),
    ("trainer.val_check_interval=0", "at least 1"),
    ("trainer.log_every_n_steps=0", "at least 1"),
    ("model.num_query_groups=-1", "at least 1"),
    ("seed=-1", "at least 0"),
    ("model.optim.betas=[0.9]", "two numbers"),
    ("model.data.splits_string='inf,1,1'", "three shares"),
    ("model={chunk_sizee:3}", "did you mean model.chunk_size"),
    ("model.optim=3", "is a section"),
    ("model.optim.lr=inf", "at most"),
    ("seed=${x}", "do not resolve|does not fit"),
    ("model.encoder_position_embedding=learned model", "one of rope"),
    ("trainer.precision=fp8", "one of auto"),
    ("model.optim.sched.name=linear", "one of CosineAnnealing"),
    ("trainer.accelerator=tpu", "one of auto"),
    ("trainer.devices=auto", r"expected int \| None"),
    ("model.hidden_size=wide", "expected int"),
    ("seed=" + "9" * 5000, "is not an override"),
    ("seed=0x" + "f" * 5000, "does not fit"),
    ("prompt=" + "[" * 300 + "]" * 300, "is not an override|does not fit"),
    ("model.chunk_size=0", "at least 1"),
])  # fmt: skip
def test_wrong_settings_are_named(override: str, found: str) -> None:
    with pytest.raises(UsageError, match=found):
        load_config([override])


def test_files_that_are_no_settings(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="does not exist"):
        load_config(file=str(tmp_path / "no.yaml"))
    for content in ("a: [1", "- 1\n- 2\n"):
        (tmp_path / "c.yaml").write_text(content)
        with pytest.raises(UsageError, match="config file"):
            load_config(file=str(tmp_path / "c.yaml"))
    with pytest.raises(UsageError, match="did you mean tiny"):
        load_config(preset_name="tinny")


def test_every_preset_sets_fields_that_exist() -> None:
    known = flat_keys(Config())
    for name, values in PRESETS.items():
        assert set(values) <= set(known), name
        load_config(preset_name=name)
        preset_model(name)


def test_neighbors_of_this_projects_presets_can_be_kept() -> None:
    """Those of the imitated ones read the chunk, as they did."""
    encoders = {name: preset_model(name).enc_cross_attention for name in PRESETS}
    assert encoders == {"tiny": [], "small": [], "base": [], "mcore": [0], "nemo": [3]}
    assert preset_model("small", enc_cross_attention=[0]).encodes_alone is False
    assert preset_model("small").encodes_alone


def test_splits() -> None:
    assert splits("'98,2,0'") == (0.98, 0.02, 0.0)
    assert splits("1,1,2") == (0.25, 0.25, 0.5)


def test_defaults_are_nemos() -> None:
    """The table of the interface: NeMo RETRO's names and defaults."""
    m = Config().model
    assert (m.micro_batch_size, m.encoder_seq_length, m.chunk_size) == (4, 2048, 64)
    assert (m.enc_num_layers, m.dec_num_layers, m.enc_cross_attention, m.dec_cross_attention) == (4, 6, [3], [3, 4, 5])
    assert (m.hidden_size, m.ffn_hidden_size, m.num_attention_heads, m.init_method_std) == (768, 3072, 12, 0.02)
    assert (m.hidden_dropout, m.attention_dropout, m.ffn_dropout) == (0.1, 0.1, 0.0)
    check_model(m)


def test_nemos_training_command_parses_with_one_note_for_each_key_that_is_mapped_or_means_nothing() -> None:
    notes: list[str] = []
    config = load_config(NEMO_TRAINING, say=notes.append)
    assert config.model.data.store == "STORE"
    assert config.trainer.precision == "bf16-mixed"
    assert config.model.megatron_amp_O2
    assert config.exp_manager.wandb_logger_kwargs.project == "PROJECT"
    assert config.exp_manager.wandb_logger_kwargs.resume is False
    assert config.model.optim.sched.max_steps == 650000
    for named in ("cluster_type", "model.mcore_gpt", "model.retro.retro_project_dir", "trainer.precision=bf16"):
        assert sum(note.startswith(named) for note in notes) == 1, named
    assert len(notes) == 4


def test_the_settings_that_a_run_wrote_are_read_without_a_note(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(NEMO_TRAINING, say=lambda note: None)))
    notes: list[str] = []
    load_config(file=str(tmp_path / "config.yaml"), say=notes.append)
    assert notes == []


@pytest.mark.parametrize(("override", "found"), [
    ("tensor_model_parallel_size=2", "generation runs in one process"),
    ("megatron_amp_O2=true", "this version has only the default"),
    ("inference.retro_inference.ft_neighbours=-1", "must be at least 0"),
    ("model.pipeline_model_parallel_size=2", "middle of the stack"),
    ("model.tensor_model_parallel_size=5", "must divide num_attention_heads=12"),
    ("model.sequence_parallel=true", "needs tensor parallelism"),
    ("trainer.strategy=zero", "one of auto"),
    ("model.activations_checkpoint_granularity=all", "one of None"),
    ("model.mup=true", "relative to base widths"),
    ("inference.repetition_penalty=0", "must be at least 1e-06"),
    ("model.data.data_prefix=[a,b]", "several stores need weights"),
    ("model.shape_file=/nowhere.yaml", "does not exist"),
])  # fmt: skip
def test_settings_of_many_processes_that_cannot_be_used(override: str, found: str) -> None:
    with pytest.raises((UsageError, MissingInputError), match=found):
        load_config([override])


def asked(*overrides: str) -> tuple[Config, list[str]]:
    notes: list[str] = []
    return load_config(list(overrides), say=notes.append), notes


@pytest.mark.parametrize(("override", "key", "value"), [
    ("trainer.precision=16", "trainer.precision", "16-mixed"),
    ("trainer.precision=32", "trainer.precision", "32"),
    ("trainer.precision=32-true", "trainer.precision", "32"),
    ("trainer.precision=64-true", "trainer.precision", "64"),
    ("trainer.precision=bf16", "trainer.precision", "bf16-mixed"),
    ("trainer.precision=bf16-true", "trainer.precision", "bf16-mixed"),
    ("trainer.precision=bf16-true", "model.megatron_amp_O2", True),
    ("model.optim.name=fused_adam", "model.optim.name", "adamw"),
    ("model.optim.name=mcore_distributed_optim", "model.optim.name", "distributed_fused_adam"),
    ("model.optim.sched.name=WarmupAnnealing", "model.optim.sched.name", "WSD"),
    ("model.optim.sched.name=WarmupPolicy", "model.optim.sched.name", "constant"),
    ("trainer.devices='2'", "trainer.devices", 2),
    ("trainer.gradient_clip_val=0.5", "model.optim.clip", 0.5),
    ("trainer.gradient_clip_val=0", "model.optim.clip", None),
    ("trainer.gradient_clip_val=null", "model.optim.clip", None),
    ("model.optim.sched.warmup_ratio=0.03", "model.optim.sched.warmup_steps", 30),
    ("model.optim.sched.constant_ratio=0.2", "model.optim.sched.constant_steps", 200),
    ("trainer.limit_val_batches=0", "trainer.limit_val_batches", 0),
    ("trainer.limit_val_batches=0.5", "trainer.limit_val_batches", 0.5),
    ("trainer.val_check_interval=0.25", "trainer.val_check_interval", 0.25),
    ("trainer.devices=-1", "trainer.devices", -1),
    ("model.data.data_prefix=[store/a]", "model.data.store", "store/a"),
    ("model.data.data_prefix=[1.0,store/a]", "model.data.store", "store/a"),
    ("model.data.data_prefix=[0.3,a,0.7,b]", "model.data.blend", ["0.3", "a", "0.7", "b"]),
])  # fmt: skip
def test_nemos_spellings_of_values(override: str, key: str, value: object) -> None:
    config, notes = asked(override)
    assert flat_keys(config)[key] == value
    assert type(flat_keys(config)[key]) is type(value)
    again = to_yaml(config)
    assert "_ratio: 0" not in again
    assert len(notes) <= 2


def test_a_share_and_a_count_are_told_apart(tmp_path: Path) -> None:
    """1 is one step or batch, 1.0 a whole epoch or pass; also after a run wrote them down."""
    for value in (1, 1.0):
        config, _ = asked(f"trainer.val_check_interval={value}", f"trainer.limit_val_batches={value}")
        (tmp_path / "c.yaml").write_text(to_yaml(config))
        trainer = load_config(file=str(tmp_path / "c.yaml")).trainer
        assert type(trainer.val_check_interval) is type(trainer.limit_val_batches) is type(value)


@pytest.mark.parametrize(("overrides", "found"), [
    (["model.optim.lr=1e-5"], "model.optim.sched.min_lr=6e-05"),
    (["model.optim.lr=1e-5", "model.optim.sched.name=WSD"], "cannot come down"),
    (["model.optim.sched.name=constant", "model.optim.sched.constant_steps=5"], "keeps the rate anyway"),
    (["model.optim.sched.constant_steps=900"], "none is left to come down in"),
    (["model.optim.sched.warmup_ratio=0.1", "model.optim.sched.warmup_steps=5"], "warmup_steps=5 says otherwise"),
    (["model.optim.sched.warmup_ratio=1.5"], "from 0 to 1"),
    (["trainer.gradient_clip_val=0.5", "model.optim.clip=1"], "clip=1.0 says otherwise"),
    (["trainer.gradient_clip_val=-1"], "at least 0"),
    (["trainer.precision=16-true"], "16-mixed"),
    (["trainer.precision=64", "model.megatron_amp_O2=true"], "bf16 weights"),
    (["model.optim.name=adam"], "decoupled"),
    (["model.optim.name=muon", "trainer.strategy=fsdp"], "whole matrices, and trainer.strategy=fsdp cuts them"),
    (["model.optim.name=muon", "model.tensor_model_parallel_size=2"], "whole matrices, and model.tensor_model_parallel"),
    (["model.optim.name=muon", "model.mup=true", "model.mup_base_hidden_size=48", "model.init=standard"], "rates are AdamW's"),
    (["model.optim.momentum=0.9"], "AdamW has betas"),
    (["trainer.val_check_interval=1.5"], "a share"),
    (["trainer.val_check_interval=0.0"], "a share"),
    (["trainer.val_check_interval=inf"], "a share"),
    (["trainer.limit_val_batches=-1"], "at least 0"),
    (["trainer.devices=0"], "at least 1, or -1"),
    (["trainer.devices=-2"], "at least 1, or -1"),
    (["trainer.devices=auto"], "-1: one a GPU"),
    (["trainer.devices=[0,2]"], "CUDA_VISIBLE_DEVICES=0,2 trainer.devices=2"),
    (["trainer.devices='0,2'"], "CUDA_VISIBLE_DEVICES=0,2 trainer.devices=2"),
    (["trainer.devices=[1]"], "CUDA_VISIBLE_DEVICES=1 trainer.devices=1"),
    (["model.data.data_prefix=a,b"], """'model.data.data_prefix="a,b"'"""),
    (["model.optim.sched.name=WarmupAnnealing", "model.optim.sched.constant_steps=5"], "no constant steps"),
    (["model.data.data_prefix=[0.3,a,0.7,b]", "model.data.blend=[0.5,a,0.5,b]"], "so does model.data.blend"),
    (["model.data.data_prefix=[a]", "model.data.store=c"], "so does model.data.store=c"),
    (["model.data.data_prefix=[a]", "model.retro.retro_project_dir=b"], "so does model.data.store=a"),
])  # fmt: skip
def test_settings_that_contradict_or_would_be_ignored_are_refused(overrides: list[str], found: str) -> None:
    with pytest.raises(UsageError, match=found):
        asked(*overrides)


def test_shares_need_no_quotes_that_a_shell_would_take() -> None:
    for text in ("model.data.splits_string=80,5,15", "model.data.splits_string='80,5,15'"):
        assert asked(text)[0].model.data.splits_string == "80,5,15"


def test_a_rate_below_min_lr_can_be_constant() -> None:
    config, _ = asked("model.optim.lr=1e-5", "model.optim.sched.name=constant")
    assert config.model.optim.lr == 1e-5
    asked("model.optim.lr=1e-5", "model.optim.sched.min_lr=1e-6")
    asked("model.data.data_prefix=[store/a]", "model.data.store=./store/a")


def test_environment_names_with_capitals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETRO_CONFIG__MODEL__MEGATRON_AMP_O2", "true")
    assert asked()[0].model.megatron_amp_O2


def test_settings_that_need_no_conversion_give_what_others_do() -> None:
    assert load_config([("trainer.max_steps", 3), ("model.optim.lr", 0.5)]) == load_config(
        ["trainer.max_steps=3", "model.optim.lr=0.5"]
    )
    assert load_config([("trainer.max_steps", 3), ("model.optim.lr", 1)]).model.optim.lr == 1.0
    with pytest.raises(UsageError, match=r"trainer\.max_steps=1\.5 does not fit"):
        load_config([("trainer.max_steps", 1.5)])


def test_a_settings_file_whose_disk_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1\n")

    def fails(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "read", fails)
    with pytest.raises(OutOfResourceError, match=r"config\.yaml cannot be read"):
        read_yaml(tmp_path / "config.yaml")
