"""The line of progress: figures, pace, time left; for people and as JSON; a bar that does not wrap."""

import json
import sys

import pytest

from retro_engine import progress
from retro_engine.progress import Reporter


def shown(mode: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], seconds: float = 20.0) -> str:
    """What 5 of 100 steps give, in so many seconds, of a run that had 10."""
    clock = iter([0.0, seconds, seconds])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with Reporter(mode).progress("training", 100, "steps", done=10) as meter:
        meter.figures = lambda: {"loss": 3.25, "tokens_per_s": 12345.6, "valid_bits_per_byte": 1.9}
        meter.advance(5)
    return capsys.readouterr().err


def test_what_is_measured_stands_in_the_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = shown("text", monkeypatch, capsys)
    assert line == (
        "training: 15 of 100 steps, 6 min left, loss 3.250, validation 1.900 bits per byte, 12,346 tokens/s, 4.0 s each\n"
    )
    assert shown("quiet", monkeypatch, capsys) == ""
    event = json.loads(shown("json", monkeypatch, capsys, seconds=10.0))
    assert (event["done"], event["rate"], event["left_s"], event["loss"]) == (15, 0.5, 170.0, 3.25)


def test_a_bar_fits_the_terminal_and_makes_room_for_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    reporter = Reporter()
    monkeypatch.setattr(progress.time, "monotonic", iter([0.0, 1.0, 2.0]).__next__)
    with reporter.progress("training", 4, "steps") as meter:
        meter.advance(1)
        reporter.say("step 1: well")
    reporter.say("done")
    out = capsys.readouterr().err
    bar = out.split(progress.CLEAR)[1]
    assert bar.startswith("training [####............] 1/4 steps, 3 s left")
    assert len(bar) <= 59
    assert f"{progress.CLEAR}step 1: well\n" in out
    assert out.endswith("\ndone\n")
