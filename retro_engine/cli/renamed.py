"""Flags that had another name: the old spelling works in this release, and says the new one.

A new spelling may hold words that go before the value.
"""

from retro_engine.errors import UsageError
from retro_engine.progress import note

_BUILDING = {"--index": "--faiss", "--precision": "--dtype"}
_NEIGHBORS = {**_BUILDING, "--weights": "--source-weights", "--database": "--stores"}
FLAGS = {
    "index": _BUILDING,
    "embed": {"--precision": "--dtype"},
    "neighbors": _NEIGHBORS,
    "build": _NEIGHBORS,
    "eval": {"--index": "--stores", "--precision": "--dtype"},
    "generate": {"--index": "--stores", "--mode": "--retriever", "--fusion": "--source-weights", "--weights": "--dtype"},
    "explain": {"--index": "--stores"},
    "docs query": {"--mode": "--retriever", "--weights": "--fusion", "--store": "--stores",
                   "--store-weight": "--source-weights 1"},
    "serve": {"--index": "--stores", "--mode": "--retriever", "--weights": "--source-weights"},
}  # fmt: skip
VALUES = {  # of --dtype
    "eval": {"32": "fp32", "bf16-mixed": "bf16"},
    "import": {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"},
}


def with_new_names(words: list[str]) -> list[str]:
    """A command line with today's flags. Raises UsageError where a flag is given in its old and its new spelling."""
    command = next((name for name in (" ".join(words[:2]), *words[:1]) if name in FLAGS | VALUES), "")
    flags, values = FLAGS.get(command, {}), VALUES.get(command, {})
    end = words.index("--") if "--" in words else len(words)
    apart = [part for word in words[:end] for part in _apart(word, {*flags, "--dtype"})]
    out: list[str] = []
    for word in apart:
        new = flags.get(word) or (values.get(word) if out[-1:] == ["--dtype"] else None)
        if new is None:
            out.append(word)
            continue
        spelling, *before = new.split()
        if word in flags and spelling in apart:
            raise UsageError(f"{word} is {spelling} now", f"{spelling} is given too", f"name {spelling} once")
        note(f"{word} is {new} now; the old spelling goes with the next release")
        out += [spelling, *before]
    return out + words[end:]


def _apart(word: str, flags: set[str]) -> list[str]:
    """--flag=value of these flags as two words."""
    flag, equals, value = word.partition("=")
    return [flag, value] if equals and flag in flags else [word]
