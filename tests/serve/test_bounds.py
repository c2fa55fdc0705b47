"""The throttle of failed sign-ins."""

import pytest

from retro_engine.serve import bounds
from retro_engine.serve.bounds import Throttle


def test_the_throttle_counts_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(bounds.time, "monotonic", lambda: now)
    throttle = Throttle(3, 60.0, max_keys=2)
    for _ in range(3):
        assert throttle.wait_s("a") == 0
        throttle.failed("a")
        now += 10
    assert throttle.wait_s("a") == pytest.approx(30)
    assert throttle.wait_s("b") == 0
    now = 61
    assert throttle.wait_s("a") == 0
    for _ in range(3):
        throttle.failed("a")
    assert throttle.wait_s("a") > 0
    throttle.take_back("a")
    throttle.take_back("never")
    assert throttle.wait_s("a") == 0
    for key in "abcdef":  # two keys are held, the oldest go
        for _ in range(3):
            throttle.failed(key)
    assert throttle.wait_s("f") > 0
    assert throttle.wait_s("a") == 0
