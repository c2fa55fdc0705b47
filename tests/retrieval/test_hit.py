"""One form of hits: fusion, overlaps, and the same chunk under the same number wherever it is shown."""

import numpy as np
import pytest

from retro_engine.retrieval.hit import Found, Hit, drop_overlaps, fuse


def test_fusion() -> None:
    assert fuse([], []) == []
    fused = fuse([[(0, 1), (0, 2)], [(0, 2), (1, 5)]], [1.0, 2.0])
    assert fused == [((0, 2), 1 / 62 + 2 / 61), ((1, 5), 2 / 62), ((0, 1), 1 / 61)]
    assert fuse([[(0, 1)], [(0, 2)]], [0.0, 1.0]) == [((0, 2), 1 / 61)]
    lexical, dense = [3, 5, 7], [7, 3, 8, 9]
    assert [item for item, _ in fuse([lexical, dense], (1.0, 1.0))] == [3, 7, 5, 8, 9]
    assert fuse([lexical, dense], (1.0, 1.0))[0][1] == pytest.approx(1 / 61 + 1 / 62)
    assert [item for item, _ in fuse([lexical, dense], (5.0, 1.0))[:3]] == [3, 7, 5]
    assert [item for item, _ in fuse([[4], [2]], (1.0, 1.0))] == [2, 4], "ties keep the smaller"


DOCUMENTS = np.array([0, 0, 0, 0, 1, 1, 2])
LAST = np.array([False, False, False, True, False, True, False])  # of more than one


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, 1, 4, 5, 3), [2, 4]),  # the better one stays: its continuation is shown
        ((3, 4, 6), [2, 4, 6]),  # other documents do not overlap; nothing follows 3: it is read with what is before it
        ((5, 4, 0), [4, 0]),  # nothing follows a document's last chunk: it moves one back
        ((3, 1, 2), [3, 1]),  # but not onto another neighbor
        ((6, 3, 0, 2, 1), [6, 2, 0]),
    ],
)
def test_overlaps_are_dropped(before: tuple[int, ...], after: list[int]) -> None:
    rows = np.array([[*before, -1]])
    documents = np.where(rows >= 0, DOCUMENTS[rows], -1)
    kept = drop_overlaps(documents, rows, LAST[rows], 2)[0]
    assert rows[0, kept[kept >= 0]].tolist() == after
    assert (np.diff(kept[kept >= 0]) > 0).all(), "in their order"


def test_reach() -> None:
    """As many chunks as are read at a time: 1 keeps all, 4 only what is four apart."""
    documents, last = np.zeros((1, 8), np.int64), np.zeros((1, 8), bool)
    for reach, expected in ((1, list(range(8))), (2, [0, 2, 4, 6]), (4, [0, 4])):
        kept = drop_overlaps(documents, np.arange(8)[None], last, reach)[0]
        assert kept[kept >= 0].tolist() == expected


def test_forms() -> None:
    hit = Hit("d7", "Title", 2, 1.5, "text", "more", "store")
    assert hit.where == "store/d7 Title chunk 2"
    assert hit.to_json() == {**vars(hit), "store": "store"}
    given = Hit.given(0, "a text")
    assert (given.where, given.source, given.chunk, given.text) == ("given 1", "", -1, "a text")
    found = Found.of([(hit, np.array([5, 6, 7, 8])), (given, np.array([9]))], 3, 3, 0)
    assert found.tokens_KR.tolist() == [[5, 6, 7], [9, 0, 0], [0, 0, 0]]
    assert found.lengths_K.tolist() == [3, 1, 0]
    assert [tokens.tolist() for _, tokens in found.pairs()] == [[5, 6, 7], [9]]
