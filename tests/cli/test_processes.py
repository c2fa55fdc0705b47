"""`retro eval` in several processes: the figures of one, said once."""

import json
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import run
from training_helpers import forked

from retro_engine.cli.main import main


def evaluated(folder: Path, processes: int, *words: object) -> tuple[list[int], str]:
    said = folder / "said"
    ended = forked(processes, said, main, ["eval", *map(str, words)])
    return ended, said.read_text()


def close(found: Any, exact: Any) -> bool:
    if isinstance(exact, dict):
        return found.keys() == exact.keys() and all(close(found[key], exact[key]) for key in exact)
    if isinstance(exact, list):
        return len(found) == len(exact) and all(map(close, found, exact))
    return found == pytest.approx(exact, rel=1e-9) if isinstance(exact, float) else found == exact


@pytest.mark.parametrize(
    "more", [[], ["--limit", 1], ["--leak-limit", 0, "--neighbors", "river stone", "--modes", "on,off,given"]]
)
def test_several_processes_find_what_one_finds(
    work: Path, tmp_path: Path, more: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [work / "run", "--share", "all", "--json", "--quiet", *more]
    assert run("eval", *words) == 0
    exact = json.loads(capsys.readouterr().out)
    ended, said = evaluated(tmp_path, 3 if "--limit" in more else 2, *words)  # of one batch two processes have nothing
    assert set(ended) == {0}, said
    lines = [line for line in said.splitlines() if line.startswith('{"checkpoint"')]
    assert len(lines) == 1, "one process speaks"
    assert close(json.loads(lines[0]), exact), (lines[0], exact)


def test_every_process_fails_where_a_gate_does_and_says_its_number(work: Path, tmp_path: Path) -> None:
    ended, said = evaluated(tmp_path, 2, work / "run", "--limit", 2, "--modes", "off", "--fail-if", "bpb_off>0.001")
    assert 6 in ended
    assert "of 2: --fail-if bpb_off>0.001 is true" in said


def test_a_flag_starts_them(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("torch.distributed.run.main", started.append)
    words = ["eval", str(work / "run"), "--limit", "1", "model.num_neighbors=1"]
    assert main([*words[:2], "--nproc", "2", *words[2:]]) == 0
    assert started == [["--standalone", "--nproc-per-node", "2", "-m", "retro_engine.cli", *words]]


@pytest.mark.parametrize(("more", "said"), [
    (["--nproc", "0"], "it takes at least one process"),
    (["--nproc", "2", "--in-prompt"], "--in-prompt and --nproc cannot be together"),
    (["--nproc", "2", "--memory", "ngram"], "--memory and --nproc cannot"),
    (["--nproc", "2", "--lm-eval", "lambada"], "--lm-eval and --nproc cannot"),
    (["--nproc", "2", "--questions", "q.jsonl"], "--questions and --nproc cannot"),
])  # fmt: skip
def test_what_cannot_be_shared_is_refused(
    work: Path, more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("eval", work / "run", *more) == 2
    assert said in capsys.readouterr().err


def test_torchrun_and_what_one_process_computes(work: Path, tmp_path: Path) -> None:
    ended, said = evaluated(tmp_path, 2, work / "run", "--in-prompt")
    assert 2 in ended
    assert "--in-prompt and torchrun cannot be together" in said
