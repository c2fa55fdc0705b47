"""Settings from a YAML file that need not be a friend's: bounded in size, depth and what its anchors unfold to.

Reads a plain file of at most MAX_BYTES. Its events are counted before anything is built of it, so that neither anchors
("a billion laughs") nor nesting cost more than the file is long; tags that make objects are refused.
"""

import io
import os
import re
import stat
from pathlib import Path
from typing import Any

from retro_engine.errors import MissingInputError, UsageError, read_error

MAX_BYTES = 64 << 10  # a run's settings are 4 KiB
MAX_NODES = 5_000  # values and keys, those that anchors repeat included
MAX_DEPTH = 32
MAX_REFERENCES = 16  # ${...}: values that hold each other twice double with each of them
_LONG_NUMBER = re.compile(r"[-+]?[\dA-Fa-fXxOo_.:]{300,}")  # Python refuses to read, or to show, such whole numbers


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """The bytes of a plain file of at most `limit`. Raises MissingInputError for what is none: a pipe would wait for
    its writer, a device never ends. UsageError for a larger one.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        do = "retro config show > FILE writes one"
        raise MissingInputError(f"config file {path} does not exist", "", do) from error
    except OSError as error:
        raise read_error(error, path) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise MissingInputError(f"{path} is not a plain file", "pipes, devices and folders are not read")
        raw = b""
        while len(raw) <= limit and (piece := os.read(descriptor, limit + 1)):
            raw += piece
    except OSError as error:  # the system's names no file
        raise read_error(error, path) from error
    finally:
        os.close(descriptor)
    if len(raw) > limit:
        raise UsageError(f"{path} is larger than {limit:,} bytes", "settings are a few thousand", "name another file")
    return raw


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; anchors are resolved, interpolations (`${key}`) are not.

    Raises MissingInputError or UsageError.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    raw = read_bytes(path)
    try:
        text = raw.decode("utf-8-sig")
        _check_events(text, path)
        content = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    except (YAMLError, OmegaConfBaseException, OSError, ValueError) as error:  # OSError: OmegaConf's for a lone value
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"config file {path} is not YAML", str(error).splitlines()[0]) from error
    if not isinstance(content, dict):
        raise UsageError(f"config file {path} holds no settings", "expected a mapping of keys to values")
    return {str(key): value for key, value in content.items()}


def _check_events(text: str, path: Path) -> None:
    """Count what the document unfolds to, event by event. Raises UsageError at the first bound."""
    import yaml

    def require(holds: bool, why: str) -> None:
        if not holds:
            raise UsageError(f"config file {path} cannot be used", why, "write the settings out, one a line")

    sizes: dict[str, int] = {}  # anchor -> nodes below it
    unfinished: list[tuple[str | None, int]] = []  # anchors of open collections, nodes before them
    count = references = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            require(event.anchor in sizes, f"*{event.anchor} stands inside of what it names, or before it")
            count += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            references += event.value.count("${")
            require(not _LONG_NUMBER.fullmatch(event.value), f"{event.value[:20]}... is no number of a setting")
            if event.anchor is not None:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            unfinished.append((event.anchor, count))
            count += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = unfinished.pop()
            if anchor is not None:
                sizes[anchor] = count - before
        require(len(unfinished) <= MAX_DEPTH, f"it is nested more than {MAX_DEPTH} deep")
        require(count <= MAX_NODES, f"it unfolds to more than {MAX_NODES:,} values")
        require(references <= MAX_REFERENCES, f"it has more than {MAX_REFERENCES} references (${{...}})")
