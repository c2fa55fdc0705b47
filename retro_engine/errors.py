"""Every error a user can cause, in three lines: what was found, why it is wrong, what to run.

The exit codes of the command line hang on the class: 2 usage or config, 3 input missing, corrupt or
incompatible, 4 optional dependency missing, 5 out of disk, memory or device, 6 quality gate failed.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path


class RetroError(Exception):
    """Base of the errors below. `what` is one line; `why` and `do` may be empty."""

    exit_code = 1

    def __init__(self, what: str, why: str = "", do: str = ""):
        # names of files may hold bytes that are not UTF-8: what is said can be printed and sent anywhere
        what, why, do = (part.encode("utf-8", "backslashreplace").decode() for part in (what, why, do))
        super().__init__(what, why, do)
        self.what, self.why, self.do = what, why, do

    def __str__(self) -> str:
        return "\n  ".join(line for line in (self.what, self.why, self.do) if line)


class UsageError(RetroError, ValueError):
    """A flag, a setting or an argument that cannot be used."""

    exit_code = 2


class InUseError(UsageError):
    """A folder whose lock another process has: it may be tried again."""


class StoreError(RetroError, ValueError):
    """A store, table, index, tokenizer or checkpoint that is corrupt, foreign, newer or does not fit."""

    exit_code = 3


class MissingInputError(RetroError, FileNotFoundError):
    """A file or folder that is not there, cannot be read, or holds nothing usable."""

    exit_code = 3

    def __str__(self) -> str:
        return RetroError.__str__(self)


class MissingExtraError(RetroError, ImportError):
    """An optional dependency that is not installed."""

    exit_code = 4


@contextlib.contextmanager
def extra(name: str, what: str, why: str = "it is not installed") -> Iterator[None]:
    """Around the import of what the extra `name` installs. Raises MissingExtraError."""
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(what, why, f"pip install 'retro-engine[{name}]'") from error


class OutOfResourceError(RetroError, OSError):
    """No space on the disk, no memory, or no such device."""

    exit_code = 5

    def __str__(self) -> str:
        return RetroError.__str__(self)


class UnavailableError(RetroError):
    """Another process that has what was asked for does not answer now."""

    exit_code = 5


class StoppedError(RetroError):
    """A signal ended the work."""

    def __init__(self, exit_code: int, why: str, do: str):
        super().__init__("stopped", why, do)
        self.exit_code = exit_code


class GateError(RetroError):
    """A quality gate that was asked for and not met."""

    exit_code = 6


# What the system meets, whatever is asked of it: what helps. Other errors are of the path, and another one helps.
REMEDIES = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some space and run the same command again",
    errno.EMFILE: "let the process open more files (ulimit -n 4096) and run the same command again",
    errno.ENFILE: "close other programs, which hold files open, and run the same command again",
    errno.ENOMEM: "free some memory and run the same command again",
    errno.EIO: "look at the disk (dmesg) and run the same command again",
    errno.ENXIO: "look at the disk (dmesg) and run the same command again",
    errno.ENODEV: "look at the disk (dmesg) and run the same command again",
    errno.ESTALE: "look at the server of the disk and run the same command again",
    errno.ETIMEDOUT: "look at the server of the disk and run the same command again",
    errno.EINTR: "run the same command again",
    errno.EAGAIN: "run the same command again",
}
FULL = (errno.ENOSPC, errno.EDQUOT)


def read_error(error: OSError, path: object, do: str = "") -> RetroError:
    """The typed error for a file that could not be opened or read: what its disk or this process lacks is not its fault."""
    if isinstance(error, RetroError):
        return error
    why = error.strerror or str(error)
    if error.errno in REMEDIES:
        return OutOfResourceError(f"{path} cannot be read", why, REMEDIES[error.errno])
    return MissingInputError(f"{path} cannot be read", why, do)


def write_error(error: OSError, path: object, size: int = 0) -> RetroError:
    """The typed error for a failed write of `size` bytes (0 = nobody knows) to `path`."""
    if isinstance(error, RetroError):
        return error
    why = error.strerror or str(error)
    if error.errno in FULL:
        need = f"{size:,} bytes were needed" if size else "the write did not fit"
        return OutOfResourceError(f"no space left for {path}", need, REMEDIES[error.errno])
    if error.errno in REMEDIES:
        return OutOfResourceError(f"{path} cannot be written", why, REMEDIES[error.errno])
    return UsageError(f"{path} cannot be written", why, "let it be written, or choose another folder")


def system_error(error: BaseException) -> OSError | None:
    """What the system said, where a library's error has it in its text alone, or is Python's own for no memory (what a library
    in Rust that cannot map a file raises, without a name); None where it has not.
    """
    text = str(error).strip()
    numbers = [number for number in REMEDIES if os.strerror(number).lower() in text.lower()]
    if not numbers and isinstance(error, MemoryError):
        return OSError(errno.ENOMEM, text or os.strerror(errno.ENOMEM))
    return OSError(numbers[0], text.splitlines()[-1]) if numbers else None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what is done on a disk for `path`: what the system refuses is raised as `write_error`."""
    try:
        yield
    except OSError as error:
        raise write_error(error, path) from error


def typed(error: BaseException) -> RetroError | None:
    """The typed form of what the system and the libraries raise for a full disk or memory, and for names; else None."""
    if isinstance(error, RetroError):
        return error
    if isinstance(error, OSError) and error.errno in FULL:
        return write_error(error, error.filename or "a file")
    if isinstance(error, OSError) and error.errno in REMEDIES and not isinstance(error, ConnectionError | TimeoutError):
        what = f"{error.filename} cannot be used" if error.filename else "the system refused"
        return OutOfResourceError(what, error.strerror or "", REMEDIES[error.errno])
    absent = error.name if isinstance(error, ModuleNotFoundError) else None
    if absent and not absent.startswith(("retro_engine", "retro_kernels")):
        why = "retro_engine needs it; retro_kernels alone needs torch and nothing else"
        return MissingExtraError(f"{absent} is not installed", why, "pip install . (without --no-deps)")
    if isinstance(error, UnicodeEncodeError) and "\udc80" <= error.object[error.start] <= "\udcff":  # a byte of a path
        name = error.object[:200].encode("utf-8", "backslashreplace").decode()
        return UsageError(f"{name} cannot be opened", "its name is not UTF-8", "rename it, or a folder that it is in")
    is_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    said = str(error).lower() if isinstance(error, RuntimeError) else ""
    if is_memory or "can't allocate memory" in said or "cannot allocate memory" in said:
        return OutOfResourceError(
            "out of memory", str(error).splitlines()[0] if str(error) else "", "use a smaller batch or model"
        )
    return None


def nearest(name: str, names: list[str]) -> str:
    """`did you mean X?` for the closest of `names`, or an empty string."""
    import difflib

    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else ""


def who_speaks() -> str:
    """Before an error, of several processes that torchrun started: each says its own, for what one meets on another node nobody else knows."""
    world = os.environ.get("WORLD_SIZE", "1")
    return "" if world == "1" else f"process {os.environ.get('RANK', '0')} of {world}: "
