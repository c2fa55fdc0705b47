"""Libraries that live (simulator.py): nothing is lost, whatever fails, and whoever writes at the same time.

A few here; 100,000 operations with RETRO_CAMPAIGN=1, which prints what is counted. RETRO_SEED draws others; what is said
with a failure is its own seed.
"""

import shutil
from dataclasses import replace
from typing import Any

import pytest
from reliability.linearizable import Operation, is_linearizable
from reliability.runs import CAMPAIGN, SEED, Runs, counted
from reliability.simulator import live
from reliability.workloads import Place

from retro_engine.data.corpus import Document
from retro_engine.data.store import Store
from retro_engine.library.library import Library

LIBRARIES, LIVES, STEPS = (100, 5, 200) if CAMPAIGN else (4, 3, 20)
SCHEDULES, THREAD_STEPS = (200, 10) if CAMPAIGN else (3, 5)


def test_libraries_that_live(runs: Runs, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    count = raised = kills = 0
    for number in range(LIBRARIES):
        there = replace(place, root=place.root.with_name(f"library-{number}"))
        there.root.mkdir()
        told: dict[str, Any] = {"known": None, "maybe": None}
        for life in range(LIVES):
            about = {"seed": SEED * 1_000_000 + number, "number": life, "steps": STEPS}
            told = runs.ask("add", there, "live", known=told["known"], maybe=told["maybe"], **about)
            assert "raised" not in told or isinstance(told["raised"], int), told["text"]
            count, raised, kills = count + told["count"], raised + told["raised"], kills + bool(told["maybe"])
        shutil.rmtree(there.root)
    assert raised
    assert kills
    with capsys.disabled():
        if CAMPAIGN:
            said = f"{count} operations on {LIBRARIES} libraries, {LIBRARIES * (LIVES - 1)} restarts, {kills} of them kills"
            print(counted(f"simulator: {said} within a change, {raised} typed errors, 0 lost, 0 wrong, 0 untyped"))


def test_a_library_that_forgets_is_seen(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.root.mkdir()
    added = Library.add

    def add(self: Library, documents: list[Document], namespace: str = "default") -> int:
        return added(self, documents[:1], namespace)

    monkeypatch.setattr(Library, "add", add)
    about = {"seed": 0, "number": 0, "steps": 50, "known": None, "maybe": None}
    with pytest.raises(AssertionError, match="seed 0, life 0, operation"):
        live(place.root / "library", Store(place.store).tokenizer, about, lambda *_: None)


def test_threads_take_turns(runs: Runs, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    count = 0
    for number in range(SCHEDULES):
        there = replace(place, root=place.root.with_name(f"schedule-{number}"))
        there.root.mkdir()
        seed = SEED * 1_000_000 + number
        answer = runs.ask("add", there, "schedule", seed=seed, steps=THREAD_STEPS)
        assert "raised" not in answer, answer["text"]
        for rows in answer["histories"]:
            history = [Operation(**row) for row in rows]
            count += len(history)
            assert is_linearizable(history), f"seed {seed}: {history}"
        shutil.rmtree(there.root)
    with capsys.disabled():
        if CAMPAIGN:
            print(counted(f"schedules of threads: {SCHEDULES} with {count} operations, all linearizable"))
