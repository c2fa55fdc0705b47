"""What is loaded from benchmarks/: the figures of docs/results.md, at the size of a trial."""

import json
import zipfile
from pathlib import Path

import pytest
from helpers import write_corpus

from retro_engine.bench import checkout, memories
from retro_engine.data import files


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
    assert sum(row["value"] is None and name.startswith("encoder ") for name, row in again.items()) == 4
    seconds = json.loads((out / "quick" / "prefix.json").read_text())["cost"]["seconds"]
    assert again["SmolLM2, neighbors in front against in the prompt: time, kept"]["value"] == pytest.approx(
        seconds["kept"] / seconds["in the prompt"]
    )
    assert (
        main(["--quick", "--out", str(out), "--text", str(write_corpus(tmp_path / "d.jsonl", 9)), "--only", "text"])
        == 2
    )
    assert "error: text-0 was begun with " in capsys.readouterr().err, "a training would go on with other data"


def test_memories_beside_decoders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main = checkout.load("text_results").main
    for name, few in (("STEPS", 2), ("ROUNDS", 1), ("PROMPTS", 2), ("TIMED_BATCHES", 1)):
        monkeypatch.setattr(memories, name, few)
    corpus, other = write_corpus(tmp_path / "c.jsonl", 40, words=60), write_corpus(tmp_path / "o.jsonl", 6, seed=1)
    flags = [
        "--quick",
        "--out",
        str(tmp_path / "r"),
        "--text",
        str(corpus),
        "--only",
        "memory",
        "wikipedia",
        "packages",
    ]
    flags += ["--wikipedia", str(corpus), "--wikitext", str(other), "--packages", str(corpus), "--heldout", str(other)]
    monkeypatch.setattr(checkout.load("memory_results"), "SOME_PACKAGES", (8, 4))  # of 40 documents
    assert main(flags) == 0
    body = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {name: row["value"] for name, row in body["targets"].items() if row["value"] is not None}
    assert len(rows) == 13 and all(isinstance(value, float) for value in rows.values())
    assert rows["Wikipedia, equal tokens of training: what the memory saves"] > 0.1, "untrained, it knows nothing"
    assert rows["WikiText-103 after Wikipedia: what the memory saves"] > 0.05
    assert rows["packages: what a memory of all files saves, lower end"] > 0.05
    facts = body["parts"]["packages-0"]
    tokens = [facts[name]["tokens"] for name in ("one file of 8", "one file of 4", "all files")]
    assert tokens == sorted(tokens) and tokens[0] * 6 < tokens[2]
    saved = body["parts"]["memory-0"]
    assert float(saved["on with the memory"].split()[0]) < float(saved["on"].split()[0])


def test_other_neighbors_and_other_numbers_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = checkout.load("text_results").main
    corpus = write_corpus(tmp_path / "c.jsonl", 40, words=120)
    flags = ["--quick", "--out", str(tmp_path / "r"), "--text", str(corpus), "--only", "reading"]
    assert main(flags) == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])["parts"]["reading-0"]
    nats = files.read_object(tmp_path / "r/quick/reading-0.json")["documents"]
    assert nats.keys() < shown.keys()
    assert {"as it is, every 16 tokens", "as it is, 16 neighbors", "trained reranked, reading the same"} < nats.keys()
    assert len(nats) == 14 and len({sum(of) for of in nats.values()}) > 10, "each reads something else"


def test_what_has_nothing_to_measure_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = checkout.load("text_results").main
    assert main(["--only", "prefix", "--out", str(tmp_path / "r")]) == 2
    assert "error: prefix has no --model" in capsys.readouterr().err
    assert main(["--only", "wikipedia", "--out", str(tmp_path / "r")]) == 2
    assert "error: wikipedia has no --wikipedia" in capsys.readouterr().err
    assert main(["--wikitext", "w.jsonl", "--out", str(tmp_path / "r")]) == 2
    assert "error: --wikitext has no --wikipedia" in capsys.readouterr().err
    assert main(["--packages", "p.jsonl", "--out", str(tmp_path / "r")]) == 2
    assert "error: --packages and --heldout go together" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_wheels_become_documents_in_an_order_of_their_names(tmp_path: Path) -> None:
    texts = checkout.load("texts")
    for name in ("a-1.0-py3-none-any.whl", "b-2.1-py3-none-any.whl"):
        with zipfile.ZipFile(tmp_path / name, "w") as wheel:
            for number in range(20):
                wheel.writestr(f"{name[0]}/{number}.py", f"# {name} {number}\n" * 20)
            wheel.writestr(f"{name[0]}/short.py", "pass")
            wheel.writestr(f"{name[0]}/code.so", b"\xff" * 999)
            wheel.writestr(f"{name[:5]}.dist-info/NOTICE.txt", "notice " * 99)
    paths = sorted(map(str, tmp_path.glob("*.whl")))
    rows = list(texts.wheels(paths))
    assert sorted(row["id"] for row in rows) == sorted(
        f"{name}/{name[0]}/{n}.py" for name in ("a-1.0", "b-2.1") for n in range(20)
    )
    assert {row["id"][0] for row in rows[::8]} == {"a", "b"}, "every eighth is of both"
    assert rows == list(texts.wheels(paths[::-1]))


def test_speeds_are_those_of_the_benches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rows that were measured, of benches that ran; one that cannot run says why, a busy one gives no verdict."""
    speeds = checkout.load("speed_results")
    rows = {
        "fast": {"value": 2.0, "target": 1.5, "holds": True},
        "small": {"value": 9.0, "target": 5.0, "holds": False},
    }
    found = speeds.joined(
        {
            "kernels": {"targets": {**rows, "later": {"value": None, "target": 1.0, "holds": False}}, "busy": False},
            "rivals": {"error": "llama.cpp is not built"},
            "service": {"targets": rows, "busy": True},
        }
    )
    assert found["shown"]["rivals"] == "not measured: llama.cpp is not built"
    assert found["shown"]["service: fast"] == "2 (busy)"
    targets = speeds.targets_of(found)
    assert [(t.row, t.value, t.is_at_most, t.holds) for t in targets] == [
        ("kernels: fast", 2.0, False, True),
        ("kernels: small", 9.0, True, False),
    ]
    monkeypatch.chdir(tmp_path)
    assert "rivalz" in speeds.measured(["rivalz"])["error"]
