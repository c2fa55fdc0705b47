"""The n-th call fails: a typed error with a remedy, what was published is untouched, the same command then finishes.

Some n of each workload here; all with RETRO_CAMPAIGN=1, which prints what is counted.
"""

import errno
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from reliability.replay import tree_of
from reliability.runs import CAMPAIGN, FAULTS, SEED, SHORT, Runs, counted
from reliability.workloads import WORKLOADS, Place

FEW = 1  # of each fault
IN_SUITE = ("create", "add", "merge", "import", "reset", "prepare", "build")  # the others compute for seconds a run
MAY = {3, 5}  # exit codes: what cannot be read, or the system is out of something


def named(number: int) -> str:
    return "a short write" if number == SHORT else errno.errorcode[number]


@pytest.mark.parametrize("name", WORKLOADS if CAMPAIGN else IN_SUITE)
def test_every_call_may_fail(
    name: str, runs: Runs, place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = replace(place, root=tmp_path / "begun")
    answer = runs.ask(name, begun, "begin")
    assert not answer, answer["text"]
    corpus = tmp_path / "corpus.jsonl"
    num_runs = num_raised = 0
    left = set[int]()  # hashes of what failures have left, each looked at once
    rng = np.random.default_rng(SEED)
    for number, kinds in FAULTS.items():
        there = replace(place, root=tmp_path / "counted")
        shutil.copytree(begun.root, there.root)
        count = runs.ask(name, there, "act", fail=(0, number, kinds))["count"]
        outcome = WORKLOADS[name].outcome(there)
        shutil.rmtree(there.root)
        chosen = range(1, count + 1) if CAMPAIGN else sorted(rng.choice(count, min(FEW, count), False) + 1)
        for nth in map(int, chosen):
            where = f"{name}: {named(number)} at call {nth} of {count}"
            there = replace(place, root=tmp_path / "there")
            shutil.copytree(begun.root, there.root)
            answer = runs.ask(name, there, "act", fail=(nth, number, kinds))
            num_runs += 1
            if "raised" in answer:
                num_raised += 1
                assert answer["is_typed"], f"{where}: {answer.get('trace', answer['text'])}"
                assert answer["exit_code"] in MAY, f"{where}: {answer['trace']}"
                assert "damaged" not in answer["text"], f"{where}: {answer['text']}"
                assert answer["has_remedy"], f"{where}: {answer['text']}"
                assert str(there.root) in answer["text"], f"{where}: {answer['text']}"
            mark = hash(frozenset((*tree_of(there.root).items(), len(answer.get("said", ())))))
            if mark not in left:
                left.add(mark)
                WORKLOADS[name].check(there, tuple(answer.get("said", ())))
                again = runs.ask(name, there, "act")
                assert "raised" not in again, f"{where}, then again: {again['trace']}"
                assert WORKLOADS[name].outcome(there) == outcome, where
            shutil.rmtree(there.root)
    assert num_raised or name == "reset"
    assert corpus.exists() or name != "prepare"
    with capsys.disabled():
        if CAMPAIGN:
            print(
                counted(
                    f"failing calls, {name}: {num_runs} runs, {num_raised} typed errors, 0 untyped; {len(left)} different folders left, 0 damaged"
                )
            )
