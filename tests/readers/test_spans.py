"""Where an answer was copied from."""

import pytest

from retro_engine.readers.spans import Span, find_span

CASTLE = "In 1302 Adelheid of Thurn built the castle;  her brother, the Duke, burned it down in 13020 and 1402."
RIVER = "The river Adda. Adelheid crossed it in 1302."


@pytest.mark.parametrize(
    ("answer", "passage", "text"),
    [
        ("1302", 0, "1302"),
        ("1402", 0, "1402"),
        ("the Duke", 0, "the Duke"),
        ("adelheid OF thurn", 0, "Adelheid of Thurn"),
        ("her brother the duke", 0, "her brother, the Duke"),
        ("The castle.", 0, "the castle"),
        ("Adelheid crossed it", 1, "Adelheid crossed it"),
        ("Adda", 1, "Adda"),
        ("the river Adda in Italy", 1, "The river Adda"),
    ],
)
def test_found(answer: str, passage: int, text: str) -> None:
    span = find_span(answer, [CASTLE, RIVER])
    assert span is not None
    assert (span.passage, span.text) == (passage, text)
    assert [CASTLE, RIVER][passage][span.start : span.end] == text


@pytest.mark.parametrize(
    "answer", ["", "30", "Adel", "Bertha", "a Bertha of Nowhere near the", "...", "burned it up in 1999 or later"]
)
def test_not_found(answer: str) -> None:
    assert find_span(answer, [CASTLE, RIVER]) is None
    assert find_span(answer, []) is None


def test_words_are_not_cut() -> None:
    assert find_span("1302", ["In 13020 and x1302."]) is None
    assert find_span("1302", ["In 13020 and 1302."]) == Span(0, 13, 17, "1302")


def test_scripts_without_spaces() -> None:
    assert find_span("東京", ["首都は東京です。"]) == Span(0, 3, 5, "東京")
    assert find_span("Zürich", ["Das liegt in ZÜRICH."]) == Span(0, 13, 19, "ZÜRICH")
