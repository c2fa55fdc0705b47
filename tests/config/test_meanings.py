"""Every setting says what it means, and every number its unit."""

from retro_engine.config import Config, flat_keys
from retro_engine.config.meanings import settings


def test_every_setting_has_a_meaning_and_every_number_a_unit() -> None:
    found = {setting.key: setting for setting in settings()}
    assert {key: setting.default for key, setting in found.items()} == flat_keys(Config())
    assert not [key for key, setting in found.items() if len(setting.meaning) < 3]
    numbers = [key for key, setting in found.items() if setting.type.split(" |")[0] in ("int", "float")]
    assert len(numbers) > 60
    assert not [key for key in numbers if not found[key].unit]
    assert not [key for key, setting in found.items() if setting.unit and key not in numbers]


def test_they_are_read_as_they_are_written() -> None:
    """Behind the field and above it, on one line and on two; of a section that inherits its fields."""
    found = {setting.key: str(setting) for setting in settings()}
    assert found["model.chunk_size"] == (
        "model.chunk_size (int, default 64, tokens): m: of a chunk, which must be the store's"
    )
    assert found["model.activation"].startswith("model.activation (swiglu | gelu | gelu_tanh, default swiglu): of the")
    assert "prefix: their keys and values before the decoder's own" in found["model.reading"]
    assert not [text for text in found.values() if "\n" in text]
    assert found["trainer.max_time_s"].endswith(
        "seconds): stop, with a checkpoint, after so much training; None = never"
    )
