"""A program that changes a library until it is killed, and says before and after each change what it does.

Reads lines `FOLDER SEED` from standard input; for each it forks a child, so that a kill costs no new start, prints
`{"pid": …}` and, when the child has ended, `{"ended": true}`.
"""

import json
import os
import sys
from typing import Any

import numpy as np
from helpers import WORDS

from retro_engine.data.corpus import Document
from retro_engine.library.library import Library
from retro_engine.library.search import lexical
from retro_engine.library.segments import Delta, View, merge_views
from retro_engine.retrieval.analyzer import Analyzer


def say(**event: Any) -> None:
    os.write(1, json.dumps(event).encode() + b"\n")


def change_until_killed(folder: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    with Library(folder, delta_chunks=16) as library:
        say(opened=library.version)
        while True:
            ids = [f"d{number}" for number in rng.choice(40, int(rng.integers(1, 4)), replace=False)]
            if rng.random() < 0.3:
                say(begin={name: None for name in ids})
                library.delete(ids)
            else:
                text = " ".join(rng.choice(WORDS, int(rng.integers(1, 60))))
                texts = {name: f"{text} {name} {rng.integers(1 << 30)}" for name in ids}
                say(begin=texts)
                library.add([Document(name, "", text) for name, text in texts.items()])
            say(end=library.version)


def warm_up() -> None:
    """Import and compile what every child uses; tokenizers is left alone, its threads do not survive a fork."""
    import faiss  # noqa: F401

    delta = Delta(None)
    delta.append([1], [1], Analyzer().terms(["a river of words"]), None)
    merge_views([View.whole(delta)])
    lexical((View.whole(delta),), Analyzer().query("river"), 1)


if __name__ == "__main__":
    warm_up()
    for line in sys.stdin:
        folder, seed = line.rsplit(" ", 1)
        pid = os.fork()
        if pid == 0:
            change_until_killed(folder, int(seed))
        say(pid=pid)
        os.waitpid(pid, 0)
        say(ended=True)
