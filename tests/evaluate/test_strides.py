"""Neighbors found every s tokens: at the chunk's length nothing changes, and at a shorter one each block reads its own."""

import numpy as np
import pytest
import torch
from helpers import small_config, small_model

from retro_engine.data.batches import Sequences
from retro_engine.data.neighbor_table import NeighborTable, find_table
from retro_engine.data.store import Store
from retro_engine.errors import UsageError
from retro_engine.evaluate.perplexity import evaluate
from retro_engine.evaluate.strides import Stride, reading_every
from retro_engine.model.retro import RetroModel
from retro_engine.retrieval.neighbors import Filters, build_neighbors

ALONE = {"enc_cross_attention": []}
PREFIX = {"reading": "prefix", "dec_cross_attention": None, "enc_cross_attention": []}


def opened(store: Store, own: dict[str, object]) -> tuple[RetroModel, Sequences]:
    config = small_config(vocab_size=store.vocab_size, chunk_size=16, encoder_seq_length=64, **own)
    table = NeighborTable(find_table(store, "bm25"), store)
    database = np.arange(0, store.num_documents, 2)  # the others are held out
    model = RetroModel(config, torch.Generator().manual_seed(0)).eval()
    return model, Sequences(store, np.arange(1, 40, 2), 64, table, 2, None, database)


@pytest.mark.parametrize("own", [{}, ALONE, PREFIX], ids=["reads the chunk", "alone", "prefix"])
def test_a_stride_of_a_chunk_is_what_it_was_to_the_bit(small_store: Store, own: dict[str, object]) -> None:
    model, sequences = opened(small_store, own)
    token_bytes = small_store.tokenizer.token_bytes()
    before = evaluate(model, sequences, token_bytes, ["on", "off"])
    after = evaluate(model, sequences, token_bytes, ["on", "off"], stride=Stride(sequences, 16, model))
    for mode in before:
        assert np.array_equal(before[mode].nats, after[mode].nats), mode
    assert model.stride is None


@pytest.mark.parametrize("own", [ALONE, PREFIX], ids=["alone", "prefix"])
def test_shorter_strides_change_what_is_read_and_nothing_without(small_store: Store, own: dict[str, object]) -> None:
    model, sequences = opened(small_store, own)
    token_bytes = small_store.tokenizer.token_bytes()
    found = {s: evaluate(model, sequences, token_bytes, ["on", "off"], stride=Stride(sequences, s, model)) for s in (16, 8, 4)}  # fmt: skip
    assert len({each["on"].nats.sum() for each in found.values()}) == 3
    assert len({each["off"].nats.sum() for each in found.values()}) == 1


def test_at_the_ends_of_chunks_the_search_finds_what_the_table_has(small_store: Store) -> None:
    model, sequences = opened(small_store, ALONE)
    stride = Stride(sequences, 4, model)
    count = 0
    for rows in sequences.batch_rows(4):
        batch = sequences.batch(rows)
        found = stride.find(batch, np.arange(15, 64, 16))
        is_whole = batch.document_ids.reshape(*rows.shape, 16)[..., -1] >= 0
        np.testing.assert_array_equal(found[is_whole], sequences.neighbor_ids(rows)[is_whole])
        count += int((found >= 0).sum())
    assert count > 100


def test_queries_are_of_the_own_document_and_neighbors_of_another(small_store: Store) -> None:
    """Between chunks too nothing that is held out is found, nor the document itself; what is searched with ends where the block does."""
    model, sequences = opened(small_store, ALONE)
    stride = Stride(sequences, 4, model)
    asked: list[str] = []
    search = stride.retriever.search  # type: ignore[union-attr]
    stride.retriever.search = lambda texts, k, exclude: (asked.extend(texts), search(texts, k, exclude=exclude))[1]  # type: ignore
    batch = sequences.batch(sequences.in_order()[:2])
    ends = np.array([3, 7, 19])
    found = stride.find(batch, ends)
    expected = []
    for b in range(2):
        for end in ends[batch.document_ids[b, ends] >= 0]:
            own = [
                t for t in range(max(0, end - 15), end + 1) if batch.document_ids[b, t] == batch.document_ids[b, end]
            ]
            expected.append(small_store.tokenizer.decode(batch.tokens[b, own]))
    assert asked == expected
    kept = found[found >= 0]
    documents = small_store.row_documents()[kept]
    assert len(kept) > 4 and (documents % 2 == 0).all(), "held-out documents are no neighbors"
    read = stride.attach(batch)
    assert read.neighbors is not None and read.lengths is not None and batch.neighbors is not None
    assert read.neighbors.shape[1] == 16
    np.testing.assert_array_equal(read.neighbors[:, 3::4], batch.neighbors)
    np.testing.assert_array_equal(read.lengths[:, 3::4], batch.lengths)


def test_a_block_reads_as_a_chunk_that_ends_where_it_begins_does() -> None:
    """Where the only layer that reads is the last one, a pass for each offset, with the text pushed along so that a chunk ends
    there, is another way to the same logits (the tables of positions are float32).
    """
    model = small_model(dec_cross_attention=[2], enc_cross_attention=[])
    m, s, n, k = 4, 2, 16, 2
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 50, (2, n), generator=generator)
    neighbors = torch.randint(0, 50, (2, n // s, k, model.config.r), generator=generator)
    with torch.no_grad(), reading_every(model, s):
        strided = model(tokens, neighbors)
    with torch.no_grad():
        for offset in (0, s):
            front = (m - offset) % m
            pushed = torch.cat([torch.zeros(2, front, dtype=torch.long), tokens], 1)[:, :n]
            documents = torch.where(torch.arange(n) < front, -1, 0).expand(2, n)
            ends = torch.arange(m - 1, n, m) - front  # in the text, of the pushed chunks
            whole = model(pushed, neighbors[:, (ends + 1) // s - 1], document_ids=documents)
            for end in ends.tolist():
                if end >= 0 and end + s + front <= n:
                    torch.testing.assert_close(
                        whole[:, end + front : end + front + s], strided[:, end : end + s], rtol=1e-4, atol=1e-5
                    )


def test_a_block_is_read_from_its_last_token_for_a_stride() -> None:
    """Editing one block's neighbors changes nothing before its last token, and with one layer that reads nothing s tokens on."""
    model = small_model(dec_cross_attention=[2], enc_cross_attention=[])
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 50, (1, 16), generator=generator)
    neighbors = torch.randint(0, 50, (1, 8, 2, model.config.r), generator=generator)
    other = neighbors.clone()
    other[:, 3] = (other[:, 3] + 1) % 50
    with torch.no_grad(), reading_every(model, 2):
        changed = (model(tokens, neighbors) != model(tokens, other)).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [7, 8]


def test_what_cannot_be_strided_is_refused(small_store: Store) -> None:
    model, sequences = opened(small_store, ALONE)
    for length in (0, -4, 5, 32):
        with pytest.raises(UsageError, match=r"does not divide"):
            Stride(sequences, length, model)
    reads, _ = opened(small_store, {})
    with pytest.raises(UsageError, match="reads the chunk"):
        Stride(sequences, 8, reads)
    bare = Sequences(small_store, np.arange(20), 64)
    with pytest.raises(UsageError, match="nothing is retrieved"):
        Stride(bare, 8, model)
    table = build_neighbors(small_store, [small_store], num_neighbors=2, name="few", filters=Filters(least_shared=0.2))
    filtered = Sequences(small_store, np.arange(20), 64, table, 2)
    with pytest.raises(UsageError, match="without filters"):
        Stride(filtered, 8, model)
