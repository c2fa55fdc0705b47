"""Bits per byte: every token once, whatever the batch; modes that mean what they say."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SHARED, small_config

from retro_engine.data.batches import Sequences
from retro_engine.data.neighbor_table import NeighborTable, find_table
from retro_engine.data.store import Store
from retro_engine.errors import MissingInputError
from retro_engine.evaluate.losses import DocumentLosses, bootstrap, proportion_interval, show_interval
from retro_engine.evaluate.perplexity import Given, count_words, evaluate, word_perplexity
from retro_engine.generate.generator import encode_neighbors
from retro_engine.model.retro import RetroModel


@pytest.fixture(scope="module")
def parts(small_store: Store) -> tuple[RetroModel, Sequences]:
    config = small_config(vocab_size=small_store.vocab_size, chunk_size=16, encoder_seq_length=32)
    model = RetroModel(config, torch.Generator().manual_seed(0)).eval()
    table = NeighborTable(find_table(small_store, "bm25"), small_store)
    return model, Sequences(small_store, np.arange(0, small_store.num_documents, 2), 32, table, 2)


def test_every_token_is_counted_once_whatever_the_batch(
    parts: tuple[RetroModel, Sequences], small_store: Store
) -> None:
    model, sequences = parts
    token_bytes = small_store.tokenizer.token_bytes()
    one, many = (evaluate(model, sequences, token_bytes, batch_size=size) for size in (1, 7))
    documents = small_store.documents[sequences.documents]
    for mode in ("on", "off", "random"):
        np.testing.assert_array_equal(one[mode].tokens, documents[:, 1] - 1)
        np.testing.assert_allclose(one[mode].nats, many[mode].nats, rtol=1e-4)
    for place, document in enumerate(sequences.documents):
        first = small_store.document_rows(int(document))[0]
        first_token = int(small_store.rows(first, first + 1)[0][0, 0])
        assert one["on"].bytes[place] == documents[place, 2] - token_bytes[first_token]


def test_loss_is_the_models(parts: tuple[RetroModel, Sequences], small_store: Store) -> None:
    """Off: the sum of -log p of each next token, computed one document at a time without any batching."""
    model, sequences = parts
    found = evaluate(model, sequences, small_store.tokenizer.token_bytes(), ["off"])["off"]
    document = int(sequences.documents[3])
    first, end = small_store.document_rows(document)
    tokens, lengths = small_store.rows(first, end)
    ids = torch.tensor([int(t) for row, n in zip(tokens, lengths) for t in row[:n]])
    nats = 0.0
    for start in range(0, len(ids), 32):
        piece = ids[start : start + 33]
        with torch.no_grad():
            logp = model(piece[None, :32]).log_softmax(-1)[0]
        nats -= float(sum(logp[i, piece[i + 1]] for i in range(len(piece) - 1)))
    assert found.nats[3] == pytest.approx(nats, rel=1e-4)
    assert found.perplexity == pytest.approx(math.exp(found.nats.sum() / found.tokens.sum()))
    assert found.bits_per_byte == pytest.approx(found.nats.sum() / math.log(2) / found.bytes.sum())


def test_modes_differ_and_given_is_given(parts: tuple[RetroModel, Sequences], small_store: Store) -> None:
    model, sequences = parts
    tokenizer = small_store.tokenizer
    given = Given(*encode_neighbors(tokenizer, ["river stone", ""], model.config.r))
    missing = Given(*encode_neighbors(tokenizer, ["", ""], model.config.r))
    results = evaluate(model, sequences, tokenizer.token_bytes(), ["on", "off", "random", "given"], given=given)
    losses = [r.nats.sum() for r in results.values()]
    assert len({round(loss, 6) for loss in losses}) == 4
    nothing = evaluate(model, sequences, tokenizer.token_bytes(), ["given"], given=missing)["given"]
    np.testing.assert_allclose(nothing.nats, results["off"].nats, rtol=1e-6)
    evaluate(model.train(), sequences, tokenizer.token_bytes(), ["off"], limit=1)
    assert model.training, "the model is left in the mode it was in"
    model.eval()


def test_intervals() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(1.0, 0.5, 400)
    low, high = bootstrap(lambda draw: values[draw].mean(), 400)
    error = 1.96 * 0.5 / 20
    assert low == pytest.approx(values.mean() - error, abs=error / 3)
    assert high == pytest.approx(values.mean() + error, abs=error / 3)
    few = DocumentLosses(np.array([10.0, 20.0]), np.array([5, 5]), np.array([20, 20]))
    assert few.summary()["interval"] is None, "two documents make no interval"
    assert show_interval(*few.interval()) == "[too few]"
    losses = DocumentLosses(np.arange(8.0), np.full(8, 5), np.full(8, 20))
    summary = losses.summary()
    assert summary["interval"][0] <= summary["bits_per_byte"] <= summary["interval"][1]


def test_perplexity_per_word(tmp_path: Path) -> None:
    """As WikiText-103's papers count: words between spaces and an end for every line."""
    (tmp_path / "x.tokens").write_text(" = Title = \n \n the castle , built\n")
    assert count_words(tmp_path / "x.tokens") == 7 + 3
    losses = DocumentLosses(np.array([10.0, 13.0]), np.array([3, 4]), np.array([9, 9]))
    assert word_perplexity(losses, 10) == pytest.approx(math.exp(2.3))
    (tmp_path / "empty").write_text("")
    for name in ("empty", "gone"):
        with pytest.raises(MissingInputError):
            count_words(tmp_path / name)
    path = SHARED / "data" / "wikitext" / "wikitext-103.wiki.test.tokens"
    if path.exists():
        assert count_words(path) == 245_569


