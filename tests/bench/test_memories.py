"""What a memory of tokens must reach, on a small text and on figures that are made up."""

from pathlib import Path

import numpy as np
import pytest

from retro_engine.bench import infini_gram, memories
from retro_engine.bench.frame import Options
from retro_engine.data.store import Store
from retro_engine.errors import UsageError
from retro_engine.memory.ngram_memory import build_ngram_memory, document_tokens
from retro_engine.memory.suffix_order import LONGEST


def test_a_text_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memories, "FACTS", 40)
    for name, few in (("TOKENS", 300), ("RIVAL_TOKENS", 20), ("ROUNDS", 2)):
        monkeypatch.setattr(memories, name, few)
    measured = memories.run(Options())
    rival = ["infini-gram"] if infini_gram.is_installed() else []
    assert [row.implementation for row in measured.rows] == ["ours", "ours, some left out", *rival, "ours"]
    assert measured.facts["looked_up"] >= 300 and measured.facts["bytes_per_token"] > 6
    assert [target.value is not None for target in measured.targets] == [True, True]
    with pytest.raises(UsageError, match="--text with --run"):
        memories.run(Options(text="text", run="run"))


def test_targets_of_a_run() -> None:
    gains = {"model": {"gain": 0.05, "low": 0.01, "high": 0.09}, "memory": {"gain": 0.2, "low": 0.1, "high": 0.3}}
    facts = {"lookups_per_s": 2e5, "bytes_per_token": 6.0, "gains": gains}
    facts |= {"time": {"generate": 1.4, "evaluate": 1.1}, "flops": 1.01}
    assert [target.holds for target in memories.targets(facts)] == [True, True, True, False, True, True, False, True]


def test_infini_gram_counts_the_same(small_store: Store, tmp_path: Path) -> None:
    pytest.importorskip("infini_gram", reason="infini-gram is not installed")
    pytest.importorskip("tqdm", reason="infini-gram needs tqdm")
    memory = build_ngram_memory(small_store, tmp_path / "ngram")
    other = infini_gram.InfiniGram(memory.parts[0].tokens, tmp_path / "infini-gram", memory.eod_id)
    text = next(document_tokens(small_store, 5, 6))[:40].astype(np.int64)
    text[17] = text[30]
    counts = memory.counts(text)
    for place in range(len(text)):
        for length in range(1, min(place + 1, 9) + 1):
            assert other.count(text[place + 1 - length : place + 1].tolist()) == counts[place, length]
    longest = memory.guesses(text).longest()
    for place in range(9, len(text)):
        share = other.look_up(text[max(0, place - LONGEST) : place].tolist(), int(text[place]))
        assert share == pytest.approx(longest.shares_J[place - 1], rel=1e-6)
