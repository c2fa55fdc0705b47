"""A plain decoder in the commands: it reads in front what it is given, and nothing else changes; what cannot apply is named."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import run
from helpers import small_model
from interop_helpers import decoder_folder

from retro_engine.api import Retro
from retro_engine.cli import flags
from retro_engine.data.store import Store
from retro_engine.errors import UsageError
from retro_engine.model.retro import RetroModel


@pytest.fixture(scope="module")
def decoder(work: Path) -> Path:
    return decoder_folder(work / "decoder", Store(work / "store").tokenizer)


def out(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    capsys.readouterr()
    assert run(*words, "--json") == 0
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))


def refused(capsys: pytest.CaptureFixture[str], message: str, *words: object) -> None:
    capsys.readouterr()
    assert run(*words) == 2
    assert message in capsys.readouterr().err


def test_generate(work: Path, decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = ["generate", decoder, "river stone", "inference.tokens_to_generate=4"]

    def hits(*words: object) -> list[str]:
        return [hit["store"] for hit in out(capsys, *ask, *words)["segments"][0]["neighbors"]]

    assert hits() == []
    assert hits("--stores", work / "store", "--k", 3) == ["store"] * 3
    assert hits("--stores", work / "store", "model.num_neighbors=1", "model.retrieved_length=8") == ["store"]
    assert hits("--stores", work / "store", "--no-retrieval") == []
    assert hits("--neighbors", "amber") == [""]
    (tmp_path / "note.txt").write_text("The river stone is grey.")
    assert run("docs", "add", tmp_path / "library", tmp_path / "note.txt", "--store", work / "store") == 0
    assert hits("--library", tmp_path / "library", "model.sink_id=null", "--reading", "prefix") == ["library"]
    refused(capsys, "names no store", *ask, "--reading", "prefix")
    refused(capsys, "takes 1 to 8 tokens", *ask, "--neighbors", "a", "model.retrieved_length=8",
            "inference.retro_inference.retro_gpt_retrieved_length=9")  # fmt: skip
    refused(capsys, "model.reading=cross_attention", "generate", work / "run", "river", "--reading", "prefix")


def test_what_is_said_of_reading_is_used_or_refused() -> None:
    plain, retro = small_model(retrieval=False), small_model()

    def settled(model: RetroModel, reading: str | None, *overrides: str, has_something: bool = True) -> bool:
        args = Namespace(reading=reading, overrides=[*overrides])
        return flags.settle_reading(args, Retro(model, None), has_something)  # type: ignore[arg-type]

    assert settled(plain, None)
    assert not settled(plain, None, has_something=False)
    assert settled(plain, None, "model.reading=prefix", "inference.greedy=true", has_something=False)
    assert settled(retro, None, "model.num_neighbors=2")
    for message, words in (
        ("something to read was given\n.*reads nothing now", (plain, "none")),
        ("they differ", (plain, "none", "model.reading=prefix")),
        ("a plain decoder has none", (plain, None, "model.reading=cross_attention")),
        ("trained with model.reading=cross_attention, which cannot be changed", (retro, "prefix")),
        ("which cannot be changed", (retro, "none")),
        ("the model has 2", (retro, None, "model.num_neighbors=3")),
    ):
        with pytest.raises(UsageError, match=message):
            settled(*words)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"model\.sink_id=3\n.*reads nothing now"):
        settled(plain, None, "model.sink_id=3", has_something=False)


def test_explain(work: Path, decoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = ["explain", decoder, "river stone", " amber"]
    found = out(capsys, *ask, "--stores", work / "store")
    assert len(found["neighbors"]) == 2
    assert found["log_prob"] != pytest.approx(found["log_prob_off"], abs=1e-3)
    given = out(capsys, *ask, "--neighbors", "amber", "--neighbors", "river")
    assert [hit["text"] for hit in given["neighbors"]] == ["amber", "river"]
    refused(capsys, "plain decoder", *ask)


def test_eval(work: Path, decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = [f"model.data.store='{work / 'store'}'", "model.data.splits_string='70,30,0'"]
    ask = ["eval", decoder, "--limit", 1, "model.encoder_seq_length=64", *data]
    plain = out(capsys, *ask, "model.chunk_size=16")
    assert set(plain) & {"on", "off", "random"} == {"off"}
    named = ["model.data.neighbors=bm25"]  # other tests make others beside it
    data, ask = [*data, *named], [*ask, *named]
    found = out(capsys, *ask, "model.reading=prefix", "--in-prompt", "--against", decoder)
    assert found["off"] == plain["off"], "the same documents and tokens, and the same decoder"
    for mode in ("on", "random", "prompt"):
        assert found[mode]["tokens"] == plain["off"]["tokens"]
        assert found[mode]["loss"] != found["off"]["loss"]
    assert found["on"]["loss"] != found["random"]["loss"]
    assert len(found["gains"]) == 1
    one = ["model.num_neighbors=1", "model.chunk_size=16"]
    given = out(capsys, *ask, *one, "--neighbors", "river", "--modes", "on,off,given")
    assert given["on"]["loss"] != found["on"]["loss"]
    assert given["given"]["loss"] != given["off"]["loss"]
    refused(capsys, "does not match the store", *ask, "--reading", "prefix", "model.chunk_size=32")
    refused(capsys, "plain decoder", *ask, "model.chunk_size=16", "--modes", "on")
    learned = {"position_embedding": "learned", "encoder_seq_length": 64}
    folder = decoder_folder(tmp_path / "learned", Store(work / "store").tokenizer, **learned)
    few = ["eval", folder, *data, "--limit", 1, "--reading", "prefix", "--modes", "on"]
    refused(capsys, "use 48", *few, "model.num_neighbors=1", "model.retrieved_length=15")
    fits = ["model.num_neighbors=1", "model.retrieved_length=15", "model.encoder_seq_length=48"]
    assert out(capsys, *few, *fits)["on"]["tokens"] > 0


def test_questions(work: Path, decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": f"what is {n}?", "answer": "river", "neighbors": [f"amber {n} stone"]} for n in range(8)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    from retro_engine.evaluate import questions

    said: dict[str, list[str]] = {}
    answers = questions.answer_questions

    def noted(model: Any, given: Any, mode: str, **more: Any) -> questions.Answers:
        found = answers(model, given, mode, **more)
        said[mode] = found.texts
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(questions, "answer_questions", noted)
        ask = ["eval", decoder, "--questions", tmp_path / "q.jsonl", "--stores", work / "store"]
        out(capsys, *ask)
        with_neighbors = dict(said)
        out(capsys, *ask[:-2], "--reading", "none", f"model.data.store='{work / 'store'}'")
    assert len({(*texts,) for texts in with_neighbors.values()}) == 4, "retrieved, gold, random, off"
    assert said["gold"] == said["off"] == with_neighbors["off"]
