"""What is said of settings that are none, of values that are of another type, and of the nearest name; reads fields alone."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from retro_engine.config.fields import Config
from retro_engine.config.nemo_keys import ELSEWHERE, Refusal
from retro_engine.errors import UsageError

NEAR = 0.8  # of what two last names share: a hint that is not near is worse than none
SHORT = 5  # letters of a last name whose near ones count in its own section alone
MOST_NAMED = 100  # of the settings that one error names
_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "None": "null",
          "list[int]": "a list of whole numbers", "list[float]": "a list of numbers", "list[str]": "a list of texts"}  # fmt: skip


def require_settings(keys: Sequence[str], known: dict[str, Any], refused: Sequence[Refusal]) -> None:
    """Raise one UsageError that names all of `keys` that are no settings, and all that are `refused`."""
    wrong = [*refused, *(_unknown(key, known) for key in _first(key for key in keys if key not in known))]
    if len(wrong) == 1:
        raise UsageError(*wrong[0])
    if wrong:
        absent = sum(key not in known for key in dict.fromkeys(keys))
        more = absent + len(refused) - len(wrong)
        lines = [f"{what}: {'; '.join(filter(None, (why, do)))}" for what, why, do in wrong]
        lines += [f"and {more} more"] if more else []
        raise UsageError(
            f"{len(wrong) + more} settings cannot be used", "\n  ".join(lines), "all keys: retro config keys"
        )


def _first(keys: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(keys))[:MOST_NAMED]


def _unknown(key: str, known: dict[str, Any]) -> Refusal:
    if any(name.startswith(f"{key}.") for name in known):
        return f"{key} takes no value", f"{key} is a section", f"retro config keys {key}"
    section = key.rsplit(".", 1)[0]
    where = section if any(name.startswith(f"{section}.") for name in known) else ""
    return f"{key:.200} is not a setting", nearest_key(key, known), f"all keys: retro config keys {where}".rstrip()


def nearest_key(key: str, known: dict[str, Any]) -> str:
    """`did you mean KEY (type, default X)?` by the last name, which others may have another for, or what is the key here."""
    section, _, last = key.rpartition(".")
    theirs = last.lstrip("-").replace("-", "_")
    if theirs in ELSEWHERE:
        return f"it is {_described(ELSEWHERE[theirs], known)} here"
    names = _named(theirs, known)
    if len(theirs) <= SHORT and not any(name.rpartition(".")[2] == theirs for name in names):
        names = [name for name in names if name.rpartition(".")[0] == section]
    if not names:
        names = [ELSEWHERE[name] for name in difflib.get_close_matches(theirs, ELSEWHERE, n=1, cutoff=NEAR)]
    if not names and not section:  # trainer_max_steps
        spelled = {name.replace(".", "_"): name for name in known}
        names = [spelled[name] for name in difflib.get_close_matches(key, spelled, n=1, cutoff=0.9)]
    if not names:
        return "no setting has a similar name"
    likeliest = max(names, key=lambda name: difflib.SequenceMatcher(None, key, name).ratio())
    return f"did you mean {_described(likeliest, known)}?"


def _named(last: str, known: dict[str, Any]) -> list[str]:
    """The settings whose last name is the nearest to `last`, if one is near."""
    lasts = {name.rpartition(".")[2] for name in known}
    close = difflib.get_close_matches(last, lasts, n=1, cutoff=NEAR)
    return [name for name in known if name.rpartition(".")[2] in close]


def _described(key: str, known: dict[str, Any]) -> str:
    return f"{key} ({kind_of(key)}, default {known[key]})"


def kind_of(key: str) -> str:
    """The type of a setting, as it is annotated."""
    kind: Any = Config
    for part in key.split("."):
        kind = next(item.type for item in fields(kind) if item.name == part)
    return kind.__name__ if isinstance(kind, type) else str(kind)


def wrong_type(key: str, value: Any) -> UsageError:
    """The error for a value of another type than the setting's."""
    kind = kind_of(key)
    words = " or ".join(_WORDS.get(one, one) for one in kind.split(" | "))
    is_none = isinstance(value, str) and value.lower() == "none" and "None" in kind
    do = f"{key}=null (YAML's word for None)" if is_none else f"retro config keys {key}"
    return UsageError(f"{key}={value!r:.200} does not fit", f"expected {kind}: {words}", do)
