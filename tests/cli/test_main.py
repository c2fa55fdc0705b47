"""The command line: three-line errors, exit codes, nothing written or lost; and the commands one after another."""

import atexit
import contextlib
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from cli_helpers import TINY, run
from helpers import small_disk, write_corpus

from retro_engine.cli import doctor
from retro_engine.data.store import Store
from retro_engine.version import __version__

cli_main = importlib.import_module("retro_engine.cli.main")  # the package gives that name to the function


def test_help_is_quick() -> None:
    """`retro --help` in under 0.3 s (the best of five: the machine may be busy), heavy libraries unloaded."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "retro_engine.cli", "--help"], capture_output=True, text=True, check=True
        )
        times.append(time.perf_counter() - start)
    assert min(times) < 0.3, times
    assert "prepare" in done.stdout
    code = "import sys, retro_engine; from retro_engine.cli.main import make_parser; make_parser(); print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for heavy in ("torch", "numpy", "faiss", "omegaconf", "tokenizers"):
        assert f"'{heavy}'" not in loaded


def test_settings_and_flags_in_any_order(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", work / "run", "--seed", 3, "inference.tokens_to_generate=2", "a = b", "--json") == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "a = b"
    for words in (["inference.tokens_to_generate=2", "river"], ["inference.tokens_to_generate=2", "--seed", 1, "river"],
                  ["--neighbors", "a=b", "river", "inference.tokens_to_generate=2"], ["inference.tokens_to_generate=2", "--", "x=3"]):  # fmt: skip
        assert run("generate", work / "run", "--json", *words) == 0
        assert json.loads(capsys.readouterr().out)["prompt"] in ("river", "x=3")
    assert run("prepare", "x", "trainer.max_steps=3") == 2
    assert "takes no settings" in capsys.readouterr().err
    assert run("inspect", work / "store", "model.hidden_size=3") == 2
    assert "takes no settings" in capsys.readouterr().err
    assert run("eval", work / "run", "something") == 2
    assert "something: not known to retro eval\n  settings are key=value" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "what", "why"),
    [
        (
            ["generate", "r", "x", "--max-new-tokns", "4"],
            "--max-new-tokns 4: not known",
            "did you mean --max-new-tokens?",
        ),
        (
            ["generate", "r", "x", "--max_new_tokens=4"],
            "--max_new_tokens=4: not known",
            "did you mean --max-new-tokens?",
        ),
        (["docs", "add", "l", "d", "--text-kye", "t"], "known to retro docs add", "did you mean --text-key?"),
        (["trian", "--preset", "tiny"], "invalid choice: 'trian'", "did you mean train?"),
        (["eval"], "the following arguments are required: RUN", "retro eval --help"),
        (["generate", "r", "x", "--dtype", "fp8"], "invalid choice: 'fp8'", "did you mean fp32?"),
    ],
)
def test_what_is_mistyped_names_the_nearest(capsys: pytest.CaptureFixture[str], words: list[str], what: str, why: str) -> None:  # fmt: skip
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert what in error
    assert f"  {why}\n" in error
    assert len(error.splitlines()) <= 3


def test_version_and_what_training_needs(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--version"], ["train", "--help"]):
        with pytest.raises(SystemExit) as ended:
            run(*words)
        assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"retro-engine {__version__}\n")
    for needed in ("settings, key=value", "model.data.store=STORE", "--out RUN", "--preset tiny"):
        assert needed in out


def test_summaries_say_what_is_next(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And nothing but JSON with --json, nothing more than the result with --quiet."""
    (tmp_path / "a.txt").write_text("The old castle stands beside the river town. " * 40)
    prepare = ["prepare", tmp_path / "a.txt", "--tokenizer", work / "store", "--chunk-size", 16]
    assert run(*prepare, "--out", tmp_path / "s s") == 0
    out = capsys.readouterr().out
    assert "1 documents, " in out
    assert out.endswith(f"next:\n  retro build '{tmp_path}/s s'\n")
    assert run(*prepare, "--out", tmp_path / "s", "--quiet") == 0
    assert "next" not in capsys.readouterr().out
    assert run("neighbors", tmp_path / "s", "--stores", work / "store", "--k", 2) == 0
    out = capsys.readouterr().out
    assert "2 neighbors a chunk by bm25" in out
    assert f"  retro train --preset tiny --out runs/s model.data.store={tmp_path}/s model.chunk_size=16\n" in out
    store = f"model.data.store={work}/store"
    few = ["train", "--preset", "tiny", "--out", tmp_path / "r", store, "model.data.neighbors=bm25", *TINY]
    assert run(*few, "trainer.max_steps=2") == 0
    out = capsys.readouterr().out
    assert re.match(rf"{tmp_path}/r: 2 steps; loss \d.*; validation bits per byte on \d.*, off \d", out)
    assert f"  retro eval {tmp_path}/r\n" in out
    assert run(*few, "trainer.max_steps=2", "--json") == 0
    assert json.loads(capsys.readouterr().out)["step"] == 2


