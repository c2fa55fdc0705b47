"""The bench beside llama.cpp, with programs that answer as the rival's do: what is read of them, what is asked of ours."""

import contextlib
import stat
import sys
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import small_config

from retro_engine.bench import checkout
from retro_engine.bench.frame import Options
from retro_engine.data.store import Store
from retro_engine.errors import MissingInputError, UnavailableError, UsageError
from retro_engine.interop.imports import Imported, write_checkpoint
from retro_engine.model.retro import RetroModel

llama_cpp, bench_rivals = checkout.load("llama_cpp"), checkout.load("bench_rivals")
CASE = '{"n_kv_max": 640, "pp": 512, "tg": 128, "pl": %s, "t_pp": 0.5, "speed_pp": 1024, "t_tg": 2.0, "speed_tg": 64}'
FAKES = {  # a program's name: what it does with `words`, what follows its name
    "llama-bench": "print('tg1')",
    "llama-batched-bench": f"print('loading ...')\nprint({CASE!r} % words[words.index('-npl') + 1])",
    "llama-quantize": "import shutil\nshutil.copy(words[1], words[2])",
    "llama-server": "sys.exit(3)",
}


@pytest.fixture
def rival(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of peers with programs that answer at once."""
    monkeypatch.setattr(checkout.load("peers"), "FOLDER", tmp_path)
    for name, does in FAKES.items():
        path = tmp_path / "llama" / "build" / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!{sys.executable}\nimport sys\nwords = sys.argv[1:]\n{does}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    gguf = tmp_path / llama_cpp.GGUF
    gguf.parent.mkdir()
    gguf.write_bytes(b"GGUF" * 10)
    return tmp_path


def test_what_the_rival_says_is_read(rival: Path) -> None:
    model = llama_cpp.converted("int8")
    assert model.name.endswith(".Q8_0.gguf") and model.read_bytes() == b"GGUF" * 10
    assert llama_cpp.measure(model, 8, 512, 128, 2) == llama_cpp.Speed(0.5, 2.0)
    with pytest.raises(UnavailableError, match=r"says nothing of 8 x \(512 \+ 64\)"):
        llama_cpp.measure(model, 8, 512, 64, 2)
    with pytest.raises(UnavailableError, match="no case"):
        llama_cpp.read_speed("no case", 1, 512, 128)
    with pytest.raises(UnavailableError, match="llama-server does not answer"):
        llama_cpp.serve(model, [1], 1, 1)
    llama_cpp.program("llama-bench").write_text("#!/bin/sh\necho no such file; exit 1\n")
    with pytest.raises(UnavailableError, match="no such file"):
        llama_cpp.first_token(model, 1)


def test_without_the_rival_it_says_what_to_run(rival: Path) -> None:
    llama_cpp.program("llama-batched-bench").unlink()
    with pytest.raises(MissingInputError, match="make peers"):
        bench_rivals.run(Options())
    with pytest.raises(UsageError, match="batch8"):
        bench_rivals.run(Options(parts=["batch9"]))
    with pytest.raises(UsageError, match="did you mean int8"):
        bench_rivals.run(Options(weights=["int9"]))


def test_rows_say_tokens_a_second_and_times_the_rival() -> None:
    works = {"ours": lambda: llama_cpp.Speed(0.25, 4.0), "llama.cpp": lambda: llama_cpp.Speed(0.5, 2.0)}
    rows = bench_rivals.compared_rows("int8", 1, (512, 128), bench_rivals.in_turns(works, 3))
    assert [row.case for row in rows] == ["int8, prompt", "int8, prompt", "int8, new tokens", "int8, new tokens"]
    assert [row.note for row in rows] == ["2,048 tokens/s", "1,024 tokens/s", "32 tokens/s", "64 tokens/s"]
    assert [row.ratios for row in rows] == [{"llama.cpp": 2.0}, {}, {"llama.cpp": 0.5}, {}]


def test_targets_are_times_the_rivals_rate(rival: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def ours(form: Any) -> Iterator[Callable[..., Any]]:
        yield lambda *size: llama_cpp.Speed(0.25, 4.0)

    monkeypatch.setattr(bench_rivals, "ours", ours)
    monkeypatch.setattr(bench_rivals, "imported", lambda: rival)
    measured = bench_rivals.run(Options(weights=["bf16"], parts=["batch1"]))
    assert {target.row: (target.value, target.target) for target in measured.targets} == {
        "bf16, batch 1, new tokens: times llama.cpp BF16's": (0.5, 1.0),
        "bf16, batch 1, prompt: times llama.cpp BF16's": (2.0, 1.3),
    }


def test_ours_answers_with_the_seconds_of_what_was_asked(
    small_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_rivals, "FIRST_ID", 5)
    monkeypatch.setattr(bench_rivals, "LAST_ID", small_store.vocab_size - 1)
    model = RetroModel(small_config(vocab_size=small_store.vocab_size, retrieval=False))
    write_checkpoint(Imported(model, small_store.tokenizer, "hf"), tmp_path / "ours", "x")
    here, there = Pipe()
    here.send((2, 20, 64, torch.get_num_threads()))  # 64 steps: what is left of two times is more than their noise
    here.send(None)
    bench_rivals.work_on(there, tmp_path / "ours", "fp32")
    speed = here.recv()
    assert speed.prompt_s > 0 and speed.new_s > 0


@pytest.mark.parametrize("is_read", [False, True])
def test_where_a_gguf_is_read_as_it_is_ours_runs_the_rivals_file_too(
    rival: Path, monkeypatch: pytest.MonkeyPatch, is_read: bool
) -> None:
    monkeypatch.setattr(bench_rivals, "imported", lambda: rival)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: is_read or None)
    assert bench_rivals.forms("bf16") == {"ours": (rival, "bf16")}
    found = bench_rivals.forms("int8")
    assert list(found) == ["ours", "ours, its GGUF"][: 1 + is_read]
    if is_read:
        assert found["ours, its GGUF"].path == llama_cpp.converted("int8")
        assert found["ours, its GGUF"].flags == []
    assert found["ours"].flags == ["--dtype", "int8"]
