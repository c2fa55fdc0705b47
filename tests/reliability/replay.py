"""What a power cut may leave of a folder: a recording of its calls (calls.c) played onto a model of a disk.

After each event there are these states, each once:
- strict: the names that an fsync of their folder made durable, with the bytes that an fsync of the file did: what POSIX promises;
- ordered: all names up to there, as a journalling file system has them, and the bytes that were synced;
- some: of the names that no fsync has made durable yet, any; renames and removals are lost or come in another order;
- torn: before a file's sync ends, sectors and pages of its old and its new bytes, cut anywhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import numpy as np

Tree = dict[str, bytes | None]  # path from the root -> content; None = a folder
PAGES = (512, 4096)  # what a disk writes whole


@dataclass(frozen=True)
class Event:
    op: str
    inode: int
    path: str
    second: str
    data: bytes


@dataclass(frozen=True)
class State:
    """What is left when power goes `after` so many events, when `said` had been acknowledged."""

    kind: str
    after: int
    said: tuple[str, ...]
    tree: Tree


def read_log(path: Path) -> list[Event]:
    raw, at, events = path.read_bytes(), 0, []
    while at < len(raw):
        end = raw.index(b"\n", at)
        op, inode, name, second, size = raw[at:end].decode().split("\t")
        at = end + 1 + int(size)
        events.append(Event(op, int(inode), name, second, raw[end + 1 : at]))
    return events


def tree_of(folder: Path) -> Tree:
    """What lies in a folder now."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in paths}


def write_tree(tree: Tree, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, content in tree.items():
        path = folder / name
        if content is None:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return folder


@dataclass
class _File:
    durable: bytes = b""
    is_cut: bool = False  # emptied since its last sync


@dataclass
class _Folder:
    durable: dict[str, int] = field(default_factory=dict)
    now: dict[str, int] = field(default_factory=dict)
    pending: list[tuple[str | None, str, int]] = field(default_factory=list)  # name that goes, name that comes, object

    def change(self, gone: str | None, come: str, number: int) -> None:
        self.pending.append((gone, come, number))
        _apply(self.now, gone, come, number)


def _apply(names: dict[str, int], gone: str | None, come: str, number: int) -> None:
    if gone is not None:
        names.pop(gone, None)
    if come:
        names[come] = number


class Disk:
    """Files and folders as they are, and as they are durable."""

    def __init__(self, root: Path, tree: Tree):
        """`tree`, what lies under `root` at first, is durable."""
        self.root = PurePath(root)
        self.objects: list[_File | _Folder] = [_Folder()]
        self._numbers: dict[int, int] = {}  # inode -> object
        for name, content in tree.items():
            parent, last = self._parent(str(self.root / name))
            parent.now[last] = parent.durable[last] = self._new(_Folder() if content is None else _File(content))

    def _new(self, what: _File | _Folder, inode: int = 0) -> int:
        self.objects.append(what)
        if inode:
            self._numbers[inode] = len(self.objects) - 1
        return len(self.objects) - 1

    def _parent(self, path: str) -> tuple[_Folder, str]:
        found: _File | _Folder = self.objects[0]
        *parts, last = PurePath(path).relative_to(self.root).parts
        for part in parts:
            assert isinstance(found, _Folder), path
            found = self.objects[found.now[part]]
        assert isinstance(found, _Folder), path
        return found, last

    def _number(self, path: str, inode: int) -> int:
        """The object at a path; one that nobody was seen to make is made."""
        parent, last = self._parent(path)
        if last not in parent.now:
            parent.change(None, last, self._numbers.get(inode) or self._new(_File(), inode))
        return parent.now[last]

    def file(self, event: Event) -> _File:
        number = self._numbers.get(event.inode)
        found = self.objects[self._number(event.path, event.inode) if number is None else number]
        assert isinstance(found, _File), event.path
        return found

    def play(self, event: Event) -> None:
        path, second = event.path, event.second
        if event.op in ("create", "mkdir"):
            parent, last = self._parent(path)
            parent.change(None, last, self._new(_File() if event.op == "create" else _Folder(), event.inode))
        elif event.op == "unlink":
            parent, last = self._parent(path)
            parent.change(last, "", 0)
        elif event.op in ("rename", "link"):
            (parent, last), (to, name) = self._parent(path), self._parent(second)
            number, gone = self._number(path, 0), last if event.op == "rename" else None
            if to is parent:
                to.change(gone, name, number)
            else:
                to.change(None, name, number)
                parent.change(gone, "", 0)
        elif event.op == "cut":
            self.file(event).is_cut = True
        elif event.op == "sync":
            found = self.file(event)
            found.durable, found.is_cut = event.data, False
        elif event.op == "syncdir":
            folder: _File | _Folder = self.objects[0]
            if PurePath(path) != self.root:
                folder = self.objects[self._number(path, 0)]
            assert isinstance(folder, _Folder), path
            folder.durable, folder.pending = dict(folder.now), []

    def tree(self, kind: str, rng: np.random.Generator, torn: tuple[_File, bytes] | None = None) -> Tree:
        out: Tree = {}

        def walk(folder: _Folder, prefix: str) -> None:
            names = dict(folder.durable if kind != "ordered" else folder.now)
            if kind == "some":
                for place in rng.permutation(len(folder.pending)):
                    if rng.random() < 0.5:
                        _apply(names, *folder.pending[place])
            for name, number in names.items():
                found = self.objects[number]
                if isinstance(found, _Folder):
                    out[prefix + name] = None
                    walk(found, f"{prefix}{name}/")
                elif torn is not None and found is torn[0]:
                    out[prefix + name] = torn[1]
                else:
                    out[prefix + name] = b"" if found.is_cut and kind != "strict" else found.durable

        root = self.objects[0]
        assert isinstance(root, _Folder)
        walk(root, "")
        return out


def tear(old: bytes, new: bytes, rng: np.random.Generator) -> bytes:
    """Some pages of the new bytes over the old ones, cut anywhere between the two lengths."""
    page = int(rng.choice(PAGES))
    longest, shortest = max(len(old), len(new)), min(len(old), len(new))
    out = bytearray(old.ljust(longest, b"\0"))
    for start in range(0, len(new), page):
        if rng.random() < 0.5:
            out[start : start + page] = new[start : start + page].ljust(min(page, longest - start), b"\0")
    return bytes(out[: int(rng.integers(shortest, longest + 1))])


def states(root: Path, before: Tree, events: list[Event], seed: int, draws: int) -> Iterator[State]:
    """Every state once; `draws` of each of those that are drawn."""
    disk, seen, said = Disk(root, before), set[frozenset[object]](), list[str]()
    for after, event in enumerate(events):
        rng = np.random.default_rng((seed, after))
        found: list[tuple[str, Tree]] = []
        if event.op == "sync":
            file = disk.file(event)
            for _ in range(draws):
                torn = file, tear(file.durable, event.data, rng)
                found += [(f"torn, {kind}", disk.tree(kind, rng, torn)) for kind in ("strict", "ordered")]
        if event.op == "mark":
            said.append(event.path)
        else:
            disk.play(event)
        found += [(kind, disk.tree(kind, rng)) for kind in ("strict", "ordered", *["some"] * draws)]
        for kind, tree in found:
            mark = frozenset((*tree.items(), len(said)))
            if mark not in seen:
                seen.add(mark)
                yield State(kind, after, tuple(said), tree)
