"""What makes two documents copies, and numbers in place of marks."""

import unicodedata

import numpy as np

from retro_engine.data.contents import HIDDEN, content_mark, hide_copies, number_contents

TEXT = "The café of Zoë\n\n  def f():\n    return 1\n"


def test_the_same_file_prepared_twice_is_the_same() -> None:
    same = (
        TEXT,
        TEXT.rstrip(),
        TEXT + "\n\n",
        "\ufeff" + TEXT,
        TEXT.replace("\n", "\r\n"),
        TEXT.replace("\n", " \n"),
        " ".join(TEXT.split()),
        unicodedata.normalize("NFD", TEXT),
    )
    assert {content_mark(text) for text in same} == {content_mark(TEXT)}
    other = (TEXT.lower(), TEXT.replace("1", "2"), TEXT + "more", TEXT[1:], TEXT.replace("def f", "deff"))
    assert len({content_mark(text) for text in (TEXT, *other)}) == 1 + len(other)
    assert content_mark(TEXT) == 8947763717433038347, "marks lie in files: they stay what they are"
    assert all(-(1 << 63) <= content_mark(str(i)) < 1 << 63 for i in range(100))


def test_numbers_and_hidden_copies() -> None:
    marks = [np.array([7, -9, 7]), np.array([5]), np.array([-9, 8])]
    numbers = number_contents(marks)
    assert [part.tolist() for part in numbers] == [[2, 0, 2], [1], [0, 3]]
    assert [part.tolist() for part in hide_copies(numbers)] == [[2, 0, HIDDEN], [1], [HIDDEN, 3]]