def damaged(work: Path, tmp_path: Path, name: str, kind: str) -> Path:
    """A copy of the work folder in which one file is damaged, or that of every checkpoint."""

    copy = tmp_path / "copy"
    shutil.copytree(work, copy)
    for path in copy.glob(name):
        raw = bytearray(path.read_bytes())
        path.unlink()
        if kind == "flip":
            raw[len(raw) // 2] ^= 1
        path.write_bytes(raw[: len(raw) // 2] if kind == "cut" else b"PK\x03\x04" + raw if kind == "foreign" else raw)
    return copy


@pytest.mark.parametrize("kind", ["cut", "flip", "foreign"])
@pytest.mark.parametrize(("name", "command"), [
    ("store/tokens-00000.bin", ["inspect", "{}/store", "--verify"]),
    ("store/manifest.json", ["inspect", "{}/store"]),
    ("store/tokenizer.json", ["generate", "{}/run", "river", "--stores", "{}/store"]),
    ("store/neighbors/bm25/ids-00000.bin", ["inspect", "{}/store/neighbors/bm25", "--verify"]),
    ("store/index/bm25/scores.npy", ["inspect", "{}/store/index/bm25"]),
    ("run/checkpoints/step-*/model.safetensors", ["generate", "{}/run", "river"]),
    ("run/checkpoints/step-*/config.json", ["generate", "{}/run", "river"]),
])  # fmt: skip
def test_damaged_input(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, command: list[str], kind: str
) -> None:
    copy = damaged(work, tmp_path, name, kind)
    assert run(*[part.format(copy) for part in command]) == 3
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) <= 3
    assert Path(name).name.removesuffix(".bin").split("-")[0] in error, error


BAD = {
    "missing file": (["prepare", "{}/no.txt"], 3, "does not exist"),
    "unknown kind": (["prepare", "{}/a.png"], 2, "unknown kind"),
    "empty file": (["prepare", "{}/empty.jsonl"], 3, "there is no document"),
    "binary file": (["prepare", "{}/binary.txt"], 3, "NUL byte"),
    "bad UTF-8": (["prepare", "{}/bad.txt"], 3, "not UTF-8"),
    "no text key": (["prepare", "{}/rows.jsonl", "--strict"], 3, "no key 'text'"),
    "not an object": (["prepare", "{}/list.jsonl", "--strict"], 3, "not a JSON object"),
    "no documents": (["prepare", "{}/none"], 3, "no input in"),
    "tokenizer missing": (["prepare", "{}/good.txt", "--tokenizer", "{}/no.json"], 3, "does not exist"),
    "tokenizer foreign": (["prepare", "{}/good.txt", "--tokenizer", "{}/list.jsonl"], 3, "not a tokenizer.json"),
    "chunk size": (["prepare", "{}/good.txt", "--chunk-size", "0"], 2, "chunk_size=0"),
    "store over another": (["prepare", "{}/good.txt", "--out", "{work}/store"], 2, "never changes"),
    "not a store": (["build", "{}/none"], 3, "is not a store"),
    "no such retriever": (["build", "{work}/store", "--retriever", "bm52"], 2, "did you mean bm25"),
    "table over another": (["build", "{work}/store"], 2, "never changes"),
    "k of 0": (["neighbors", "{work}/store", "--k", "0", "--name", "zero"], 2, "--k 0"),
    "mistyped key": (["train", "--out", "{}/r", "model.micro_batch_sizee=2"], 2, "did you mean model.micro_batch_size (int, default 4)?"),
    "mistyped preset": (["train", "--preset", "tinny"], 2, "did you mean tiny"),
    "chunk size of another store": (["train", "--preset", "tiny", "--out", "{}/r", "model.data.store={work}/store"], 2, "does not match the store"),
    "sequence not whole chunks": (["train", "--preset", "tiny", "--out", "{}/r", "model.encoder_seq_length=100"], 2, "whole chunks"),
    "k above K": (["train", "--preset", "tiny", "--out", "{}/r", "model.data.store='{work}/store'", "model.data.neighbors=bm25", *TINY, "model.num_neighbors=7"], 2, "--k 7"),
    "no store": (["train", "--preset", "tiny", "--out", "{}/r"], 2, "model.data.store is not set"),
    "run missing": (["generate", "{}/no", "x"], 3, "is not a trained run"),
    "run without checkpoint": (["eval", "{}/none"], 3, "no complete checkpoint"),
    "inspect nothing": (["inspect", "{}/none"], 3, "no manifest.json"),
    "fewer workers": (["prepare", "{}/good.txt", "--workers", "0"], 2, "--workers 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Each gives a three-line error and its exit code, and writes nothing."""
    command, code, message = BAD[name]
    contents = {
        "a.png": b"x", "empty.jsonl": b"", "binary.txt": b"\0\1\2", "bad.txt": b"caf\xe9 \xfa", "good.txt": b"good words",
        "rows.jsonl": b'{"body": "x"}\n', "list.jsonl": b"[1]\n",
    }  # fmt: skip
    for file, content in contents.items():
        (tmp_path / file).write_bytes(content)
    (tmp_path / "none").mkdir()
    monkeypatch.chdir(tmp_path)
    before = snapshot(work)
    assert run(*[part.format(tmp_path, work=work) for part in command]) == code
    error = capsys.readouterr().err
    assert "error: " in error
    assert message in error, error
    last = error[error.index("error: ") :].splitlines()
    assert len(last) <= 3
    assert all(line.startswith("  ") for line in last[1:])
    assert snapshot(work) == before, "something was written"
    assert not list(tmp_path.rglob("manifest.json"))
    assert not list(tmp_path.rglob("COMPLETE"))


def snapshot(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime for path in folder.rglob("*") if path.name != ".lock" and path.is_file()}


def test_a_table_of_another_store(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:

    write_corpus(tmp_path / "c.jsonl", 5, seed=9)
    assert (
        run("prepare", tmp_path / "c.jsonl", "--out", tmp_path / "s", "--tokenizer", work / "store", "--chunk-size", 16)
        == 0
    )
    shutil.copytree(work / "store/neighbors", tmp_path / "s/neighbors")
    assert (
        run(
            "train",
            "--preset",
            "tiny",
            "--out",
            tmp_path / "r",
            f"model.data.store='{tmp_path}/s'",
            "model.data.neighbors=bm25",
            *TINY,
        )
        == 3
    )
    error = capsys.readouterr().err
    assert Store(work / "store").fingerprint[:12] in error
    assert Store(tmp_path / "s").fingerprint[:12] in error


@pytest.mark.parametrize("documents", [1, 2, 10])
def test_small_corpora_go_all_the_way(tmp_path: Path, documents: int) -> None:
    """One document, two, ten: prepare, build, train, eval and generate work."""
    write_corpus(tmp_path / "c.jsonl", documents, words=8)
    assert run("prepare", tmp_path / "c.jsonl", "--out", tmp_path / "s", "--vocab-size", 300, "--chunk-size", 64) == 0
    assert run("build", tmp_path / "s") == 0
    settings = [s for s in TINY if "chunk_size" not in s]
    assert run("train", "--preset", "tiny", "--out", tmp_path / "r", f"model.data.store='{tmp_path}/s'", *settings) == 0
    assert run("eval", tmp_path / "r", "--share", "all") == 0
    assert run("generate", tmp_path / "r", "river", "inference.tokens_to_generate=5") == 0


def test_no_disk_space(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with small_disk(tmp_path, "64k") as disk:
        write_corpus(tmp_path / "c.jsonl", 400)
        assert run("prepare", tmp_path / "c.jsonl", "--out", disk / "s", "--vocab-size", 300) == 5
        assert "no space left" in capsys.readouterr().err
        assert not (disk / "s" / "manifest.json").exists()


def test_a_bug_leaves_its_trace(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(_: object) -> int:
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(doctor, "run", broken)
    assert run("doctor") == 1
    error = capsys.readouterr().err
    assert "on purpose" in Path(error.split()[-1]).read_text()


def test_a_requirement_that_is_missing_is_no_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without(_: object) -> int:
        raise ModuleNotFoundError("No module named 'numpy'", name="numpy")

    monkeypatch.setattr(doctor, "run", without)
    assert run("doctor") == 4
    assert "numpy is not installed" in capsys.readouterr().err


def test_errors_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", "/nowhere", "--json") == 3
    assert json.loads(capsys.readouterr().err)["exit_code"] == 3


def test_names_that_are_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Read, wherever they stand in a path; not written, for some libraries that write do not take them. No trace."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"The castle number {number} stands beside the old river town.")
    assert run("prepare", folder, "--out", tmp_path / "s", "--vocab-size", 300, "--chunk-size", 8) == 0
    for command in (("prepare", folder), ("docs", "add", folder / "lib", folder, "--store", tmp_path / "s")):
        out = ("--out", folder / "out") if command[0] == "prepare" else ()
        assert run(*command, *out) == 2
        assert "its name is not UTF-8" in capsys.readouterr().err
    (tmp_path / "s").rename(folder / "s")
    for words in (
        ("inspect", folder / "s", "--verify"),
        ("build", folder / "s"),
        ("inspect", folder / "s/neighbors/bm25"),
    ):
        assert run(*words) in (0, 2, 3), words
        assert "this is a bug" not in capsys.readouterr().err


@pytest.mark.parametrize("is_read", [True, False])
def test_the_process_ends_without_a_teardown_once_all_is_written(
    is_read: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the last words cannot be written the interpreter's own end says it."""
    done: list[object] = []

    class Out(io.StringIO):
        def flush(self) -> None:
            if not is_read:
                raise BrokenPipeError
            done.append("flushed")

    monkeypatch.setattr(cli_main, "main", lambda: 6)
    monkeypatch.setattr(threading, "_shutdown", lambda: done.append("threads"))
    monkeypatch.setattr(atexit, "_run_exitfuncs", lambda: done.append("registered"))
    monkeypatch.setattr(os, "_exit", done.append)
    with contextlib.redirect_stdout(Out()):
        code = cli_main.command()
    assert done == ["threads", "registered", *(["flushed", 6] if is_read else [])]
    assert is_read or code == 6
