"""Settings files in NeMo's layout: what is another setting here, what means nothing, and what is refused, all at once."""

from pathlib import Path

import pytest
import yaml

from retro_engine.config import Config, flat_keys, load_config
from retro_engine.config.nemo_keys import FEW, MEANINGLESS, ONLY, RENAMED
from retro_engine.errors import UsageError

LAYOUT = Path(__file__).with_name("nemo_layout.yaml")


def asked(*overrides: str, preset: str | None = None, file: Path | None = None) -> tuple[Config, list[str]]:
    notes: list[str] = []
    return load_config(list(overrides), preset, file and str(file), say=notes.append), notes


def written(path: Path, content: object) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_a_file_in_nemos_layout_is_read_whole() -> None:
    """Every key of it is a setting, or is named in a note; what has another name has its value."""
    config, notes = asked(preset="nemo", file=LAYOUT)
    m = config.model
    assert (m.encoder_seq_length, m.max_position_embeddings, m.chunk_size, m.retrieved_length) == (128, 128, 32, 64)
    assert (m.num_neighbors, m.dec_num_layers, m.enc_num_layers, m.data.store) == (3, 4, 1, "store")
    assert (m.optim.clip, m.normalization, config.trainer.precision) == (0.5, "layernorm", "bf16-mixed")
    manager = config.exp_manager
    assert (manager.exp_dir, manager.checkpoint_every_n_steps) == ("runs/nemo", 50)
    assert manager.wandb_logger_kwargs.name == "retro_run"
    named = flat_keys(yaml.safe_load(LAYOUT.read_text()))
    said = "\n".join(notes)
    same = {"exp_manager.exp_dir", "model.data.seq_length"}  # a null; the reference to what it is here
    assert not [key for key in named if key not in flat_keys(config) and key not in said and key not in same]
    assert sum(note.split("\n")[0].endswith("settings change nothing here:") for note in notes) == 1


def test_the_command_line_wins_over_the_file_under_either_name() -> None:
    config, _ = asked("model.num_neighbors=5", "exp_manager.exp_dir=mine", "model.chunk_size=16", file=LAYOUT)
    assert (config.model.num_neighbors, config.exp_manager.exp_dir, config.model.retrieved_length) == (5, "mine", 32)
    config, _ = asked("model.data.seq_length=256", "model.retro.retro_num_neighbors=4", preset="tiny", file=LAYOUT)
    assert (config.model.encoder_seq_length, config.model.num_neighbors) == (256, 4)


def test_all_that_cannot_be_used_is_named_at_once(tmp_path: Path) -> None:
    content = {"model": {"foo": 3, "hiden_size": 5, "headscale": True, "data": {"split": 4}, "optim": 3},
               "trainer": {"max_epochs": 5, "save_top_k": 3}}  # fmt: skip
    with pytest.raises(UsageError) as caught:
        asked(file=written(tmp_path / "c.yaml", content))
    assert str(caught.value).splitlines() == [
        "7 settings cannot be used",
        "  model.headscale=True cannot be used: heads have no scale of their own; model.headscale=false",
        "  trainer.max_epochs=5 cannot be used: trainer.max_steps ends a run; trainer.max_epochs=-1",
        "  model.foo is not a setting: no setting has a similar name; all keys: retro config keys model",
        "  model.hiden_size is not a setting: did you mean model.hidden_size (int, default 768)?; all keys: retro config keys model",
        "  model.data.split is not a setting: it is model.data.splits_string (str, default 98,2,0) here; all keys: retro config keys model.data",
        "  model.optim takes no value: model.optim is a section; retro config keys model.optim",
        "  trainer.save_top_k is not a setting: no setting has a similar name; all keys: retro config keys trainer",
        "  all keys: retro config keys",
    ]  # fmt: skip
    with pytest.raises(UsageError, match=r"^300 settings cannot be used\n(.*\n){100}  and 200 more\n"):
        asked(file=written(tmp_path / "d.yaml", {f"key{n}": n for n in range(300)}))


