"""What is loaded from benchmarks/: the figures of docs/results.md, at the size of a trial."""

import json
from pathlib import Path

import pytest
from helpers import write_corpus

from retro_engine.bench import checkout


@pytest.mark.long
def test_results_of_text_are_made_once_and_in_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = checkout.load("text_results").main
    corpus, out = write_corpus(tmp_path / "c.jsonl", 40, words=120), tmp_path / "results"

    def last(*flags: str) -> dict[str, dict[str, float | bool | None]]:
        assert main(["--quick", "--out", str(out), "--text", str(corpus), *flags]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])["targets"]

    targets = last("--only", "text")
    rows = {name: row for name, row in targets.items() if name.startswith("re-used text")}
    assert [row["target"] for row in rows.values()] == [0.18, 0.08, 0.15]
    assert all(isinstance(row["value"], float) for row in rows.values())
    assert sum(row["value"] is None for row in targets.values()) == len(targets) - 3
    part = out / "quick" / "text-0.json"
    written = part.stat()
    model = out / "quick" / "text-0" / "plain"
    again = last("--only", "text", "prefix", "tuning", "--model", str(model))
    assert part.stat().st_ino == written.st_ino, "what is done is not done again"
    assert {name: again[name] for name in rows} == rows
    missing = [name for name, row in again.items() if row["value"] is None]
    assert len(missing) == 4 and all(name.startswith("encoder ") for name in missing)
    seconds = json.loads((out / "quick" / "prefix.json").read_text())["cost"]["seconds"]
    assert again["SmolLM2, neighbors in front against in the prompt: time, kept"]["value"] == pytest.approx(
        seconds["kept"] / seconds["in the prompt"]
    )
    assert (
        main(["--quick", "--out", str(out), "--text", str(write_corpus(tmp_path / "d.jsonl", 9)), "--only", "text"])
        == 2
    )
    assert "error: text-0 was begun with " in capsys.readouterr().err, "a training would go on with other data"


def test_what_has_nothing_to_measure_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = checkout.load("text_results").main
    assert main(["--only", "prefix", "--out", str(tmp_path / "r")]) == 2
    assert "error: prefix has no --model" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
