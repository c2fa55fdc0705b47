"""Hints: the name that another implementation has, a name that is near, or none; types in words."""

import pytest

from retro_engine.config import Config, flat_keys, load_config
from retro_engine.config.hints import nearest_key
from retro_engine.errors import UsageError


@pytest.mark.parametrize(("key", "hint"), [
    ("model.version", "no setting has a similar name"),
    ("trainer.save_top_k", "no setting has a similar name"),
    ("trainer.model", "no setting has a similar name"),
    ("trainer_max_steps", "did you mean trainer.max_steps (int, default 1000)?"),
    ("model.retro.num_neighbours", "did you mean model.num_neighbors (int, default 2)?"),
    ("model.seq_len", "did you mean model.encoder_seq_length (int, default 2048)?"),
    ("--seq-length", "it is model.encoder_seq_length (int, default 2048) here"),
    ("model.retro_chunk_length", "it is model.chunk_size (int, default 64) here"),
    ("max_seq_len", "it is model.encoder_seq_length (int, default 2048) here"),
    ("model.sched.min_lr", "did you mean model.optim.sched.min_lr (float, default 6e-05)?"),
])  # fmt: skip
def test_a_hint_is_near_or_none(key: str, hint: str) -> None:
    assert nearest_key(key, flat_keys(Config())) == hint


@pytest.mark.parametrize(("override", "lines"), [
    ("trainer.max_steps=abc", ["trainer.max_steps='abc' does not fit", "  expected int: a whole number",
                               "  retro config keys trainer.max_steps"]),
    ("model.dec_cross_attention=3", ["model.dec_cross_attention=3 does not fit", "  expected list[int]: a list of whole numbers",
                                     "  retro config keys model.dec_cross_attention"]),
    ("model.num_query_groups=None", ["model.num_query_groups='None' does not fit", "  expected int | None: a whole number or null",
                                     "  model.num_query_groups=null (YAML's word for None)"]),
])  # fmt: skip
def test_another_type_is_said_in_our_words(override: str, lines: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        load_config([override])
    assert str(caught.value).splitlines() == lines


@pytest.mark.parametrize("override", ["model.add_position_embedding=true", "model.position_embedding=learned",
                                      "model.rotary_percentage=0.1", "model.encoder_num_attention_heads=1"])  # fmt: skip
def test_what_breaks_a_preset_is_the_setting_that_was_typed(override: str) -> None:
    key = override.split("=")[0]
    with pytest.raises(UsageError, match=rf"^{key}=.* cannot be used\n  model.init=retrieval_ready"):
        load_config([override], "tiny")
