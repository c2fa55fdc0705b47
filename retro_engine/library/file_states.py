"""What was read of files that are followed, without what reads them: a process that only hears of it imports little."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from retro_engine.data import manifests
from retro_engine.data.inputs import SetAside

FILE_STATE = manifests.fields(
    {
        "size": manifests.COUNT,
        "modified": manifests.whole(-manifests.MOST << 16, manifests.MOST << 16),
        "sha256": manifests.FINGERPRINT,
        "documents": manifests.COUNT,
        "last_row": manifests.maybe(manifests.COUNT),
        "num_aside": manifests.COUNT,
        "aside": manifests.each(manifests.each(manifests.text(most=1 << 16))),
    }
)


@dataclass(frozen=True, kw_only=True)
class FileState:
    """What was read of a file."""

    size: int
    modified: int  # ns; 0: its content has to be compared
    sha256: str
    documents: int = 0
    last_row: int | None = None  # of a file of rows, the place of the last; None = all of it is one document
    num_aside: int = 0
    aside: list[list[str]] = field(default_factory=list)  # source, reason

    def ids(self, name: str) -> list[str]:
        """All that its documents can be called."""
        return [name] if self.last_row is None else [f"{name}:{row}" for row in range(1, self.last_row + 1)]


UNREAD = FileState(size=0, modified=0, sha256="0" * 64)  # it is to be read


@dataclass(kw_only=True)
class Synced:
    """What came of looking at the files."""

    num_files: int
    num_documents: int
    num_aside: int
    aside: list[SetAside]  # the first of each file
    num_read: int = 0  # files, this time
    num_removed: int = 0

    @classmethod
    def of(cls, states: Iterable[FileState], num_read: int = 0, num_removed: int = 0) -> "Synced":
        known = list(states)
        return cls(
            num_files=len(known),
            num_documents=sum(one.documents for one in known),
            num_aside=sum(one.num_aside for one in known),
            aside=[SetAside(source, reason) for one in known for source, reason in one.aside],
            num_read=num_read,
            num_removed=num_removed,
        )


def state_of(values: dict[str, Any], where: str) -> FileState:
    """A state as it was kept. Raises ValueError for what is none."""
    FILE_STATE(values, where)
    return FileState(**{name: values[name] for name in FileState.__dataclass_fields__})
