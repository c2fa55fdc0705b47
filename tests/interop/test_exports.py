"""An exported folder under transformers: the same logits and the same generation; what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import small_config, small_inputs

from retro_engine.data.store import Store
from retro_engine.errors import UsageError
from retro_engine.interop.exports import export_model
from retro_engine.interop.imports import Imported, write_checkpoint
from retro_engine.model.decoding import decode
from retro_engine.model.retro import RetroModel

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="module")
def model(small_store: Store) -> RetroModel:
    torch.manual_seed(0)
    config = small_config(vocab_size=small_store.vocab_size, init_method_std=0.3, share_embeddings=False)
    return RetroModel(config).eval()


@pytest.fixture(scope="module")
def folder(model: RetroModel, small_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("export")
    write_checkpoint(Imported(model, small_store.tokenizer, "hf"), base / "ours", "x")
    return export_model(base / "ours", base / "theirs")


def test_logits_loss_and_generation(folder: Path, model: RetroModel, small_store: Store) -> None:
    import retro_engine.interop.transformers_model  # noqa: F401 (registers)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(theirs).__name__ == "RetroForCausalLM"
    tokens, neighbors = small_inputs(model)
    with torch.no_grad():
        expected = model(tokens, neighbors)
        found = theirs(tokens, neighbors=neighbors, labels=tokens)
    assert torch.equal(found.logits, expected)
    losses = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert float(found.loss) == pytest.approx(float(losses), rel=1e-5)
    prompts = torch.tensor([[0, 0, 7, 8, 9], [3, 4, 5, 6, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    out = theirs.generate(prompts, mask, neighbors[:, 0], max_new_tokens=5, eos_token_id=[])
    answers = decode(
        model, [[7, 8, 9], [3, 4, 5, 6, 7]], neighbors[:, 0], None, max_new_tokens=5, stop_ids=[], pad_id=0
    )
    assert out[:, :5].tolist() == prompts.tolist()
    assert out[:, 5:].tolist() == answers
    stop = answers[0][2]
    stopped = theirs.generate(prompts[:1], mask[:1], neighbors[:1, 0], max_new_tokens=5, eos_token_id=stop)
    assert stopped[0, 5:].tolist() == [*answers[0][: answers[0].index(stop)], stop]
    draws = {
        tuple(theirs.generate(prompts[1:], do_sample=True, seed=s, max_new_tokens=3)[0].tolist()) for s in range(6)
    }
    assert len(draws) > 1
    with pytest.raises(TypeError, match="num_beams"):
        theirs.generate(prompts, num_beams=4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("river stone")["input_ids"] == small_store.tokenizer.encode("river stone")
    assert tokenizer.eos_token_id == small_store.tokenizer.eod_id


def test_it_saves_and_loads_again(folder: Path, model: RetroModel, tmp_path: Path) -> None:
    from retro_engine.interop.transformers_model import RetroForCausalLM

    RetroForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[f"model.{name}"], value), name


def test_trust_remote_code_is_enough(folder: Path, tmp_path: Path) -> None:
    code = (
        "from transformers import AutoModelForCausalLM as A\n"
        f"print(type(A.from_pretrained({str(folder)!r}, trust_remote_code=True)).__name__)"
    )
    import os

    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "RetroForCausalLM", done.stderr[-1500:]


def test_a_pipeline_generates(folder: Path, model: RetroModel, small_store: Store) -> None:
    import retro_engine.interop.transformers_model  # noqa: F401 (registers)

    tokenizer = small_store.tokenizer
    generate = transformers.pipeline("text-generation", str(folder), device="cpu")
    (out,) = generate("river stone", max_new_tokens=6, do_sample=False)
    prompt, end = tokenizer.encode("river stone"), tokenizer.end_ids
    (ids,) = decode(model, [prompt], None, None, max_new_tokens=6, stop_ids=end, pad_id=tokenizer.pad_id)
    assert out["generated_text"] == "river stone" + tokenizer.decode(ids)
    both = generate(["river", "amber lantern tide"], max_new_tokens=4, do_sample=True, temperature=0.7, batch_size=2)
    assert both[0][0]["generated_text"].startswith("river")
    assert both[1][0]["generated_text"].startswith("amber lantern tide")
    assert generate("river", max_length=3, do_sample=False)[0]["generated_text"].startswith("river")
    with pytest.raises(TypeError, match="has no num_beams"):
        generate("river", generation_config=transformers.GenerationConfig(num_beams=4))


def test_what_is_refused(folder: Path) -> None:
    from retro_engine.interop.transformers_model import RetroConfig

    with pytest.raises(UsageError, match="is there already"):
        export_model(folder.parent / "ours", folder)
    values = json.loads((folder / "config.json").read_text())
    with pytest.raises(ValueError, match="another version: experts"):
        RetroConfig(retro=values["retro"] | {"experts": 8})
