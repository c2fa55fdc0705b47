"""lm-evaluation-harness on tasks of our own, offline: the three kinds of request, retrieval on and off, tasks that are not there."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import small_config, small_model

from retro_engine.data.store import Store
from retro_engine.errors import MissingInputError, UsageError
from retro_engine.generate.explain import explain
from retro_engine.generate.generator import Generator
from retro_engine.generate.open_model import read_in_front
from retro_engine.model.retro import RetroModel
from retro_engine.retrieval.search import Retriever

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
from retro_engine.generate.request import Request
from retro_engine.generate.sampling import Sampling
from retro_engine.interop import lm_eval_model  # noqa: E402
from retro_engine.interop.lm_eval_model import RetroLM, run_tasks  # noqa: E402


def request(*arguments: object) -> SimpleNamespace:
    return SimpleNamespace(args=arguments)


@pytest.fixture(scope="module")
def generator(small_store: Store) -> Generator:
    config = small_config(vocab_size=small_store.vocab_size, chunk_size=16, encoder_seq_length=64, init_method_std=0.3)
    model = RetroModel(config, torch.Generator().manual_seed(0)).double().eval()
    return Generator(model, small_store.tokenizer, Retriever([small_store]))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": f"river {n}", "choices": ["stone", "amber"], "gold": n % 2, "text": "river stone amber"}
        for n in range(4)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder}/rows.jsonl\ntest_split: test\n"
    (folder / "choice.yaml").write_text(
        f"task: own_choice\n{data}output_type: multiple_choice\ndoc_to_text: '{{{{question}}}}'\n"
        "doc_to_choice: choices\ndoc_to_target: gold\nmetric_list:\n  - metric: acc\n"
    )
    (folder / "rolling.yaml").write_text(
        f"task: own_rolling\n{data}output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{{{text}}}}'\n"
        "metric_list:\n  - metric: bits_per_byte\n  - metric: word_perplexity\n"
    )
    (folder / "until.yaml").write_text(
        f"task: own_until\n{data}output_type: generate_until\ndoc_to_text: '{{{{question}}}}'\ndoc_to_target: '{{{{text}}}}'\n"
        "generation_kwargs:\n  until: ['e']\n  max_gen_toks: 5\nmetric_list:\n  - metric: exact_match\n"
    )
    return folder


def test_the_three_kinds_of_tasks(
    generator: Generator, tasks: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    found = run_tasks(generator, ["own_choice", "own_rolling", "own_until"], tasks)
    assert 0 <= found["own_choice"]["acc"] <= 1
    assert found["own_rolling"]["bits_per_byte"] > 0
    assert 0 <= found["own_until"]["exact_match"] <= 1
    lm = RetroLM(generator)
    scores = [lm._loglikelihood(f"river {n}", f" {w}")[0] for n in range(4) for w in ("stone", "amber")]
    right = [int(scores[2 * n + 1] > scores[2 * n]) == n % 2 for n in range(4)]
    assert found["own_choice"]["acc"] == pytest.approx(sum(right) / 4)
    limited = run_tasks(generator, ["own_choice"], tasks, limit=1)
    assert limited["own_choice"]["acc"] == float(right[0])


def test_log_probabilities_are_those_of_explanation(generator: Generator) -> None:
    prompt, text = "river stone amber", " copper"
    assert len(generator.tokenizer.encode(prompt)) <= 16, "one chunk: explanation reads the last one's neighbors"
    ((on, _),) = RetroLM(generator).loglikelihood([request(prompt, text)])
    assert on == pytest.approx(float(explain(generator, prompt, text).log_probs_T.sum()), abs=1e-9)
    ((off, _),) = RetroLM(Generator(generator.model, generator.tokenizer)).loglikelihood([request(prompt, text)])
    assert off != pytest.approx(on, abs=1e-3)
    ((spaced, _),) = RetroLM(generator).loglikelihood([request(f"{prompt} ", text.strip())])
    assert spaced == pytest.approx(on)
    ((empty, _),) = RetroLM(generator).loglikelihood([request("", "river")])
    assert empty < 0


def test_a_decoder_that_reads_in_front(small_store: Store) -> None:
    model = small_model(vocab_size=small_store.vocab_size, retrieval=False, encoder_seq_length=64)
    read_in_front(model, small_store.tokenizer, 16)
    generator = Generator(model, small_store.tokenizer, Retriever([small_store]))
    ((on, _),) = RetroLM(generator).loglikelihood([request("river stone amber", " copper")])
    explained = explain(generator, "river stone amber", " copper")
    assert on == pytest.approx(float(explained.log_probs_T.sum()), abs=1e-5)
    assert on != pytest.approx(float(explained.off_T.sum()), abs=1e-3)
    long = small_store.tokenizer.encode("river stone amber lantern orchard harbor " * 6)
    assert len(long) > 32, "several chunks, each with its own neighbors"
    said = generator.generate_all([Request(long, 6, sampling=Sampling(min_tokens=6))])[0].tokens
    assert RetroLM(generator)._score(long, said)[1], "as generation reads them"


def test_greedy_and_stop_strings(generator: Generator) -> None:
    lm = RetroLM(generator)
    prompt = "river stone amber"
    whole = lm.generate_until([request(prompt, {"until": [], "max_gen_toks": 6})])[0]
    assert whole == generator.generate(prompt, 6).text
    if whole and prompt + whole == generator.tokenizer.decode(generator.tokenizer.encode(prompt + whole)):
        stop = whole[len(whole) // 2]
        cut = lm.generate_until([request(prompt, {"until": [stop], "max_gen_toks": 6})])[0]
        assert cut == whole[: whole.index(stop)]
    ids = generator.tokenizer.encode(prompt)
    best = generator.generate(prompt, 1, Sampling(min_tokens=1)).tokens[0]
    assert lm._score(ids, [best])[1]
    assert not lm._score(ids, [(best + 1) % 300])[1]


def test_windows_cover_every_token_once(generator: Generator) -> None:
    lm = RetroLM(Generator(generator.model, generator.tokenizer))
    text = "river stone amber lantern orchard harbor " * 8
    ids = generator.tokenizer.encode(text)
    assert len(ids) > 64
    (total,) = lm.loglikelihood_rolling([request(text)])
    first = lm._score([generator.tokenizer.eod_id], ids[:64])[0]
    assert total < first < 0
    (short,) = lm.loglikelihood_rolling([request("river stone")])
    assert short == pytest.approx(lm._score([generator.tokenizer.eod_id], generator.tokenizer.encode("river stone"))[0])


def test_tasks_that_are_not_there(
    generator: Generator, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_only = partial(lm_eval_model.TaskManager, include_defaults=False)  # reading lm-eval's own takes half a minute
    monkeypatch.setattr(lm_eval_model, "TaskManager", lambda include_path, **_: own_only(include_path=include_path))
    with pytest.raises(UsageError, match="task 'own_choic' is not installed\n.*did you mean own_choice"):
        run_tasks(generator, ["own_choic"], tasks)
    with pytest.raises(MissingInputError, match="does not exist"):
        run_tasks(generator, ["own_choice"], tmp_path / "gone")