def test_tables_name_settings_that_are_there_and_none_that_is_a_setting() -> None:
    known = flat_keys(Config())
    assert set(RENAMED.values()) <= set(known)
    sections = {"exp_manager.wandb_logger_kwargs"}
    assert not {*RENAMED, *ONLY, *MEANINGLESS} & set(known)
    assert all(not any(name.startswith(f"{key}.") for name in known) for key in {*ONLY, *MEANINGLESS} - sections)


@pytest.mark.parametrize("key", [key for key, (taken, *_) in ONLY.items() if taken])
def test_what_would_change_the_result_is_taken_at_its_value_alone(key: str) -> None:
    value = {True: "true", False: "false", None: "null"}.get(ONLY[key][0][0], ONLY[key][0][0])
    notes = asked(f"{key}={value}")[1]
    assert notes == [f"{key} means nothing here: its value is what is done anyway"]
    with pytest.raises(UsageError, match=rf"{key}=7 cannot be used"):
        asked(f"{key}=7")


@pytest.mark.parametrize(("overrides", "found"), [
    (["model.retro.retro_num_neighbors=3", "model.num_neighbors=2"], "model.num_neighbors=2 says otherwise"),
    (["model.retro.retro_num_neighbors=3", "model.data.neighbors=2"], "says otherwise"),
    (["model.retro.retro_num_retrieved_chunks=2", "model.init_from=run"], "how long a chunk is, is not said"),
    (["model.retro.retro_num_retrieved_chunks=two"], "model.retrieved_length='two' does not fit"),
    (["model.position_embedding_type=alibi"], "model.position_embedding=alibi cannot be used"),
    (["model.position_embedding_type=[1]"], "does not fit"),
    (["model.data.seq_length=${model.data.seq_length}"], "in a circle"),
    (["model.data.data_prefix.train=[a]"], r"model.data.data_prefix=\[STORE\]"),
    (["model.data.knn_index=x"], "model.data.neighbors=NAME"),
    (["model.data.retrieval_prefix=x"], "model.data.neighbors=NAME"),
    (["exp_manager.resume_ignore_no_checkpoint=false"], "begins at step 0"),
])  # fmt: skip
def test_names_that_contradict_and_values_that_cannot_be_mapped_are_refused(overrides: list[str], found: str) -> None:
    with pytest.raises(UsageError, match=found):
        asked(*overrides)


@pytest.mark.parametrize(("override", "key", "value"), [
    ("model.data.seq_length=256", "model.encoder_seq_length", 256),
    ("model.data.neighbors=3", "model.num_neighbors", 3),
    ("model.data.neighbors='3'", "model.data.neighbors", "3"),
    ("model.retro.retro_num_retrieved_chunks=3", "model.retrieved_length", 192),
    ("model.position_embedding_type=learned_absolute", "model.position_embedding", "learned"),
    ("exp_manager.explicit_log_dir=a/b", "exp_manager.exp_dir", "a/b"),
    ("exp_manager.explicit_log_dir=None", "exp_manager.exp_dir", None),
    ("model.data.data_prefix=None", "model.data.store", None),
    ("model.data.data_prefix=store/a", "model.data.store", "store/a"),
])  # fmt: skip
def test_other_names_and_values_are_mapped_with_one_note(override: str, key: str, value: object) -> None:
    config, notes = asked(override)
    assert flat_keys(config)[key] == value
    is_said = value is not None and not override.startswith(f"{key}=")
    assert len(notes) == is_said


def test_a_few_keys_have_a_note_each() -> None:
    keys = list(MEANINGLESS)[: FEW + 1]
    assert len(asked(*(f"{key}=1" for key in keys[:FEW]))[1]) == FEW
    assert len(asked(*(f"{key}=1" for key in keys))[1]) == 1
