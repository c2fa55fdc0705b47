"""What a run reads: copies of what is held out are named, and evaluation takes no other tokenizer's store."""

from pathlib import Path

import numpy as np
import pytest
from helpers import write_corpus
from training_helpers import settings

from retro_engine.config import load_config, to_yaml
from retro_engine.data.batches import Sequences
from retro_engine.data.blend import Blend
from retro_engine.data.prepare import prepare
from retro_engine.data.store import Store
from retro_engine.errors import StoreError, UsageError
from retro_engine.model.weights import read_config
from retro_engine.retrieval.neighbors import build_neighbors
from retro_engine.train import checkpoint
from retro_engine.train.places import with_absolute_paths
from retro_engine.train.run_data import (
    open_data,
    open_evaluation,
    order_of,
    steps_of_data,
    stream_settings,
    validation_mark,
)


def test_evaluation_on_a_store_of_another_tokenizer_is_refused(small_store: Store, whole: Path, tmp_path: Path) -> None:
    """`retro eval RUN model.data.store=OTHER`: its ids are not the model's, whatever their range."""
    source = write_corpus(tmp_path / "c.jsonl", 12, seed=3)
    other = prepare([source], tmp_path / "s", vocab_size=300, chunk_size=16)
    build_neighbors(other, [other], "hash", 4)
    folder = checkpoint.find_checkpoint(whole)
    given = [f"model.data.store={other.folder}", "model.data.neighbors=hash"]
    with pytest.raises(StoreError, match=f"{folder} has tokenizer .*\n.*{other.folder} has .*\n.*retro prepare"):
        open_evaluation(folder, read_config(folder), given, "valid")
    found = open_evaluation(folder, read_config(folder), [], "valid")
    assert found.store.fingerprint == small_store.fingerprint


