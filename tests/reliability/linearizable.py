"""Whether a history of concurrent operations on one document can have happened one after the other.

The search of Wing and Gong (1993): whichever operation began before another one ended may come next; what was tried once,
the same operations done and the same text left, is not tried again.
"""

from collections.abc import Iterable
from dataclasses import dataclass

READ, WRITE, DELETE = "read", "write", "delete"


@dataclass(frozen=True)
class Operation:
    """What a client asked for between `begin` and `end`, by one clock.

    `value`: the text that was read (None: there is no document) or written; of a deletion, whether there was one: "yes",
    "no", or None where nobody has said so. `is_sure` False: it has met an error; if it has happened, then before `end`.
    """

    begin: float
    end: float
    kind: str
    value: str | None
    is_sure: bool = True


def _after(operation: Operation, text: str | None) -> tuple[bool, str | None]:
    """Whether it may happen to a document of this text, and the text after it."""
    if operation.kind == READ:
        return operation.value == text, text
    if operation.kind == WRITE:
        return True, operation.value
    return operation.value in (None, "no" if text is None else "yes"), None


def is_linearizable(history: Iterable[Operation], text: str | None = None) -> bool:
    """Of a document that has this text at first."""
    operations = sorted(history, key=lambda operation: operation.begin)
    everything = (1 << len(operations)) - 1
    stack, seen = [(0, text)], set[tuple[int, str | None]]()
    while stack:
        done, now = stack.pop()
        if done == everything:
            return True
        left = [place for place in range(len(operations)) if not done >> place & 1]
        first_end = min(operations[place].end for place in left)
        for place in left:
            operation = operations[place]
            if operation.begin > first_end:
                break
            may, then = _after(operation, now)
            states = [(done | 1 << place, then)] * may + [(done | 1 << place, now)] * (not operation.is_sure)
            stack += [state for state in states if state not in seen]
            seen.update(states)
    return False
