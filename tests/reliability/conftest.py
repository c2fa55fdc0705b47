"""One process that runs workloads, and what they read."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import small_model
from reliability.runs import Runs
from reliability.workloads import Place
from serve_helpers import small_run as small_run

from retro_engine.config import ModelConfig
from retro_engine.data.store import Store
from retro_engine.interop.imports import Imported, write_checkpoint
from retro_engine.model.retro import RetroModel
from retro_engine.train import checkpoint

GREEDY = {"greedy": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    found = Runs(tmp_path_factory.mktemp("calls"))
    yield found
    found.close()


@pytest.fixture(scope="session")
def models(small_store: Store, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model that encodes neighbors alone, and a plain decoder."""
    folder = tmp_path_factory.mktemp("models")
    values = {"enc_cross_attention": [], "chunk_size": 16, "encoder_seq_length": 64}
    model = small_model(0, vocab_size=small_store.vocab_size, **values).float()
    checkpoint.publish_model(folder / "encoder", model, small_store.tokenizer, {"imported": "here"}, GREEDY)
    torch.manual_seed(0)
    plain = ModelConfig(
        vocab_size=small_store.vocab_size, retrieval=False, hidden_dropout=0, attention_dropout=0, hidden_size=32,
        ffn_hidden_size=48, num_attention_heads=2, dec_num_layers=2,
    )  # fmt: skip
    write_checkpoint(Imported(RetroModel(plain), small_store.tokenizer, "hf"), folder / "decoder", "x")
    return folder / "encoder", folder / "decoder"


@pytest.fixture
def place(small_store: Store, models: tuple[Path, Path], tmp_path: Path) -> Place:
    return Place(tmp_path / "root", small_store.folder, *models)
