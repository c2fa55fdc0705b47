"""Which validation is the best, and when they have been rising."""

import math

from retro_engine.train.watch import Watch


def test_three_rises_running_are_said_once_and_the_lowest_is_the_best() -> None:
    watch = Watch()
    found = []
    for loss in (3.0, 2.0, 2.0, 2.1, 2.2, math.nan, 2.3, 2.4, 2.5, 2.6, 1.9):
        found.append((watch.is_best(loss), watch.warning is not None))
    assert [best for best, _ in found] == [True, True, *[False] * 8, True]
    assert [warned for _, warned in found] == [*[False] * 9, True, False], (
        "2.4, 2.5 and 2.6: after what is no number it begins anew"
    )
    assert watch.best == 1.9
    warned = Watch()
    for loss in (1.0, 2.0, 3.0, 4.0):
        warned.is_best(loss)
    assert warned.warning is not None
    assert "to 4.000 from 1.000" in warned.warning


def test_a_resumed_run_knows_the_best_of_before() -> None:
    watch = Watch(best=1.5)
    assert not watch.is_best(1.5)
    assert watch.is_best(1.4)
