"""Whether a checkpoint is whole, asked beside other work; what is not read for generation is not asked for."""

from pathlib import Path

import pytest

from retro_engine.data import files
from retro_engine.data.checkpoint_files import opened, opening, verify
from retro_engine.errors import MissingInputError, StoreError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Files of a trained model; what is in them is not looked at."""
    names = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "optimizer/shard-0")
    (tmp_path / "optimizer").mkdir()
    for name in names:
        (tmp_path / name).write_text(name)
    (tmp_path / "trainer.json").write_text('{"step": 3}')
    hashes = {name: files.sha256_file(tmp_path / name) for name in (*names, "trainer.json")}
    (tmp_path / "COMPLETE").write_bytes(files.json_bytes(hashes))
    return tmp_path


def test_who_generates_does_not_read_the_optimizer(checkpoint: Path) -> None:
    assert opening(checkpoint).result() == checkpoint
    (checkpoint / "optimizer" / "shard-0").write_text("other")
    assert opened(checkpoint) == checkpoint
    with pytest.raises(StoreError, match="shard-0 is damaged"):
        verify(checkpoint)
    (checkpoint / "model.safetensors").write_text("other")
    with pytest.raises(StoreError, match="model.safetensors is damaged"):
        opening(checkpoint).result()


def test_what_is_not_there_is_said_where_it_is_waited_for(tmp_path: Path) -> None:
    waited = opening(tmp_path)
    with pytest.raises(MissingInputError, match="is not a trained run"):
        waited.result()
