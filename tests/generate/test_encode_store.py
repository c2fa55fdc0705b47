"""Encoded neighbors of a store in files: what is generated with them, how they are built, and what is refused."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import small_model, write_corpus

from retro_engine.data.prepare import prepare
from retro_engine.data.store import Store
from retro_engine.errors import MissingInputError, OutOfResourceError, StoreError, UsageError
from retro_engine.generate import encode_store as encode_store_module
from retro_engine.generate.encode_store import encode_store, encodings_folder, open_encodings
from retro_engine.generate.generator import Generator
from retro_engine.generate.open_model import open_model
from retro_engine.model.encoding_file import EncodingFile
from retro_engine.model.encodings import Encodings, encode_each
from retro_engine.progress import Reporter
from retro_engine.retrieval.executor import Executor
from retro_engine.retrieval.search import Retriever
from retro_engine.train import checkpoint

GREEDY = {"greedy": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def publish(folder: Path, store: Store, seed: int = 0, **overrides: object) -> Path:
    """A checkpoint whose model reads `store`."""
    values = {"enc_cross_attention": [], "chunk_size": 16, "encoder_seq_length": 64} | overrides
    model = small_model(seed, vocab_size=store.vocab_size, **values).float()
    checkpoint.publish_model(folder, model, store.tokenizer, {"imported": "here"}, GREEDY)
    return folder


@pytest.fixture(scope="module")
def run(small_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(tmp_path_factory.mktemp("encode") / "run", small_store)


@pytest.fixture(scope="module")
def made(small_store: Store, run: Path) -> EncodingFile:
    """Some shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode_store_module, "SHARD_BYTES", 1 << 19)
        return encode_store(open_model(run), small_store)


def opened(run: Path, stores: list[Store], *named: Path) -> list[EncodingFile]:
    model = open_model(run)
    return open_encodings(model.folder, model.model.config, model.tokenizer, stores, named)


def copy_of(made: EncodingFile, folder: Path) -> Path:
    shutil.copytree(made.folder, folder)
    for path in folder.iterdir():
        path.chmod(0o644)
    return folder


@pytest.mark.parametrize("overrides", [
    {}, {"num_query_groups": 1, "encoder_hidden_size": 36, "encoder_num_attention_heads": 3},
    {"reading": "prefix", "sink_id": 3},
], ids=str)  # fmt: skip
def test_what_is_generated_is_the_same_and_nothing_is_encoded(
    small_store: Store, tmp_path: Path, overrides: dict[str, object]
) -> None:
    run = publish(tmp_path / "run", small_store, **overrides)
    encode_store(open_model(run), small_store, tmp_path / "made")
    model = open_model(run)
    retriever = Retriever([small_store])
    plain = Generator(model.model, model.tokenizer, retriever)
    quick = Generator(model.model, model.tokenizer, retriever, 0, encoded=opened(run, [small_store], tmp_path / "made"))
    prompt = (
        "Document doc3. winter copper stone"  # no two logits are within rounding: what is encoded alone sums otherwise
    )
    assert quick.generate(prompt, 40).tokens == plain.generate(prompt, 40).tokens
    assert quick.encodings is not None and quick.encodings.stats.misses == 0 < quick.encodings.stats.hits
    assert quick.encodings.stats.nbytes == 0, "what is in a file is not kept twice"
    quick.generate(prompt, 2, neighbors=["what no store has said"])
    assert quick.encodings.stats.misses == 1, "what is in no file is encoded, and with 0 bytes nothing is kept"


def test_every_neighbor_is_found_by_its_tokens(small_store: Store, run: Path, made: EncodingFile) -> None:
    assert made.folder == encodings_folder(small_store, made.origin)
    assert len(made.manifest["files"]) > 3
    model = open_model(run).model
    tokens, lengths = Retriever([small_store]).loader.gather(np.arange(small_store.num_rows), model.config.r)
    encodings = Encodings(model, 0, [made])
    got = encodings.of(torch.from_numpy(tokens), torch.from_numpy(lengths))
    assert (encodings.stats.hits, encodings.stats.misses) == (small_store.num_rows, 0)
    exact = encode_each(model, torch.from_numpy(tokens), torch.from_numpy(lengths))
    for one, two in zip(got, exact):
        assert one.shape == two.shape and one.dtype == two.dtype
        assert torch.allclose(one, two, rtol=2**-7, atol=1e-5)
    model.bfloat16()  # other weights: nobody has encoded for them
    encodings.of(torch.from_numpy(tokens[:1]), torch.from_numpy(lengths[:1]))
    assert encodings.stats.misses == 1


def test_int8_weights_read_the_files_of_their_checkpoint(small_store: Store, run: Path, made: EncodingFile) -> None:
    model = open_model(run, "int8")
    (found,) = open_encodings(model.folder, model.model.config, model.tokenizer, [small_store])
    assert found.folder == made.folder
    generator = Generator(model.model, model.tokenizer, Retriever([small_store]), encoded=[found])
    generator.generate("river stone amber lantern orchard harbor winter", 20)
    assert generator.encodings is not None and generator.encodings.stats.misses == 0


