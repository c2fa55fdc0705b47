"""Power loss at every event: what was acknowledged is there, what is there is whole, the same command then finishes.

A few states of each workload here; with RETRO_CAMPAIGN=1 all, drawn ones from RETRO_SEED, and what is counted is printed.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from reliability.replay import State, states, write_tree
from reliability.runs import CAMPAIGN, SEED, Runs, counted
from reliability.workloads import WORKLOADS, Place

DRAWS = 60 if CAMPAIGN else 1
FINISHED = 10 if CAMPAIGN else 2  # of each workload: states from which the same command goes on


def checked(name: str, place: Place, state: State, folder: Path) -> Place:
    """The state on the disk, after its check."""
    there = replace(place, root=write_tree(state.tree, folder))
    try:
        WORKLOADS[name].check(there, state.said)
    except Exception as error:
        raise AssertionError(
            f"{name}: {state.kind} after event {state.after}, seed {SEED}, said {state.said}"
        ) from error
    return there


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_state_is_the_old_one_or_the_new_one(
    name: str, runs: Runs, place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, events = runs.recorded(name, place)
    said, outcome = tuple(event.path for event in events if event.op == "mark"), WORKLOADS[name].outcome(place)
    found = list(states(place.root, before, events, SEED, DRAWS))
    strict = [state for state in found if state.kind == "strict"]
    rng = np.random.default_rng(SEED)
    chosen = (
        found if CAMPAIGN else [*strict[-12:], *(found[i] for i in rng.choice(len(found), min(12, len(found)), False))]
    )
    goes_on = set(rng.choice(len(chosen), min(FINISHED, len(chosen)), False).tolist())
    for number, state in enumerate(chosen):
        folder = tmp_path / f"state-{number}"
        there = checked(name, place, state, folder)
        if number in goes_on:
            answer = runs.ask(name, there, "act")
            assert "raised" not in answer, f"{state.kind} after event {state.after}: {answer['text']}"
            WORKLOADS[name].check(there, said)
            assert WORKLOADS[name].outcome(there) == outcome, f"{state.kind} after event {state.after}"
        shutil.rmtree(folder)
    with capsys.disabled():
        if CAMPAIGN:
            print(counted(f"power loss, {name}: {len(events)} events, {len(chosen)} states, 0 lost, 0 torn"))
