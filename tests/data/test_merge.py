"""Merging stores: the same documents as prepared together; copies and near copies left out; what does not fit refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import WORDS

from retro_engine.cli.main import main
from retro_engine.data.merge import HASHES, band_of, document_tokens, merge, signature_of
from retro_engine.data.prepare import prepare
from retro_engine.data.store import Store
from retro_engine.errors import StoreError, UsageError


def write(path: Path, texts: list[str]) -> Path:
    rows = [{"id": f"{path.stem}{number}", "title": f"T{number}", "text": text} for number, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Store], Store]:
    """Two stores and the one that has the files of both."""
    folder, rng = tmp_path_factory.mktemp("merge"), np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 200)) for _ in range(8)]
    near = texts[1].split()
    near[100] = "elsewhere"
    second = [*texts[4:], texts[0] + "  ", " ".join(near), "river"]
    files = [write(folder / "a.jsonl", texts[:4]), write(folder / "b.jsonl", second)]
    whole = prepare(files, folder / "whole", vocab_size=300, chunk_size=16)
    tokenizer = str(whole.folder)
    return [prepare([f], folder / f.stem, tokenizer, chunk_size=16) for f in files], whole


def test_merged_is_prepared_together(parts: tuple[list[Store], Store], tmp_path: Path) -> None:
    stores, whole = parts
    made = merge(stores, tmp_path / "m")
    made.verify()
    assert made.fingerprint == whole.fingerprint, "to the byte"
    assert merge([whole], tmp_path / "one").fingerprint == whole.fingerprint


def test_copies_and_near_copies_are_left_out(
    parts: tuple[list[Store], Store], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stores, whole = parts
    names = [name for name, _ in map(whole.name, range(whole.num_documents))]
    for kind, missing in (("exact", {"b4"}), ("minhash", {"b4", "b5"})):
        out = tmp_path / kind
        arguments = ["merge", *(str(s.folder) for s in stores), "--out", str(out), "--deduplicate", kind]
        assert main(arguments) == 0
        made = Store(out)
        assert [name for name, _ in map(made.name, range(made.num_documents))] == [n for n in names if n not in missing]
        assert f"{len(missing)} of 11 documents repeat earlier ones" in capsys.readouterr().err
        last = made.num_documents - 1
        np.testing.assert_array_equal(document_tokens(made, last), document_tokens(whole, whole.num_documents - 1))


def test_signatures_agree_as_much_as_the_runs_do() -> None:
    rng = np.random.default_rng(1)
    one = rng.integers(0, 5000, 3000)
    other = one.copy()
    other[:1000] = rng.integers(0, 5000, 1000)  # 2,000 of 4,000 runs are in both
    assert abs((signature_of(one) == signature_of(other)).mean() - 0.5) < 0.15
    assert (signature_of(one) == signature_of(one.copy())).all()
    assert (signature_of(one) != signature_of(rng.integers(0, 5000, 3000))).mean() > 0.95
    assert len({signature_of(np.array(tokens, np.int64)).tobytes() for tokens in ([], [1], [2], [1, 2])}) == 4


@pytest.mark.parametrize("threshold", [0.05, 0.1, 0.3, 0.45, 0.6, 0.8, 0.95])
def test_who_is_as_alike_as_the_threshold_is_compared(threshold: float) -> None:
    """Signatures whose hashes agree with the chance of the threshold: 99 of 100 pairs share a band."""
    size = band_of(threshold)
    agree = np.random.default_rng(0).random((2000, HASHES)) < threshold
    assert agree.reshape(2000, HASHES // size, size).all(2).any(1).mean() >= 0.98
    assert [band_of(0.95), band_of(0.8), band_of(0.3)] == [8, 4, 2], "no more than are needed: each is a comparison"


def test_what_cannot_be_merged(parts: tuple[list[Store], Store], tmp_path: Path) -> None:
    (one, two), whole = parts
    source = write(tmp_path / "c.jsonl", ["other words entirely " * 30])
    foreign = prepare([source], tmp_path / "f", vocab_size=270, chunk_size=16)
    longer = prepare([source], tmp_path / "l", str(whole.folder), chunk_size=32)
    for stores, more, kind, message in (
        ([one, foreign], {}, StoreError, "has tokenizer"),
        ([one, longer], {}, StoreError, "has chunk_size"),
        ([one, one], {}, UsageError, "named twice"),
        ([one, two], {"threshold": 0.0}, UsageError, "--threshold 0.0"),
        ([one, two], {"deduplicate": "soft"}, UsageError, "--deduplicate soft"),
    ):
        with pytest.raises(kind, match=message):
            merge(stores, tmp_path / "m", **more)  # type: ignore[arg-type]
    assert not (tmp_path / "m").exists()
    assert main(["merge", str(one.folder), "--out", str(tmp_path / "m"), "--threshold", "0.5"]) == 2
