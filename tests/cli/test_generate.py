"""`retro generate`, as it is typed: NeMo's keys, the flags that say the same, libraries."""

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import run


def test_generate(work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        run("generate", work / "run", "Document doc7. river", "--show-neighbors", "inference.tokens_to_generate=20")
        == 0
    )
    out = capsys.readouterr().out
    assert out.startswith("Document doc7. river")
    assert "could read:" in out
    assert "store/d" in out
    assert run("generate", work / "run", "river", "--neighbors", "a", "--neighbors", "b", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert [hit["text"] for hit in result["segments"][0]["neighbors"]] == ["a", "b"]
    sample = ["inference.greedy=false", "inference.temperature=1.5", "--no-retrieval", "--json"]
    texts = []
    for seed in (1, 1, 2):
        assert run("generate", work / "run", "river", *sample, "--seed", seed) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1] != texts[2]

    monkeypatch.setattr(sys, "stdin", io.StringIO("river\n\nstone\n"))
    assert (
        run("generate", work / "run", "-i", "--json", "inference.tokens_to_generate=3", "--stores", work / "store") == 0
    )
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()] == ["river", "stone"]
    assert run("generate", work / "run") == 2
    assert run("generate", work / "run", "") == 2


def test_generate_with_nemos_keys(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def generated(*words: object) -> dict[str, Any]:
        assert run("generate", work / "run", "river", "--json", "inference.tokens_to_generate=12", *words) == 0
        return json.loads(capsys.readouterr().out)

    base = generated("inference.min_tokens_to_generate=12")
    assert base["finish_reason"] == "length"
    stop = base["text"][3:6]
    cut = generated("inference.min_tokens_to_generate=12", f"inference.end_strings=[{json.dumps(stop)}]")
    assert (cut["text"], cut["finish_reason"]) == (base["text"][: base["text"].index(stop)], "stop")
    assert generated("inference.repetition_penalty=9")["text"] != base["text"]
    with_logprobs = generated("inference.min_tokens_to_generate=12", "inference.compute_logprob=true")
    assert with_logprobs["text"] == "river" + base["text"]
    assert with_logprobs["logprobs"][0]["logprob"] is None
    assert all(entry["logprob"] < 0 and entry["top"] == [] for entry in with_logprobs["logprobs"][1:])
    every = generated("inference.all_probs=true")["logprobs"][-1]["top"]
    assert sum(math.exp(logprob) for _, _, logprob in every) == pytest.approx(1, abs=1e-4)
    texts = ["--neighbors", "river", "--neighbors", "stone", "--neighbors", "amber"]
    key = "inference.retro_inference"
    one = generated(*texts, f"{key}.ft_neighbours=1", f"{key}.retro_num_neighbors=1")
    assert [hit["text"] for hit in one["segments"][0]["neighbors"]] == ["stone"]
    top = generated(*texts, f"{key}.ft_neighbours=1", f"{key}.reuse_top=true", f"{key}.retro_num_neighbors=1")
    assert [hit["text"] for hit in top["segments"][0]["neighbors"]] == ["river"]
    for dtype in ("int8", "bf16"):
        assert generated("--dtype", dtype)["segments"]
    for wrong, message in (
        ("inference.add_BOS=true", "no beginning-of-document token"),
        ("inference.top_p=0.5", "contradicts greedy=true"),
        ("inference.min_tokens_to_generate=13", "at most 12 are generated"),
    ):
        assert run("generate", work / "run", "river", "inference.tokens_to_generate=12", wrong) == 2
        assert message in capsys.readouterr().err


def test_generate_from_a_library(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "note.txt").write_text("The quarry by the river is deep.")
    library = tmp_path / "library"
    assert run("docs", "add", library, tmp_path / "note.txt", "--store", work / "store") == 0
    capsys.readouterr()
    for stores in ([], ["--stores", work / "store"]):
        asked = ["the quarry by the river", "--library", library, "--json", "inference.tokens_to_generate=3"]
        assert run("generate", work / "run", *asked, *stores) == 0
        hits = json.loads(capsys.readouterr().out)["segments"][0]["neighbors"]
        assert hits[0]["text"].startswith("The quarry")
        assert len(hits) == (2 if stores else 1)
    assert run("generate", work / "run", "river", "--library", tmp_path / "none") == 3
    both = ["river", "--library", library, "--stores", work / "store", "inference.tokens_to_generate=1"]
    assert run("generate", work / "run", *both, "--retriever", "bm25,hash") == 0
    assert run("generate", work / "run", *both, "--retriever", "dense,bm25") == 2, "the library has no vectors"
    assert run("generate", work / "run", "river", "--retriever", "lexical,hash") == 2, "there is no library"


def test_flags_of_the_request(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is its setting: the same text, and another value of the two is refused."""

    def generated(*words: object) -> str:
        assert run("generate", work / "run", "river", "--no-retrieval", "--json", *words) == 0
        return json.loads(capsys.readouterr().out)["text"]

    flags = ("--max-new-tokens", 9, "--min-new-tokens", 9, "--repetition-penalty", 2)
    keys = ("tokens_to_generate=9", "min_tokens_to_generate=9", "repetition_penalty=2")
    by_key = generated(*(f"inference.{key}" for key in keys))
    assert generated(*flags) == generated(*flags, "--temperature", 0) == by_key
    sampled = generated(*flags, "--temperature", 3, "--top-k", 50, "--seed", 1)
    assert sampled != by_key
    settings = [f"inference.{key}" for key in (*keys, "greedy=false", "temperature=3", "top_k=50")]
    assert generated(*settings, "--seed", 1) == sampled
    assert generated(*flags, "--stop", by_key[2]) == by_key[: by_key.index(by_key[2])]
    assert generated(*flags, "inference.tokens_to_generate=9") == by_key
    for typed in (("--max-new-tokens", 4, "inference.tokens_to_generate=5"), ("--top-p", 0.5, "inference.greedy=true"),
                  ("--temperature", 0, "inference.greedy=false")):  # fmt: skip
        assert run("generate", work / "run", "river", *typed) == 2
        assert "they say different things" in capsys.readouterr().err
    assert run("generate", work / "run", "river", "--temperature", 0, "--top-k", 5) == 2
    assert run("generate", work / "run", "river", "--max-new-tokens", 0) == 2