def test_a_build_says_its_cost_and_goes_on_where_it_was(
    small_store: Store, run: Path, made: EncodingFile, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(encode_store_module, "SHARD_BYTES", 1 << 19)
    folder = copy_of(made, tmp_path / "part")
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("values-*.bin")}
    (folder / "manifest.json").unlink()  # killed before its end, in its second shard
    (folder / "values-00001.bin").unlink()
    (folder / ".values-00001.bin.99.tmp").write_bytes(b"half")
    os.truncate(folder / "values-00002.bin", 1000)
    with pytest.raises(MissingInputError, match="never finished"):
        opened(run, [small_store], folder)
    encode_store(open_model(run), small_store, folder, Executor("inline"), Reporter("text"))
    said = capsys.readouterr().err
    assert "encoding" in said and "bytes, about" in said and "values-00002.bin is damaged: it is built again" in said
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("values-*.bin")}
    assert {name for name in after if after[name] != before[name]} == {"values-00001.bin", "values-00002.bin"}
    assert {p.name: p.read_bytes() for p in folder.glob("*.bin")} == {
        p.name: p.read_bytes() for p in made.folder.glob("*.bin")
    }
    assert not list(folder.glob(".*.tmp"))
    EncodingFile(folder).verify()


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    small_store: Store, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_store_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OutOfResourceError, match="the encodings take .* bytes, 0 are there, 1,000 are free"):
        encode_store(open_model(run), small_store, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_of_something_else_are_refused(small_store: Store, run: Path, made: EncodingFile, tmp_path: Path) -> None:
    others = {
        "weights": publish(tmp_path / "weights", small_store, seed=1),
        "r": publish(tmp_path / "r", small_store, retrieved_length=24),
    }
    for what, other in others.items():
        with pytest.raises(
            StoreError, match=rf"has encodings of {what} .*\n.*what is read has {what}.*\n.*retro encode"
        ):
            opened(other, [small_store], made.folder)
        assert opened(other, [small_store]) == [], "those beside the store are another model's"
    second = prepare(
        [write_corpus(tmp_path / "c.jsonl", 6, seed=3)],
        tmp_path / "store",
        tokenizer=str(small_store.folder),
        chunk_size=16,
    )
    with pytest.raises(StoreError, match="has encodings of store"):
        opened(run, [second], made.folder)
    third = prepare([write_corpus(tmp_path / "d.jsonl", 6, seed=3)], tmp_path / "third", vocab_size=280, chunk_size=16)
    with pytest.raises(StoreError, match="has encodings of tokenizer"):
        opened(publish(tmp_path / "other", third), [third], made.folder)
    with pytest.raises(StoreError, match="tokenizer"):
        encode_store(open_model(run), third, tmp_path / "no")
    with pytest.raises(UsageError, match="no store is read"):
        opened(run, [], made.folder)
    with pytest.raises(UsageError, match="holds something else"):
        encode_store(open_model(run), small_store, small_store.folder)
    with pytest.raises(UsageError, match="holds something else"):
        encode_store(open_model(others["weights"]), small_store, made.folder)


def test_a_model_that_reads_the_query_is_refused(small_store: Store, made: EncodingFile, tmp_path: Path) -> None:
    run = publish(tmp_path / "run", small_store, enc_cross_attention=[0])
    with pytest.raises(UsageError, match=r"enc_cross_attention=\[0\].*\n.*train with model.enc_cross_attention=\[\]"):
        encode_store(open_model(run), small_store, tmp_path / "out")
    with pytest.raises(UsageError, match=r"enc_cross_attention=\[0\]"):
        opened(run, [small_store], made.folder)
    assert opened(run, [small_store]) == []
    plain = publish(tmp_path / "plain", small_store, retrieval=False)
    with pytest.raises(UsageError, match="plain decoder"):
        encode_store(open_model(plain), small_store, tmp_path / "out")


@pytest.mark.parametrize("name", ["values-00000.bin", "index.bin", "manifest.json"])
def test_truncated_files_are_refused(
    small_store: Store, run: Path, made: EncodingFile, tmp_path: Path, name: str
) -> None:
    folder = copy_of(made, tmp_path / "copy")
    size = (folder / name).stat().st_size
    for length in (0, 100, size - 1):
        os.truncate(folder / name, length)
        with pytest.raises(StoreError, match="retro encode"):
            opened(run, [small_store], folder)


def test_damage_is_found_when_it_is_read(small_store: Store, run: Path, made: EncodingFile, tmp_path: Path) -> None:
    folder = copy_of(made, tmp_path / "copy")
    path = folder / "values-00000.bin"
    raw = bytearray(path.read_bytes())
    raw[200] ^= 1
    path.write_bytes(raw)
    (found,) = [file for file in opened(run, [small_store], folder) if file.folder == folder]
    tokens, lengths = Retriever([small_store]).loader.gather(np.arange(1), found.origin.r)
    with pytest.raises(StoreError, match=r"values-00000.bin is damaged in block 0\n.*\n.*retro encode"):
        found.find(tokens[0, : lengths[0]].tobytes())
    with pytest.raises(StoreError, match="values-00000.bin is damaged"):
        found.verify()
    index = folder / "index.bin"
    raw = bytearray(index.read_bytes())
    raw[140] ^= 1
    index.write_bytes(raw)
    with pytest.raises(StoreError, match=r"index.bin is damaged in block 0\n.*\n.*retro encode"):
        opened(run, [small_store], folder)
