"""Megatron's .bin and .idx as a store: the tokens as they are; other types, and files that do not fit, are refused."""

from pathlib import Path

import numpy as np
import pytest

from retro_engine.cli.main import main
from retro_engine.data.megatron_corpus import HEAD, MAGIC
from retro_engine.data.merge import document_tokens
from retro_engine.data.store import Store


def write_pair(path: Path, documents: list[list[list[int]]], dtype: str = "<u2", code: int = 8) -> Path:
    """Documents of sequences of ids."""
    sequences = [sequence for document in documents for sequence in document]
    values = [np.array(sequence, dtype) for sequence in sequences]
    sizes = np.array([len(value) for value in values], "<i4")
    starts = np.cumsum([0, *(value.nbytes for value in values)])[:-1].astype("<i8")
    firsts = np.cumsum([0, *map(len, documents)]).astype("<i8")
    path.with_suffix(".bin").write_bytes(b"".join(value.tobytes() for value in values))
    head = HEAD.pack(MAGIC, 1, code, len(sizes), len(firsts))
    path.write_bytes(head + sizes.tobytes() + starts.tobytes() + firsts.tobytes())
    return path


def prepare(path: Path, store: Store, out: Path, *more: str) -> int:
    return main(
        ["prepare", str(path), "--out", str(out), "--tokenizer", str(store.folder), "--chunk-size", "16", *more]
    )


@pytest.mark.parametrize(("dtype", "code"), [("<u2", 8), ("<i4", 4)])
def test_the_tokens_are_taken_as_they_are(small_store: Store, tmp_path: Path, dtype: str, code: int) -> None:
    encode, end = small_store.tokenizer.encode, small_store.eod_id
    first, second = encode("The river runs."), encode("A mill, and a bridge. " * 9)
    pair = write_pair(
        tmp_path / "c.idx", [[[*first, end]], [[]], [second[:7], [*second[7:], end]], [first]], dtype, code
    )
    assert prepare(pair, small_store, tmp_path / "s") == 0
    made = Store(tmp_path / "s")
    assert [document_tokens(made, n)[:-1].tolist() for n in range(made.num_documents)] == [first, second, first]
    assert made.name(1) == ("c:2", "") and made.text(0) == "The river runs."
    assert made.contents[0] == made.contents[2] != made.contents[1]


def test_what_is_refused(small_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_pair(tmp_path / "c.idx", [[[1, 2, 3]], [[4]]]).read_bytes()
    data = (tmp_path / "c.bin").read_bytes()

    def refused(index: bytes, message: str, values: bytes = data, *more: str, code: int = 3) -> None:
        (tmp_path / "c.idx").write_bytes(index)
        (tmp_path / "c.bin").write_bytes(values)
        assert prepare(tmp_path / "c.idx", small_store, tmp_path / "s", *more) == code
        assert message in capsys.readouterr().err

    for number, name in ((7, "float32"), (5, "int64"), (1, "uint8"), (99, "type 99")):
        refused(good[:17] + bytes([number]) + good[18:], f"holds {name}")
    refused(good[:9] + b"\x02" + good[10:], "has version 2")
    refused(b"PK" + good[2:], "is no index of Megatron's")
    refused(good[:-3], "is damaged")
    refused(good, "do not fit", data[:-2])
    refused(good[:34] + b"\xff\xff\xff\x7f" + good[38:], "do not fit")
    refused(good, "has token 65535", b"\xff" * len(data))
    for flags in (["--strict"], ["--split", "headings"], ["--format", "text"]):
        refused(good, "hold no text", data, *flags, code=2)
    (tmp_path / "c.bin").unlink()
    assert prepare(tmp_path / "c.idx", small_store, tmp_path / "s") == 3
    assert "c.bin does not exist" in capsys.readouterr().err
    assert main(["prepare", str(tmp_path / "c.idx"), "--out", str(tmp_path / "s")]) == 2
    assert main(["prepare", str(tmp_path / "c.idx"), "x.txt", "--out", str(tmp_path / "s")]) == 2
    assert not (tmp_path / "s" / "manifest.json").exists()
