"""infini-gram (PyPI) beside our n-gram memory: the same tokens, indexed and asked by its own code, in a process of its own where it
indexes. It answers with the longest suffix alone; ours with all of them.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from retro_engine.errors import StoreError

NAME = "infini-gram"
SEPARATOR = np.array([0xFFFF], "<u2")  # that it wants before a document
MEMORY_GIB, FILES = 2, 1024  # that it may take


def is_installed() -> bool:
    return importlib.util.find_spec("infini_gram") is not None and importlib.util.find_spec("tqdm") is not None


class InfiniGram:
    """Its index of tokens [n] u2 at a folder, opened."""

    def __init__(self, tokens: np.ndarray, folder: Path, eod_id: int):
        from infini_gram.engine import InfiniGramEngine

        folder.mkdir(parents=True)
        text = np.concatenate((SEPARATOR, tokens.astype("<u2")))
        (folder / "tokenized.0").write_bytes(text.tobytes())
        (folder / "offset.0").write_bytes(np.zeros(1, "<u8").tobytes())  # one document: so are ours, end by end
        words = (
            f"--data_dir {folder} --save_dir {folder} --token_dtype u16 --cpus 1 --mem {MEMORY_GIB} --ulimit {FILES}"
        )
        done = subprocess.run(
            [sys.executable, "-m", "infini_gram.indexing", *words.split()], capture_output=True, text=True, cwd=folder
        )
        if done.returncode or not (folder / "table.0").is_file():
            raise StoreError("infini-gram's index was not made", done.stderr.strip()[-300:], "bench without it")
        self.num_bytes = sum((folder / name).stat().st_size for name in ("tokenized.0", "table.0", "offset.0"))
        self._engine: Any = InfiniGramEngine(str(folder), eos_token_id=eod_id)

    def count(self, words: list[int]) -> int:
        return int(self._engine.count(words)["count"])

    def look_up(self, context: list[int], token: int) -> float:
        """The token's share of what came after the longest suffix of a context that occurs."""
        return float(self._engine.infgram_prob(context, token)["prob"])
