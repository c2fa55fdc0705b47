"""Fixtures: a tiny base, a run whose adapters learned beside it, and the reader that was made of the run."""

from pathlib import Path

import gguf_helpers
import pytest
from helpers import write_corpus

import retro_engine
from retro_engine.config import load_config
from retro_engine.data.prepare import prepare
from retro_engine.interop.imports import import_model, write_checkpoint
from retro_engine.progress import Reporter
from retro_engine.readers.make_reader import make_reader
from retro_engine.train.loop import train

RUN = [
    "model.chunk_size=16", "model.encoder_seq_length=64", "model.micro_batch_size=2", "model.num_neighbors=3",
    "model.data.splits_string='80,20,0'", "model.optim.lr=1e-2", "model.lora.rank=2", "trainer.max_steps=3",
    "model.optim.sched.warmup_steps=1", "trainer.precision=32", "model.data.neighbors=bm25", "model.reading=prefix",
    "model.retrieved_length=24", "model.sink_id=0", "trainer.limit_val_batches=0",
]  # fmt: skip


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF file of a random llama."""
    pytest.importorskip("gguf", reason="gguf is not installed")
    return gguf_helpers.write(tmp_path_factory.mktemp("base") / "tiny.gguf", blocks="Q8_0")


@pytest.fixture(scope="session")
def reader_run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose adapters learned for three steps to read in front."""
    from retro_engine.retrieval.neighbors import build_neighbors

    folder = tmp_path_factory.mktemp("run")
    write_checkpoint(import_model(base), folder / "imported", base)
    corpus = write_corpus(folder / "corpus.jsonl", 20)
    store = prepare([corpus], folder / "store", tokenizer=folder / "imported", chunk_size=16)
    build_neighbors(store, [store], "bm25", num_neighbors=3)
    settings = [f"model.data.store='{store.folder}'", f"model.init_from='{folder / 'imported'}'"]
    train(load_config([*RUN, *settings, f"exp_manager.exp_dir='{folder / 'run'}'"]), Reporter("quiet"))
    return folder / "run"


@pytest.fixture(scope="session")
def reader_folder(reader_run: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reader(reader_run, tmp_path_factory.mktemp("readers") / "tiny-reads", base, max_new_tokens=6)


def ask_alone(folder: Path, reader: Path, base: Path) -> None:
    """In a process of its own, which must be able to import it."""
    print(retro_engine.ask(folder, "Who built the castle?", reader, base, k=1).sources[0].document)
