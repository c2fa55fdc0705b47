"""Every error a user can cause, in three lines: what was found, why it is wrong, what to run.

The exit codes of the command line hang on the class: 2 usage or config, 3 input missing, corrupt or
incompatible, 4 optional dependency missing, 5 out of disk, memory or device, 6 quality gate failed.
"""

import contextlib
import errno
from collections.abc import Iterator


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


def typed(error: BaseException) -> RetroError | None:
    """The typed form of what the system and the libraries raise for a full disk or memory, and for names; else None."""
    if isinstance(error, RetroError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutOfResourceError(
            f"no space left for {error.filename or 'a file'}", "", "free some space and run it again"
        )
    if isinstance(error, UnicodeEncodeError) and "\udc80" <= error.object[error.start] <= "\udcff":  # a byte of a path
        name = error.object[:200].encode("utf-8", "backslashreplace").decode()
        return UsageError(f"{name} cannot be opened", "its name is not UTF-8", "rename it, or a folder that it is in")
    is_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if is_memory or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error)):
        return OutOfResourceError(
            "out of memory", str(error).splitlines()[0] if str(error) else "", "use a smaller batch or model"
        )
    return None


def nearest(name: str, names: list[str]) -> str:
    """`did you mean X?` for the closest of `names`, or an empty string."""
    import difflib

    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else ""
