"""Tokenizers: training, loading, special tokens that text cannot forge, bytes of tokens."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import WORDS, shared
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_helpers import KINDS, byte_level, chatml, roberta

from retro_engine.data.tokenizer import Tokenizer, auto_vocab_size
from retro_engine.errors import MissingInputError, StoreError, UsageError

TEXTS = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 400)


def test_training_is_reproducible(tokenizer: Tokenizer) -> None:
    assert Tokenizer.train(iter(TEXTS), 400).json == tokenizer.json
    assert tokenizer.vocab_size <= 400


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_decode_undoes_encode(text: str) -> None:
    tokenizer = _shared()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert int(tokenizer.token_bytes()[ids].sum()) == len(text.encode())
    assert tokenizer.eod_id not in ids
    assert tokenizer.pad_id not in ids


def _shared(cache: list[Tokenizer] = []) -> Tokenizer:  # noqa: B006 (hypothesis takes no fixture)
    if not cache:
        cache.append(Tokenizer.train(TEXTS, 400))
    return cache[0]


def test_text_never_becomes_a_special_token(tokenizer: Tokenizer) -> None:
    text = "before <|endoftext|> after <|pad|>"
    ids = tokenizer.encode(text)
    assert tokenizer.eod_id not in ids
    assert tokenizer.pad_id not in ids
    assert tokenizer.decode(ids) == text


def test_loading(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer.json)
    assert (
        Tokenizer.load(tmp_path).fingerprint
        == Tokenizer.load(tmp_path / "tokenizer.json").fingerprint
        == tokenizer.fingerprint
    )
    with pytest.raises(MissingInputError):
        Tokenizer.load(tmp_path / "no.json")
    for name, content in (("empty", ""), ("foreign", '{"a": 1}'), ("cut", tokenizer.json[:500]), ("text", "hello")):
        (tmp_path / name).write_text(content)
        with pytest.raises(StoreError, match="not a tokenizer.json"):
            Tokenizer.load(tmp_path / name)
    (tmp_path / "newer").write_text(tokenizer.json.replace('"version":"1.0"', '"version":"9.0"'))
    with pytest.raises(StoreError, match="not a tokenizer.json"):
        Tokenizer.load(tmp_path / "newer")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(StoreError, match="not UTF-8"):
        Tokenizer.load(tmp_path / "binary")
    (tmp_path / "no_eod").write_text(tokenizer.json.replace("<|endoftext|>", "<|something|>"))
    with pytest.raises(StoreError, match="end-of-document"):
        Tokenizer.load(tmp_path / "no_eod")


def test_gpt2() -> None:
    gpt2 = Tokenizer.load(shared("data/vocab/gpt2"))
    assert gpt2.vocab_size == 50257
    assert gpt2.eod_id == gpt2.pad_id == 50256
    assert gpt2.encode("Hello world, it's 2024!") == [15496, 995, 11, 340, 338, 48609, 0]
    assert gpt2.dtype is np.uint16


def test_vocabulary_sizes(tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="too small"):
        Tokenizer.train(TEXTS, 100)
    assert [auto_vocab_size(n) for n in (1, 10**7, 10**8)] == [8192, 16384, 32768]
    assert tokenizer.dtype is np.uint16


def whole_words() -> Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    words = {"</s>": 0, "<unk>": 1, "The": 2, "castle": 3}
    backend = Backend(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["</s>", "<unk>"])
    return Tokenizer(backend.to_str())


@pytest.mark.parametrize("make", [*KINDS.values(), whole_words], ids=lambda make: make.__name__)
def test_text_never_becomes_a_special_token_of_any_kind(make: Callable[[], Tokenizer]) -> None:
    """Also of models that have the names of special tokens in their vocabulary, as T5's and XLM-R's."""
    tokenizer = make()
    for index in tokenizer.special_ids - {tokenizer.unknown_id}:
        name = tokenizer.backend.id_to_token(index)
        text = f"The {name} castle {name}"
        ids, offsets = tokenizer.encode_with_offsets(text)
        assert tokenizer.special_ids.isdisjoint(set(ids) - {tokenizer.unknown_id}), (name, ids)
        assert tokenizer.encode(text) == tokenizer.encode_batch([text, "The"])[0] == ids
        assert all(0 <= start <= end <= len(text) for start, end in offsets)
        assert tokenizer.encode_batch([text, "The castle"])[1] == tokenizer.encode("The castle")


def test_what_stands_before_neighbors_in_front() -> None:
    """The token that texts began with; else that which ends documents, also where turns end with another."""
    assert roberta().sink_id == 0  # <s>
    instruct = Tokenizer(chatml().json, end_token="<|im_end|>")
    assert (instruct.eod_id, instruct.sink_id) == (2, 0)
    assert byte_level().sink_id == byte_level().eod_id


@pytest.mark.parametrize("make", [*KINDS.values(), chatml], ids=lambda make: make.__name__)
def test_a_marked_end_changes_no_other_byte_of_how_json_writes_it(make: Callable[[], Tokenizer]) -> None:
    """So that fingerprints stay what they were when all of it was written by json."""
    plain = make()
    plain.backend.add_special_tokens(["<end \u2581\n\x7f\\>"])  # of no name that is known
    entry = plain.backend.get_vocab_size() - 1
    marked = Tokenizer(plain.backend.to_str(), end_token=entry)
    values = json.loads(marked.backend.to_str())
    next(token for token in values["added_tokens"] if token["id"] == entry)["end_of_document"] = True
    assert marked.json == json.dumps(values, ensure_ascii=False, indent=2)
    assert Tokenizer(marked.json).eod_id == entry