def test_bytes_are_the_texts_own(tmp_path: Path) -> None:
    """Where a tokenizer loses text, bits per byte divide by the bytes of the text, not by those of what is left."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    from retro_engine.data.batches import Sequences
    from retro_engine.data.prepare import prepare
    from retro_engine.data.question_files import Question
    from retro_engine.data.questions import Questions
    from retro_engine.evaluate.losses import own_bytes

    texts = [f"Café {'黄山' * n} of Zürich, 🦊 number {n}." for n in range(1, 9)]
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[UNK]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=60, special_tokens=special, show_progress=False)
    backend.train_from_iterator(["cafe of zurich number"], trainer)
    (tmp_path / "t.json").write_text(backend.to_str())
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    store = prepare(sorted(tmp_path.glob("*.txt")), tmp_path / "s", str(tmp_path / "t.json"), chunk_size=4)
    assert store.manifest["losses"]
    token_bytes = store.tokenizer.token_bytes()
    sequences = Sequences(store, np.arange(8), 16)
    model = RetroModel(small_config(vocab_size=store.vocab_size, retrieval=False)).eval()
    found = evaluate(model, sequences, token_bytes, ["off"])["off"]
    for document, text in enumerate(texts):
        ids = store.tokenizer.encode(text)
        predicted = token_bytes[ids[1:]].sum() / token_bytes[ids].sum()  # the first token has no prediction
        assert found.bytes[document] == pytest.approx(len(text.encode()) * predicted)
    assert found.bytes.sum() > 1.2 * sum(token_bytes[store.tokenizer.encode(text)].sum() for text in texts)
    questions = Questions([Question("1", "cafe", "", ("黄山黄山",), (), (), 1)], store, "q", 64, 2, 8)
    counted = token_bytes[questions.answers[0]].sum()[None]
    assert own_bytes(questions, np.array([0]), token_bytes, counted)[0] == pytest.approx(len(" 黄山黄山".encode()))


def test_intervals_of_shares() -> None:
    """Wilson's, with the values of his formula; where all or none are right a bootstrap has no width."""
    assert proportion_interval(0, 20) == (0.0, pytest.approx(0.16113, abs=1e-5))
    assert proportion_interval(20, 20) == (pytest.approx(0.83887, abs=1e-5), 1.0)
    assert proportion_interval(10, 20) == (pytest.approx(0.29930, abs=1e-5), pytest.approx(0.70070, abs=1e-5))
    rng = np.random.default_rng(0)
    values = (rng.random(2000) < 0.3).astype(float)
    wide = bootstrap(lambda draw: values[draw].mean(), len(values))
    assert proportion_interval(values.sum(), len(values)) == pytest.approx(wide, abs=3e-3)
    assert show_interval(*proportion_interval(1, 4)) == "[too few]"
