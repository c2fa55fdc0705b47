"""The checker of histories: what it lets through and what not, and against trying every order."""

import itertools
import random

import pytest
from reliability.linearizable import DELETE, READ, WRITE, Operation, is_linearizable

GOOD = {
    "one after the other": [(0, 1, WRITE, "a"), (2, 3, READ, "a"), (4, 5, DELETE, "yes"), (6, 7, READ, None)],
    "a read beside a write sees either": [(0, 9, WRITE, "a"), (1, 2, READ, None), (3, 4, READ, "a")],
    "an error that has happened": [(0, 1, WRITE, "a", False), (2, 3, READ, "a")],
    "an error that has not": [(0, 1, WRITE, "a", False), (2, 3, READ, None)],
    "two writes at once, in either order": [(0, 5, WRITE, "a"), (0, 5, WRITE, "b"), (6, 7, READ, "a")],
}
BAD = {
    "a write that is lost": [(0, 1, WRITE, "a"), (2, 3, READ, None)],
    "a read of what was replaced": [(0, 1, WRITE, "a"), (2, 3, WRITE, "b"), (4, 5, READ, "a")],
    "back in time": [(0, 9, WRITE, "a"), (1, 2, READ, "a"), (3, 4, READ, None)],
    "a text that nobody wrote": [(0, 1, WRITE, "a"), (0, 1, READ, "x")],
    "an error that happened too late": [(0, 1, WRITE, "a", False), (2, 3, READ, None), (4, 5, READ, "a")],
    "one deletion told twice": [(0, 1, WRITE, "a"), (2, 5, DELETE, "yes"), (2, 5, DELETE, "yes")],
}


@pytest.mark.parametrize("name", [*GOOD, *BAD])
def test_histories(name: str) -> None:
    history = [Operation(*row) for row in {**GOOD, **BAD}[name]]
    assert is_linearizable(history) == (name in GOOD)


def in_some_order(history: list[Operation]) -> bool:
    sure = [operation for operation in history if operation.is_sure]
    unsure = [operation for operation in history if not operation.is_sure]
    for count in range(len(unsure) + 1):
        for some in itertools.combinations(unsure, count):
            for order in itertools.permutations([*sure, *some]):
                if _is_possible(order):
                    return True
    return False


def _is_possible(order: tuple[Operation, ...]) -> bool:
    text: str | None = None
    for place, operation in enumerate(order):
        if any(later.end < operation.begin for later in order[place + 1 :]):
            return False
        if operation.kind == READ and operation.value != text:
            return False
        if operation.kind == DELETE and operation.value != ("no" if text is None else "yes"):
            return False
        text = text if operation.kind == READ else operation.value if operation.kind == WRITE else None
    return True


def test_against_every_order() -> None:
    rng = random.Random(0)
    found = []
    for _ in range(300):
        history = []
        for _ in range(rng.randint(1, 5)):
            begin, kind = rng.randrange(8), rng.choice([READ, READ, WRITE, DELETE])
            value = rng.choice(["yes", "no"] if kind == DELETE else ["a", "b"] if kind == WRITE else ["a", "b", None])
            history.append(Operation(begin, begin + rng.randrange(1, 5), kind, value, rng.random() < 0.8))
        found.append(is_linearizable(history))
        assert found[-1] == in_some_order(history), history
    assert 50 < sum(found) < 250
