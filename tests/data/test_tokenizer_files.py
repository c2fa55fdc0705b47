"""The files that tokenizers come in: the end of a document from any of them, added tokens at their ids, hostile ones refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from retro_engine import cli
from retro_engine.data.chat_files import said_end
from retro_engine.data.store import Store
from retro_engine.data.tokenizer import EOD, MAX_ID, Tokenizer
from retro_engine.data.tokenizer_files import added_tokens, find, from_pair, read_object
from retro_engine.errors import MissingInputError, StoreError, UsageError

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCAB = {letter: number for number, letter in enumerate(LETTERS)}


def write(folder: Path, **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for name, values in files.items():
        name = name.replace("__", ".")
        (folder / name).write_text(values if isinstance(values, str) else json.dumps(values))
    return folder


def of_bytes(*special: str, plain: tuple[str, ...] = ()) -> str:
    backend = Backend(models.BPE(vocab=VOCAB, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    backend.add_tokens(list(plain))
    return str(backend.to_str())


@pytest.mark.parametrize(
    ("files", "end"),
    [
        ({"tokenizer_config__json": {"eos_token": "<b>"}}, "<b>"),
        ({"tokenizer_config__json": {"eos_token": {"content": "<b>", "lstrip": False}}}, "<b>"),
        ({"tokenizer_config__json": {"eos_token": None}, "special_tokens_map__json": {"eos_token": "<b>"}}, "<b>"),
        ({"special_tokens_map__json": {"eos_token": {"content": "<b>"}}, "config__json": {"eos_token_id": 256}}, "<b>"),
        ({"generation_config__json": {"eos_token_id": [257, 256]}, "config__json": {"eos_token_id": 256}}, "<b>"),
        ({"generation_config__json": {"eos_token_id": None}, "config__json": {"eos_token_id": 257}}, "<b>"),
        ({"config__json": {"model_type": "llava", "text_config": {"eos_token_id": 257}}}, "<b>"),
        ({"tokenizer_config__json": "\ufeff{}", "config__json": {"eos_token_id": -1}}, EOD),
        ({"config__json": {"eos_token_id": 2}}, EOD),  # an ordinary token, the default of many configurations
        ({"config__json": {"eos_token_id": 50256}}, EOD),
        ({}, EOD),
    ],
)
def test_the_end_comes_from_any_of_the_usual_files(tmp_path: Path, files: dict[str, Any], end: str) -> None:
    """It is kept where tokenizer.json goes alone, by name or by mark; a flag is above all."""
    folder = write(tmp_path / "t", tokenizer__json=of_bytes("<a>", "<b>", EOD), **files)
    for path in (folder, folder / "tokenizer.json"):
        tokenizer = Tokenizer.load(path)
        assert tokenizer.backend.id_to_token(tokenizer.eod_id) == end
    alone = Tokenizer(tokenizer.json)
    assert (alone.eod_id, alone.fingerprint) == (tokenizer.eod_id, tokenizer.fingerprint)
    assert Backend.from_str(tokenizer.json).encode("a").ids == [VOCAB["a"]], "others read the file, too"
    given = Tokenizer.load(folder, "<a>")
    assert given.eod_id == Tokenizer(given.json).eod_id == 256
    kept = write(tmp_path / "kept", tokenizer__json=given.json, config__json={"eos_token_id": 257})
    assert Tokenizer.load(kept).eod_id == 256, "the mark is above the files beside it"


def test_ends_that_cannot_be(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", tokenizer__json=of_bytes("<a>", plain=("plain",)))
    with pytest.raises(StoreError, match=r"has no end-of-document token\n.*\n  --end-token TOKEN"):
        Tokenizer.load(folder)
    assert Tokenizer.load(folder, "<a>").eod_id == 256
    with pytest.raises(StoreError, match=r"'<A>'\n.*has none such\n  did you mean <a>"):
        Tokenizer.load(folder, "<A>")
    for ordinary in ("plain", "a"):
        with pytest.raises(StoreError, match="names the ordinary token"):
            Tokenizer.load(folder, ordinary)
    for name, values, message in (
        ("config.json", {"eos_token_id": 999}, "config.json names the end-of-document token 999"),
        ("config.json", {"eos_token_id": "2"}, "config.json: eos_token_id='2' cannot be read"),
        ("config.json", {"eos_token_id": True}, "config.json: eos_token_id=True cannot be read"),
        ("tokenizer_config.json", {"eos_token": 3}, "eos_token is of no known form"),
        ("tokenizer_config.json", [1], "it is a list"),
        ("tokenizer_config.json", "{", "is not JSON"),
    ):
        (folder / name).write_text(values if isinstance(values, str) else json.dumps(values))
        with pytest.raises(StoreError, match=message):
            Tokenizer.load(folder)
        (folder / name).unlink()


def test_prepare_takes_the_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "t", tokenizer__json=of_bytes("<end>"))
    (tmp_path / "a.txt").write_text("words")
    command = ["prepare", str(tmp_path / "a.txt"), "--out", str(tmp_path / "s")]
    assert cli.main([*command, "--tokenizer", str(folder)]) == 3
    assert "--end-token TOKEN" in capsys.readouterr().err
    assert cli.main([*command, "--end-token", "<end>"]) == 2
    assert cli.main([*command, "--tokenizer", str(folder), "--end-token", "<end>"]) == 0
    store = Store(tmp_path / "s")
    assert store.eod_id == store.tokenizer.eod_id == 256


def test_added_tokens_keep_their_ids(tmp_path: Path) -> None:
    """Of added_tokens.json in the order of ids, gaps and all, special where the other files say so."""
    folder = write(
        tmp_path / "t",
        vocab__json=VOCAB,
        merges__txt="#version: 0.2\n#v e\nĠ a\r\n",
        added_tokens__json={"<late>": 300, "<early>": 256, "word": 260},
        special_tokens_map__json={"eos_token": "<late>", "additional_special_tokens": [{"content": "<early>"}]},
    )
    (folder / "vocab.json").write_text(json.dumps(VOCAB | {"Ġa": 280, "#v": 281, "#ve": 282}))
    tokenizer = Tokenizer.load(folder)
    for token, number in (("<early>", 256), ("word", 260), ("<late>", 300), ("Ġa", 280)):
        assert tokenizer.backend.token_to_id(token) == number
    assert tokenizer.eod_id == 300
    assert tokenizer.num_holes == 301 - 262
    assert tokenizer.decode([256, 300, 260]) == "word", "special ones are not text"
    assert tokenizer.encode("word<late>")[0] == 260
    assert 300 not in tokenizer.encode("word<late>")
    assert tokenizer.backend.token_to_id(EOD) is None, "nothing is added where an end is known"
    assert [token["id"] for token in added_tokens(folder)] == [256, 260, 300]
    assert find(folder) == find(folder / "vocab.json") == (folder / "vocab.json", folder / "merges.txt")
    newer = {"300": {"content": "<late>", "special": True}, "301": {"content": "<newer>", "special": False}}
    write(folder, tokenizer_config__json={"added_tokens_decoder": newer})
    assert Tokenizer.load(folder).backend.token_to_id("<newer>") == 301


def test_gaps_in_a_tokenizer_json(tmp_path: Path) -> None:
    values = json.loads(of_bytes(EOD))
    values["added_tokens"].append({**values["added_tokens"][0], "id": 1000, "content": "<far>"})
    tokenizer = Tokenizer(json.dumps(values))
    assert tokenizer.backend.token_to_id("<far>") == 1000
    assert (tokenizer.vocab_size, tokenizer.num_holes) == (1001, 743)
    assert Tokenizer(tokenizer.json).fingerprint == tokenizer.fingerprint
    values["added_tokens"].append({**values["added_tokens"][0], "id": 7, "content": "a"})
    with pytest.raises(StoreError, match=r"adds 'a' as 7\n  the library gives it"):
        Tokenizer(json.dumps(values))


HOSTILE = {
    "an id beyond 2^31": {"vocab": VOCAB | {"zz": 2**31 + 5}},
    "an id beyond 2^32": {"vocab": VOCAB | {"zz": 2**32 + 5}},
    "an id that is too large": {"vocab": VOCAB | {"zz": MAX_ID}},
    "an id below 0": {"vocab": VOCAB | {"zz": -1}},
    "an id that is a text": {"vocab": VOCAB | {"zz": "1"}},
    "a panic while merges are read": {
        "continuing_subword_prefix": "ééé",
        "vocab": VOCAB | {"ab": 260},
        "merges": [["a", "b"]],
    },
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_models(what: str) -> None:
    values = json.loads(of_bytes(EOD))
    values["model"] |= HOSTILE[what]
    with pytest.raises(StoreError):
        Tokenizer(json.dumps(values))


def test_panics_are_store_errors() -> None:
    values = json.loads(of_bytes(EOD))
    values["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    with pytest.raises(StoreError, match="Precompiled"):
        Tokenizer(json.dumps(values))
    values["normalizer"] = None
    values["added_tokens"][0]["id"] = 1
    values["model"] = {"type": "WordLevel", "vocab": {"a": 0, EOD: 1}, "unk_token": "[UNK]"}
    tokenizer = Tokenizer(json.dumps(values))
    for texts in (["b"], ["b"] * 9):
        with pytest.raises(StoreError, match="cannot|can be used"):
            tokenizer.encode_batch(texts)


def test_what_is_not_read_is_named(tmp_path: Path) -> None:
    for name in ("tokenizer.model", "spiece.model", "vocab.txt", "o200k.tiktoken", "vocab.json", "merges.txt"):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_bytes(b"\xff\x00")
        for path in (folder, folder / name):
            with pytest.raises(StoreError, match=r"(?s)which is not read.*save_pretrained"):
                Tokenizer.load(path)
    (tmp_path / "none").mkdir()
    with pytest.raises(MissingInputError, match="has no tokenizer"):
        Tokenizer.load(tmp_path / "none")
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(MissingInputError, match="is a FIFO"):
        Tokenizer.load(tmp_path)
    with pytest.raises(MissingInputError, match="is a device"):
        Tokenizer.load("/dev/zero")


def test_pairs_that_are_not_gpt2s(tmp_path: Path) -> None:
    for number, (vocab, merges, config, message) in enumerate([
        (VOCAB, "a b\n", {"tokenizer_class": "Qwen2Tokenizer"}, "Qwen2Tokenizer cuts text in its own way"),
        ({"a": 0}, "", {}, "255 of the 256 bytes have no token"),
        (VOCAB, "a b c\n", {}, "not two parts"),
        (VOCAB, "a b\n", {}, "cannot|can be used"),
        (VOCAB | {"x1": 2**31}, "", {}, "no number below"),
        (VOCAB | {"x1": "2"}, "", {}, "no number below"),
    ]):  # fmt: skip
        folder = write(tmp_path / str(number), vocab__json=vocab, merges__txt=merges, tokenizer_config__json=config)
        with pytest.raises(StoreError, match=message):
            Tokenizer.load(folder)
    folder = write(tmp_path / "two", vocab__json=VOCAB | {"<x>": 300}, merges__txt="", added_tokens__json={"<x>": 301})
    with pytest.raises(StoreError, match="has two ids"):
        from_pair(folder / "vocab.json", folder / "merges.txt")
    write(folder, added_tokens__json={"<x>": "301"})
    with pytest.raises(StoreError, match="has no id"):
        Tokenizer.load(folder)


def test_objects_and_ends_of_plain_folders(tmp_path: Path) -> None:
    assert said_end(tmp_path) is None
    with pytest.raises(MissingInputError):
        read_object(tmp_path / "no.json")
    with pytest.raises(UsageError):
        Tokenizer.train(["a"], 3)
