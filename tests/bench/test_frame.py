"""The bench's frame: what is timed in turns, and what a target says."""

import time

import pytest

from retro_engine.bench import frame


def test_alternatives_are_timed_in_turns() -> None:
    calls: list[str] = []

    def work(name: str, seconds: float) -> frame.Work:
        return lambda: (calls.append(name), time.sleep(seconds))

    times = frame.time_in_turns({"fast": work("fast", 0.001), "slow": work("slow", 0.01)}, rounds=5)
    assert calls == ["fast", "slow"] * 6, "one round more than is counted"
    assert times["fast"].median < times["slow"].median
    for median, low, high in times.values():
        assert low <= median <= high


def test_a_row_of_ours_says_how_much_longer_the_others_took() -> None:
    times = {name: frame.Spread.of([seconds]) for name, seconds in {"ours": 0.5, "other": 1.0}.items()}
    ours, other = frame.compared("case", times)
    assert ours.ratios == {"other": 2.0}
    assert other.ratios == {}
    assert [row.ratios for row in frame.compared("case", times, ours=times)] == [{"other": 2.0}, {"ours": 0.5}]


@pytest.mark.parametrize(("values", "spread"), [([3.0], (3, 3, 3)), ([1.0, 2.0, 6.0], (2, 1, 6))])
def test_few_values_are_not_extrapolated(values: list[float], spread: tuple[float, ...]) -> None:
    assert frame.Spread.of(values) == spread


def test_a_target_holds_at_its_bound_and_never_unmeasured() -> None:
    assert frame.at_least("row", 1.5, 1.5).holds
    assert not frame.at_least("row", 1.49, 1.5).holds
    assert frame.at_most("row", 0.5, 0.5).holds
    assert not frame.at_most("row", 0.51, 0.5).holds
    assert not frame.at_most("row", None, 0.5).holds
