"""What a run's folder says of itself, each under a checksum: config.yaml, run.json, lines of JSON such as metrics.jsonl.

config.yaml opens with a comment that holds the SHA-256 of the rest; run.json has the SHA-256 of its other fields as
`fingerprint`; a line ends with its own CRC-32 as `crc32`. What an earlier version wrote has none and is read with a note.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from retro_engine.config import Config, to_yaml
from retro_engine.config.yaml_file import read_bytes
from retro_engine.data import files
from retro_engine.errors import RetroError, StoreError, read_error
from retro_engine.progress import note

SETTINGS_FILE, FACTS_FILE, METRICS_FILE = "config.yaml", "run.json", "metrics.jsonl"
MOST_LINES_BYTES = 1 << 30
MOST_EARLIER = 20  # commands that run.json keeps beside the last one
_OF_A_PART = (
    "command",
    "step",
    "version",
    "git",
    "torch",
    "machine",
    "threads",
)  # of run.json: may differ after a resume
_MARK = re.compile(rb"# SHA-256 of what follows: ([0-9a-f]{64})\n")
_LINE = re.compile(r'(\{.*), "crc32": "([0-9a-f]{8})"\}')

Say = Callable[[str], None]


def write_settings(run: Path, config: Config) -> None:
    text = to_yaml(config).encode()
    mark = f"# SHA-256 of what follows: {hashlib.sha256(text).hexdigest()}\n".encode()
    files.publish(run / SETTINGS_FILE, [mark, text])


def check_settings(path: Path, say: Say = note) -> None:
    """Compare a run's config.yaml with its checksum. Raises StoreError where it is not what was written."""
    raw = read_bytes(path)
    mark = _MARK.match(raw)
    if mark is None:
        say(f"{path} has no checksum, as earlier versions wrote it: it is read as it is")
    elif hashlib.sha256(raw[mark.end() :]).hexdigest() != mark[1].decode():
        raise StoreError(
            f"{path} is damaged or was edited",
            "its checksum does not match",
            "restore it; a setting is changed on the command line: key=value",
        )


def write_facts(run: Path, facts: dict[str, Any], say: Say = note) -> None:
    """run.json, with what the one before it said of the part of the run until now (`earlier`, of the last MOST_EARLIER)."""
    before = _facts_before(run)
    if before is not None:
        threads = before.get("threads"), facts.get("threads")
        if facts.get("step") and None not in threads and threads[0] != threads[1]:
            said = f"{threads[1]} threads from here on; before it was {threads[0]}"
            say(f"{said}: losses are not, to the last bit, those of a run that was never stopped")
        kept = {name: before[name] for name in _OF_A_PART if name in before}
        facts = {**facts, "earlier": [*before.get("earlier", ()), kept][-MOST_EARLIER:]}
    whole = {**facts, "fingerprint": files.fingerprint(facts)}
    files.publish(run / FACTS_FILE, [files.json_bytes(whole)])


def _facts_before(run: Path) -> dict[str, Any] | None:
    """run.json; None where there is none that can be read."""
    try:
        return read_facts(run, lambda text: None)
    except RetroError:
        return None


def read_facts(run: Path, say: Say = note) -> dict[str, Any]:
    """run.json. Raises MissingInputError where there is none, StoreError where it is not what was written."""
    path = run / FACTS_FILE
    facts = files.read_object(path, "name a whole run's folder")
    mark = facts.pop("fingerprint", None)
    if mark is None:
        say(f"{path} has no checksum, as earlier versions wrote it: it is read as it is")
    elif files.fingerprint(facts) != mark:
        raise StoreError(f"{path} is damaged or was edited", "its checksum does not match", "restore it")
    return facts


def checked_line(values: dict[str, Any]) -> str:
    """A line of JSON that ends with its checksum. `values` is not empty."""
    body = json.dumps(values)
    return f'{body[:-1]}, "crc32": "{zlib.crc32(body.encode()):08x}"}}\n'


def checked_lines(path: Path, say: Say = note) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each whole line, as it stands and as values. A damaged line is said by its number and passed over; so is the last
    one where a kill cut it short, without a word. Raises MissingInputError, or StoreError for what is no file of lines.
    """
    try:
        lines = files.read_bytes(path, MOST_LINES_BYTES).decode("utf-8", "replace").split("\n")
    except OSError as error:
        raise read_error(error, path, "name the run's folder") from error
    damaged = []
    for number, line in enumerate(lines[:-1], 1):
        marked = _LINE.fullmatch(line)
        body = f"{marked[1]}}}" if marked is not None else line
        is_right = marked is None or zlib.crc32(body.encode()) == int(marked[2], 16)
        values = _object(body) if is_right else None
        if values is None:
            damaged.append(str(number))
        else:
            yield f"{line}\n", values
    if damaged:
        say(f"{path} is damaged in line {', '.join(damaged[:8])}{' ...' * (len(damaged) > 8)}: passed over")


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
