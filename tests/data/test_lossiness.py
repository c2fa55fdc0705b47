"""What tokenizers lose is found on the corpus' own text, by kind, and said; one of bytes loses nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from retro_engine import cli
from retro_engine.data.lossiness import Sample, find_losses, kinds_of
from retro_engine.data.prepare import prepare
from retro_engine.data.store import Store
from retro_engine.data.tokenizer import EOD, Tokenizer

TEXTS = ["The mill of Zürich\nopened  in 1302, naïve guests say.", "A café in the old town; 🦊 and 黄山 are new."]
KNOWN = [
    *TEXTS[:1],
    "A café in the old town; and are new. the mill of zurich cafe naive a",
    "abcdefghijklmnopqrstuvwxyz",
]


def made(kind: str) -> Tokenizer:
    """Tokenizers of several families, trained on `KNOWN`."""
    special = ["[UNK]", EOD]
    if kind == "bert":
        backend = Backend(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer, backend.decoder = normalizers.BertNormalizer(lowercase=True), decoders.WordPiece()
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    elif kind == "unknown":  # no byte alphabet, and what is not known vanishes
        backend = Backend(models.BPE())
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    else:
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "roberta")
        backend.decoder = decoders.ByteLevel()
        if kind in ("nfkc", "lower"):
            backend.normalizer = normalizers.NFKC() if kind == "nfkc" else normalizers.Lowercase()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    backend.train_from_iterator(KNOWN, trainer)
    return Tokenizer(backend.to_str())


def lost(kind: str, texts: list[str]) -> dict[str, float]:
    return {loss.kind: loss.share for loss in find_losses(made(kind), texts)}


def test_one_of_bytes_loses_nothing() -> None:
    odd = ["\u2028\x85 e\u0301 é ﬁ 🦊\t\r\n x", "<|endoftext|> [UNK]", "a" * 200, " lead", "trail "]
    assert lost("bytes", [*TEXTS, *odd]) == {}
    assert find_losses(made("bytes"), []) == []


def test_kinds_shares_and_examples() -> None:
    found = {loss.kind: loss for loss in find_losses(made("bert"), TEXTS)}
    assert {"characters", "case", "accents", "white space"} <= set(found)
    assert (found["case"].before, found["case"].after) == ("The", "the")
    assert found["characters"].unit == "words"
    assert 0 < found["accents"].share < 0.3
    assert found["accents"].before == "Zürich" or "ü" in found["accents"].before
    assert lost("lower", ["all of it is lower"]) == {}
    assert lost("lower", ["One of it is not"]) == {"case": 0.2}
    assert lost("nfkc", ["a ﬁne ① e\u0301nd"]) == {"normalization": 0.75}
    assert lost("unknown", ["the mill 🦊 mill"]) == {"characters": 0.25}
    assert set(lost("roberta", ["the mill", "old town"])) == {"white space"}, "a space is put before each text"


@pytest.mark.parametrize(
    ("before", "after", "kinds"),
    [
        ("Café", "cafe", ["case", "accents"]),
        ("e\u0301", "é", ["normalization"]),
        ("①", "1", ["normalization"]),
        ("a  b", "a b", ["white space"]),
        ("a-b", "a - b", ["white space"]),
        ("Straße 🦊", "strasse", ["characters"]),
        ("ab", "", ["characters"]),
    ],
)
def test_kinds_of_a_difference(before: str, after: str, kinds: list[str]) -> None:
    assert kinds_of(before, after) == kinds


def test_a_sample_is_even_and_bounded() -> None:
    sample = Sample(100)
    for number in range(1000):
        sample.add(f"{number:010d}")
    assert sum(map(len, sample.texts)) <= 100
    steps = {int(b) - int(a) for a, b in zip(sample.texts, sample.texts[1:])}
    assert len(steps) == 1


def test_prepare_and_inspect_say_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, text in enumerate(TEXTS * 3):
        (tmp_path / f"{number}.txt").write_text(text)
    for kind in ("bert", "bytes"):
        (tmp_path / f"{kind}.json").write_text(made(kind).json)
        said: list[str] = []
        inputs = sorted(tmp_path.glob("*.txt"))
        store = prepare(inputs, tmp_path / kind, str(tmp_path / f"{kind}.json"), chunk_size=16, say=said.append)
        assert any("loses or changes text" in line for line in said) == (kind == "bert")
        assert any("lost: case in" in line and "'The' comes back as 'the'" in line for line in said) == (kind == "bert")
        assert cli.main(["inspect", str(store.folder), "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert ("tokenizer_loses" in shown) == (kind == "bert")
        assert Store(store.folder).manifest["losses"] == shown.get("tokenizer_loses", [])
