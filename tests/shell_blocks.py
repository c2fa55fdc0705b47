"""The shell blocks of README and docs, run by bash where every program only writes down what it was given.

A block is ```sh; a comment in the line above it says what a test does with it: `<!-- run -->` (really, by test_readme.py or test_tutorials.py),
`<!-- not run: WHY -->` (the README's other blocks are).
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch.distributed.run

from retro_engine import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# With a PATH to nowhere every name that is no builtin comes here; fd 3 gets its words, each ended by NUL, and \1 behind.
RECORDING = """set -eo pipefail
command_not_found_handle() { printf '%s\\0' "$@" $'\\1' >&3; }
cd() { command_not_found_handle cd "$@"; }
mkdir() { /bin/mkdir "$@"; }
"""


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    text: str
    marker: str  # of the comment above it, "" without one

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path, language: str = "sh") -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(rf"(?:^<!-- ([^\n]*) -->\n)?^```{language}\n(.*?)^```", text, re.M | re.S)
    return [Block(page, text.count("\n", 0, m.start(2)) + 1, m[2], m[1] or "") for m in found]


def commands(block: Block, place: Path) -> list[list[str]]:
    """What bash calls for `block`, each as the words that the program would get. What it redirects lies in `place`."""
    read, write = os.pipe()
    bash = shutil.which("bash")
    assert bash is not None
    script = RECORDING.replace(">&3", f">&{write}") + block.text
    done = subprocess.run(
        [bash, "-c", script],
        cwd=place,
        env={"PATH": str(place / "nothing")},
        pass_fds=[write],
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    os.close(write)
    with os.fdopen(read, "rb") as file:  # a block's words are far below what a pipe holds
        words = file.read().decode().split("\0")
    assert done.returncode == 0 and not done.stderr, f"{block}: {done.stderr.decode()}"
    found: list[list[str]] = [[]]
    for word in words[:-1]:
        if word != "\1":
            found[-1].append(word)
        else:
            found.append([])
    return [command for command in found if command]


def run(words: list[str]) -> int:
    """A command as its program would run it; `retro` and torchrun in this process, which saves the seconds that torch takes to
    load.
    """
    if words[0] == "retro":
        return cli.main(words[1:])
    if words[0] == "torchrun":
        torch.distributed.run.main(words[1:])
        return 0
    return subprocess.run(
        words, env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    ).returncode
