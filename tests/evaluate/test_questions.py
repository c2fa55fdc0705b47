"""Exact match and F1: SQuAD's normalization, answers in batches as alone, and tuning that is seen in the score."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import shared, small_config

from retro_engine import cli
from retro_engine.data.questions import Questions, read_questions
from retro_engine.data.store import Store
from retro_engine.evaluate.questions import Answers, answer_questions, exact_match, f1, normalize
from retro_engine.model.decoding import decode
from retro_engine.model.encodings import Encodings
from retro_engine.model.passage_choice import absence
from retro_engine.model.retro import RetroModel


def test_squads_normalization() -> None:
    assert normalize("The  U.S. Dollar, an hour!") == "us dollar hour"
    assert exact_match("the Tower.", ["x", "Tower"]) == 1
    assert exact_match("towers", ["Tower"]) == 0
    assert f1("the north tower", ["south tower", "north"]) == pytest.approx(2 / 3)
    assert f1("a b b", ["b b c"]) == pytest.approx(2 * 2 / (2 + 3)), (
        "the article is gone, words count as often as they are there"
    )
    assert (f1("", [""]), f1("", ["x"]), f1("the", ["a"])) == (1, 0, 1)


@pytest.fixture(scope="module")
def questions(small_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Questions:
    path = tmp_path_factory.mktemp("q") / "q.jsonl"
    rows = [{"question": "river " * (n % 7 * 4 + 1), "answer": "amber", "documents": [f"d{n}"]} for n in range(20)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return Questions(read_questions(path), small_store, path, 96, 2, 32)


def test_answers_do_not_depend_on_the_batch(questions: Questions, small_store: Store) -> None:
    config = small_config(vocab_size=small_store.vocab_size, chunk_size=16, init_method_std=0.3)
    model = RetroModel(config, torch.Generator().manual_seed(0)).double().eval()
    many = answer_questions(model, questions, "gold", 6, batch_size=8)
    one = answer_questions(model, questions, "gold", 6, batch_size=1)
    assert many.texts == one.texts
    assert answer_questions(model, questions, "off", 6).texts != many.texts
    assert answer_questions(model, questions, "random", 6).texts != many.texts
    assert len(answer_questions(model, questions, "gold", 6, limit=5).texts) == 5


def test_tuning_on_questions_is_seen_in_the_score(
    small_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten questions are learned by heart; from the command line, to exact match 1."""
    rows = [{"question": f"what is {n}?", "answers": [word], "documents": [f"d{n}"]}
            for n, word in enumerate(["river", "stone", "amber", "lantern", "orchard", "harbor", "winter", "copper", "thistle", "meadow"])]  # fmt: skip
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = tmp_path / "run"
    command = [
        "train", "--preset", "tiny", "--out", str(run), "--quiet", f"model.data.store='{small_store.folder}'",
        f"model.data.questions='{tmp_path / 'q.jsonl'}'", "model.data.splits_string='100,0,0'", "model.chunk_size=16",
        "model.encoder_seq_length=64", "model.hidden_size=64", "model.ffn_hidden_size=128", "model.data.question_neighbors=both",
        "model.micro_batch_size=10", "trainer.max_steps=60", "trainer.precision=32", "model.optim.sched.warmup_steps=5",
        "model.data.neighbor_dropout=0", "model.dec_num_layers=2", "model.dec_cross_attention=[1]",
    ]  # fmt: skip
    assert cli.main(command) == 0
    capsys.readouterr()
    asked = ["eval", str(run), "--questions", str(tmp_path / "q.jsonl"), "--json", "--quiet"]
    assert cli.main([*asked, "--modes", "gold,off,prompt"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gold"]["exact_match"] >= 0.9, found
    assert found["gold"]["f1"] >= found["gold"]["exact_match"]
    assert found["gold"]["exact_match_interval"][0] <= found["gold"]["exact_match"]
    assert set(found) == {"checkpoint", "gold", "off", "prompt"}
    assert cli.main([*asked, "--modes", "gold,golden"]) == 2
    assert cli.main([*asked, "--limit", "0"]) == 2
    assert cli.main(["report", str(run), "--share", "train"]) == 2, "the report is on text"
    (tmp_path / "bad.jsonl").write_text('{"question": "x"}')
    assert cli.main([*asked[:3], str(tmp_path / "bad.jsonl")]) == 3
    (tmp_path / "bad.jsonl").write_text('{"question": "x"}\n\ufeff' + json.dumps(rows[0]) + "\n")
    asked = [*asked[:3], str(tmp_path / "bad.jsonl"), "--modes", "off"]
    capsys.readouterr()
    assert cli.main([*asked, "--json"]) == 0
    out, error = capsys.readouterr()
    assert (json.loads(out)["off"]["questions"], json.loads(out)["off"]["set_aside"]) == (1, 1)
    assert "bad.jsonl:1: no answer" in error
    assert cli.main([*asked, "--strict"]) == 3
    assert cli.main([*command, "model.data.self_neighbor_steps=2"]) == 2


def test_a_model_learns_to_read_in_front(
    small_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Passages "X Y", of which the answer to X is Y; each X stands beside several Y, so that only who reads can answer."""
    words = ["river", "stone", "amber", "lantern", "orchard", "harbor", "winter", "copper", "thistle", "meadow"]
    pairs = [(one, other) for place, one in enumerate(words) for other in words[place % 2 :: 2] if one != other]
    rows = [{"question": one, "answer": other, "neighbors": [f"{one} {other}"]} for one, other in pairs]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = tmp_path / "run"
    command = [
        "train", "--preset", "tiny", "--out", str(run), "--quiet", f"model.data.store='{small_store.folder}'",
        f"model.data.questions='{tmp_path / 'q.jsonl'}'", "model.data.splits_string='100,0,0'", "model.chunk_size=16",
        "model.encoder_seq_length=64", "model.hidden_size=64", "model.ffn_hidden_size=128", "model.reading=prefix",
        "model.micro_batch_size=12", "trainer.max_steps=250", "trainer.precision=32", "model.optim.sched.warmup_steps=5",
        "model.data.neighbor_dropout=0", "model.dec_num_layers=2", "model.num_neighbors=3", "model.optim.lr=3e-3",
        "model.init=standard", "model.data.question_distractors=0.4", "model.data.question_absent=0.25", "model.data.question_absent_answer=falcon",
    ]  # fmt: skip
    assert cli.main(command) == 0
    capsys.readouterr()
    asked = ["eval", str(run), "--json", "--quiet", "--modes", "gold,random", "--questions"]
    assert cli.main([*asked, str(tmp_path / "q.jsonl")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gold"]["exact_match"] >= 0.6 > 0.4 >= found["random"]["exact_match"], found
    assert 0 <= found["gold"]["said_absent"] <= 1


def test_what_is_said_to_be_absent(questions: Questions, small_store: Store) -> None:
    """Counted by the same normalization; and kept encodings change no answer."""
    config = small_config(
        vocab_size=small_store.vocab_size, chunk_size=16, init_method_std=0.3, reading="prefix", retrieved_length=32
    )
    model = RetroModel(config, torch.Generator().manual_seed(0)).double().eval()
    plain = answer_questions(model, questions, "gold", 6)
    assert plain.absent is None and "said_absent" not in plain.summary()
    absent = f" {plain.texts[0].upper()}."
    kept = Encodings(model, 1 << 24)
    again = answer_questions(model, questions, "gold", 6, absent=absent, encode=kept.of)
    assert again.texts == plain.texts and kept.stats.misses and kept.stats.hits == 0
    share = np.mean([normalize(text) == normalize(absent) for text in plain.texts])
    assert again.summary()["said_absent"] == share > 0
    answer_questions(model, questions, "random", 6, encode=kept.of)
    assert kept.stats.hits


def test_of_several_passages_the_likeliest_is_read(small_store: Store, tmp_path: Path) -> None:
    """Each question's answer is the one that it gets from that of its passages of which `absent` is least likely."""
    rows = [{"question": f"river {n}", "answer": "amber", "documents": [f"d{n}", f"d{n + 1}"]} for n in range(6)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = small_config(
        vocab_size=small_store.vocab_size, chunk_size=16, init_method_std=0.3, reading="prefix", retrieved_length=32
    )
    model = RetroModel(config, torch.Generator().manual_seed(0)).double().eval()
    asked = Questions(read_questions(tmp_path / "q.jsonl"), small_store, tmp_path / "q.jsonl", 96, 4, 32)
    tokenizer = small_store.tokenizer
    said = answer_questions(model, asked, "gold", 6, absent="lantern", is_alone=True).texts
    assert said != answer_questions(model, asked, "gold", 6, absent="lantern").texts
    for number, text in enumerate(said):
        tokens, lengths = (torch.from_numpy(part[0]) for part in asked.neighbors([number], "gold"))
        absent_id = tokenizer.encode(" lantern")[0]
        best = int(absence(model, asked.prompts[number], tokens, lengths, absent_id, tokenizer.pad_id).argmin())
        one = tokens[best][None, None], lengths[best][None, None]
        (ids,) = decode(model, [asked.prompts[number]], *one, 6, tokenizer.end_ids, tokenizer.pad_id)
        assert tokenizer.decode(ids).strip().split("\n", 1)[0].strip() == text


def test_squad_in_four_conditions(tmp_path: Path) -> None:
    """The shared SQuAD files are read as they are, and BM25 finds the passage of most questions."""
    import zstandard

    from retro_engine.data.prepare import prepare
    from retro_engine.train.run_data import question_search

    folder = shared("data/squad")
    lines = {}
    for name in ("passages", "questions"):
        packed = folder / f"dev-v1.1.{name}.jsonl.zst"
        lines[name] = zstandard.ZstdDecompressor().stream_reader(packed.open("rb")).read().decode().splitlines()
    passages = lines["passages"][:300]
    known = {json.loads(line)["id"] for line in passages}
    asked = [line for line in lines["questions"] if json.loads(line)["passage"] in known][:200]
    (tmp_path / "passages.jsonl").write_text("\n".join(passages))
    (tmp_path / "questions.jsonl").write_text("\n".join(asked))
    store = prepare([tmp_path / "passages.jsonl"], tmp_path / "store", vocab_size=2000, chunk_size=64)
    rows = read_questions(tmp_path / "questions.jsonl")
    questions = Questions(rows, store, "q", 192, 4, 128, "data", question_search([store], "bm25", 128))
    assert len(questions.questions) > 150
    numbers = questions.documents[:50].tolist()
    gold, gold_lengths = questions.neighbors(numbers, "gold")
    found, _ = questions.neighbors(numbers, "retrieved")
    assert (gold_lengths[:, 0] > 0).all()
    right = [
        any(answer in store.tokenizer.decode(tokens) for answer in questions.questions[n].answers)
        for n, tokens in ((n, np.concatenate(found[n])) for n in numbers)
    ]
    assert np.mean(right) > 0.6
    model = RetroModel(small_config(vocab_size=store.vocab_size, chunk_size=64, retrieved_length=128)).eval()
    for mode in ("retrieved", "gold", "random", "off"):
        summary = answer_questions(model, questions, mode, 4, limit=8).summary()
        assert 0 <= summary["exact_match"] <= summary["f1"] <= 1


def test_none_of_twenty_right_has_an_interval_with_a_width() -> None:
    nothing = Answers(texts=["x"] * 20, exact=np.zeros(20), f1=np.zeros(20)).summary()
    assert nothing["exact_match_interval"] == [0.0, pytest.approx(0.16113, abs=1e-5)]
    assert Answers(texts=["x"], exact=np.ones(1), f1=np.ones(1)).summary()["exact_match_interval"] is None
