"""Segments on the disk: read again as written, the same bytes each time, damage and other libraries' refused."""

from pathlib import Path

import numpy as np
import pytest
from helpers import WORDS

from retro_engine.errors import MissingInputError, StoreError
from retro_engine.library import codes as library_codes
from retro_engine.library.segment_files import arrays_of, open_segment, publish_segment
from retro_engine.library.segments import Delta, Segment
from retro_engine.retrieval.analyzer import Analyzer

PARENT = "0" * 64


def random_segment() -> Segment:
    rng = np.random.default_rng(3)
    delta = Delta(3)
    for key in range(1, 60):
        texts = [" ".join(rng.choice(WORDS, int(rng.integers(0, 12)))) for _ in range(int(rng.integers(1, 5)))]
        delta.append(
            [key], [len(texts)], Analyzer().terms(texts), rng.standard_normal((len(texts), 3)).astype(np.float32)
        )
    return delta.segment()


def arrays(segment: Segment) -> dict[str, bytes]:
    return {
        name: np.asarray(values).tobytes()
        for name, values in (arrays_of(segment) | {"vectors": segment.vectors}).items()
    }


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str, Segment]:
    monkeypatch.setattr(library_codes, "MIN_CHUNKS", 50)
    segment = random_segment()
    return tmp_path / "segment", publish_segment(segment, tmp_path / "segment", PARENT), segment


def test_what_is_published_is_read_again(published: tuple[Path, str, Segment], tmp_path: Path) -> None:
    folder, mark, segment = published
    opened = open_segment(folder, PARENT, mark)
    assert arrays(opened) == arrays(segment)
    assert opened.codes is not None
    assert publish_segment(segment, tmp_path / "again", PARENT) == mark, "same input, same bytes"


def test_segments_of_others_and_damaged_ones_are_refused(published: tuple[Path, str, Segment], tmp_path: Path) -> None:
    folder, mark, _ = published
    for parent, fingerprint in (("1" * 64, mark), (PARENT, "1" * 64)):
        with pytest.raises(StoreError, match="another segment"):
            open_segment(folder, parent, fingerprint)
    with pytest.raises(MissingInputError):
        open_segment(tmp_path / "nothing", PARENT, mark)
    rng = np.random.default_rng(0)
    for name in sorted(path.name for path in folder.iterdir()):
        raw = (folder / name).read_bytes()
        flipped = bytearray(raw)
        flipped[int(rng.integers(len(raw)))] ^= 1 << int(rng.integers(8))
        for damaged in (bytes(flipped), raw[:-2], raw + b"x", b""):
            (folder / name).unlink()
            (folder / name).write_bytes(damaged)
            with pytest.raises(StoreError):
                open_segment(folder, PARENT, mark)
        (folder / name).write_bytes(raw)
    open_segment(folder, PARENT, mark)