def test_copies_of_held_out_documents_are_named(small_store: Store, tmp_path: Path) -> None:
    """In one store, and where a validation store repeats what is trained on."""
    source = write_corpus(tmp_path / "c.jsonl", 12, seed=5)
    tokenizer = str(small_store.folder)
    one = prepare([source], tmp_path / "one", tokenizer, chunk_size=16)
    source.write_text(source.read_text() * 2)
    twice = prepare([source], tmp_path / "twice", tokenizer, chunk_size=16)
    plain = ["model.retrieval=false", "model.data.splits_string='50,50,0'"]
    for store, more, count in (
        (one, [], 0),
        (twice, [], 1),
        (one, [f"model.data.valid_store={twice.folder}"], 24),
        (one, [f"model.data.valid_store={small_store.folder}"], 0),
    ):
        data = open_data(load_config([*settings(store, tmp_path / "run", *plain), *more]))
        assert (data.warning is not None) == (count > 0)
        assert count == 0 or (data.warning or "").startswith("WARNING: ")
        assert count < 2 or f"{count} of 24 held-out documents" in (data.warning or "")


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_the_number_of_steps_is_what_every_process_can_make(
    small_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    once = ["model.data.dataloader_type=single", "model.micro_batch_size=1", "trainer.accumulate_grad_batches=2"]
    config = load_config(settings(small_store, tmp_path / "run", *once))
    data = open_data(config)
    steps = steps_of_data(config, data)
    assert steps is not None
    for rank in range(world):
        last = (steps - 1) * 2 * world + rank + world
        data.train.training_batch(last, 1, order_of(config))
    with pytest.raises(StopIteration):
        data.train.training_batch((steps + 1) * 2 * world - 1, 1, order_of(config))


def test_a_blend_is_its_stores_with_their_neighbors(small_store: Store, tmp_path: Path) -> None:
    """As NeMo writes it; batches are the same in a run that goes on; what does not fit is refused."""
    source, tokenizer = write_corpus(tmp_path / "c.jsonl", 12, seed=9), str(small_store.folder)
    other = prepare([source], tmp_path / "other", tokenizer, chunk_size=16)
    build_neighbors(other, [other], "bm25", 4)
    plain = [text for text in settings(small_store, tmp_path / "run") if not text.startswith("model.data.store=")]
    blend = f"model.data.data_prefix=[.75,'{small_store.folder}',.25,'{other.folder}']"
    config = load_config([*plain, blend])
    data = open_data(config)
    assert config.model.data.store == str(small_store.folder)
    assert data.fingerprints["store 2"] == other.fingerprint and "neighbors 2" in data.fingerprints
    assert stream_settings(config)["blend"] == [0.75, 0.25]
    assert data.valid is not None and data.valid.store.fingerprint == small_store.fingerprint
    batch = data.train.training_batch(5, 8, order_of(config))
    from_other = (batch.document_ids[:, 0] >= small_store.num_documents).sum()
    assert from_other == 2 and batch.lengths is not None and (batch.lengths > 0).any()
    again = open_data(load_config([*plain, blend])).train.training_batch(5, 8, order_of(config))
    assert (again.tokens == batch.tokens).all()

    foreign = prepare([source], tmp_path / "foreign", vocab_size=300, chunk_size=16)
    longer = prepare([source], tmp_path / "longer", tokenizer, chunk_size=32)
    for store, more, kind, message in (
        (foreign, [], StoreError, "has tokenizer"),
        (longer, [], UsageError, "model.chunk_size=16 does not match"),
        (other, ["model.data.dataloader_type=single"], UsageError, "a blend has no end"),
        (other, [f"model.data.store='{other.folder}'"], UsageError, "the stores are those of"),
        (other, ["model.data.questions=q.jsonl"], UsageError, "questions have one store"),
    ):
        given = f"model.data.blend=[.5,'{small_store.folder}',.5,'{store.folder}']"
        with pytest.raises(kind, match=message):
            open_data(load_config([*plain, given, *more]))


def blended(first: Store, folder: Path, other: Store) -> list[str]:
    named = ("model.data.store=", "model.data.neighbors=")
    plain = [text for text in settings(first, folder) if not text.startswith(named)]
    return [*plain, f"model.data.blend=[.5,'{first.folder}',.5,'{other.folder}']"]


def test_what_one_store_of_a_blend_holds_out_is_nobody_s_neighbor(small_store: Store, tmp_path: Path) -> None:
    """The other's table is over both: the first's validation documents are among its neighbors, and are passed over."""
    source, tokenizer = write_corpus(tmp_path / "c.jsonl", 12, seed=9), str(small_store.folder)
    other = prepare([source], tmp_path / "other", tokenizer, chunk_size=16)
    build_neighbors(other, [small_store, other], "bm25", 20)
    data = open_data(load_config([*blended(small_store, tmp_path / "run", other), "model.data.neighbors=bm25"]))
    assert isinstance(data.train, Blend) and isinstance(data.valid, Sequences)
    held_out = np.isin(small_store.row_documents(), data.valid.documents)
    stream = data.train.streams[1]
    assert stream.table is not None
    found = stream.table.ids(np.arange(other.num_rows), 20)
    in_first = (found >= 0) & (found < small_store.num_rows)
    assert held_out[found[in_first]].any(), "the table has them"
    read = stream.neighbor_ids(stream.in_order())
    there = read[(read >= 0) & (read < small_store.num_rows)]
    assert len(there) and not held_out[there].any()


def test_a_blend_of_tables_with_other_names_is_opened_again(small_store: Store, tmp_path: Path) -> None:
    """From the settings that the run wrote; a name that all have is kept, as where there are more tables later."""
    source, tokenizer = write_corpus(tmp_path / "c.jsonl", 12, seed=9), str(small_store.folder)
    first, other, alike = (
        prepare([source], tmp_path / n, tokenizer, chunk_size=16) for n in ("first", "other", "alike")
    )
    for store, table in ((first, "bm25"), (other, "mine"), (alike, "bm25")):
        build_neighbors(store, [store], "bm25", 4, name=table)
    for store, name in ((other, None), (alike, "bm25")):
        config = load_config(blended(first, tmp_path / "run", store))
        prints = open_data(config).fingerprints
        assert config.model.data.neighbors == name
        (tmp_path / "config.yaml").write_text(to_yaml(with_absolute_paths(config)))
        assert open_data(load_config([], file=str(tmp_path / "config.yaml"))).fingerprints == prints


def test_the_mark_of_a_validation_is_of_its_data_table_and_batches(small_store: Store, tmp_path: Path) -> None:
    """What changes the loss of one model changes it; where the data lie and how batches are cut does not."""
    source, tokenizer = write_corpus(tmp_path / "c.jsonl", 12, seed=9), str(small_store.folder)
    other = prepare([source], tmp_path / "other", tokenizer, chunk_size=16)
    for retriever in ("bm25", "hash"):
        build_neighbors(other, [other], retriever, 4)

    def mark(limit: int | None, *more: str) -> str | None:
        config = load_config([*settings(small_store, tmp_path / "run"), *more])
        return validation_mark(config, open_data(config), limit)

    apart = [f"model.data.valid_store='{other.folder}'", "model.data.valid_neighbors=bm25"]
    marks = [
        mark(None),
        mark(1),
        mark(None, "model.retrieval=false"),
        mark(None, *apart),
        mark(None, *apart[:1], "model.data.valid_neighbors=hash"),
    ]
    assert None not in marks and len(set(marks)) == len(marks)
    assert mark(None) == mark(1000) == mark(None, "model.micro_batch_size=1", "trainer.max_steps=99") == marks[0]
    assert mark(0) is None
