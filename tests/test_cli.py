"""The command line: three-line errors, exit codes, nothing written or lost; and the commands one after another."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import small_disk, write_corpus

from retro_engine import cli
from retro_engine.data.store import Store

TINY = [
    "model.hidden_size=32", "model.ffn_hidden_size=64", "model.num_attention_heads=2", "model.init=standard",
    "model.encoder_seq_length=64", "trainer.max_steps=4", "trainer.precision=32", "model.chunk_size=16",
    "model.data.splits_string='70,30,0'", "trainer.val_check_interval=2",
]  # fmt: skip


def run(*args: object) -> int:
    return cli.main([str(arg) for arg in args])


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, its store and table, and a run of 4 steps, made by the commands themselves."""
    folder = tmp_path_factory.mktemp("work")
    write_corpus(folder / "corpus.jsonl", 30)
    assert (
        run("prepare", folder / "corpus.jsonl", "--out", folder / "store", "--vocab-size", 300, "--chunk-size", 16) == 0
    )
    assert run("build", folder / "store", "--k", 6) == 0
    assert run("train", "--preset", "tiny", "--out", folder / "run", f"model.data.store={folder}/store", *TINY) == 0
    return folder


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
    code = "import sys, retro_engine, retro_engine.cli; retro_engine.cli._parser(); print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for heavy in ("torch", "numpy", "faiss", "omegaconf", "tokenizers"):
        assert f"'{heavy}'" not in loaded


def test_eval(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("eval", work / "run", "--json", "--quiet") == 0
    result = json.loads(capsys.readouterr().out)
    assert {"on", "off", "random"} <= set(result)
    assert run("eval", work / "run", "--neighbors", "river stone", "--modes", "off,given") == 0
    assert re.search(r"^given +\d\.\d+", capsys.readouterr().out, re.M)
    assert run("eval", work / "run", "--fail-if", "bpb_on>0.001", "--limit", 1) == 6
    assert "error: --fail-if bpb_on>0.001 is true" in capsys.readouterr().err
    assert run("eval", work / "run", "--fail-if", "bpb_on<0.001", "--limit", 1, "--share", "all") == 0
    assert run("eval", work / "run", "--limit", 1, "--against", work / "run") == 2
    assert "is a RETRO" in capsys.readouterr().err
    for wrong in (["--fail-if", "import os"], ["--modes", "onn"], ["--modes", "given"]):
        assert run("eval", work / "run", "--limit", 1, *wrong) == 2


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
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("river\n\nstone\n"))
    assert (
        run("generate", work / "run", "-i", "--json", "inference.tokens_to_generate=3", "--index", work / "store") == 0
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
    for weights in ("int8", "bf16"):
        assert generated("--weights", weights)["segments"]
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
    for stores in ([], ["--index", work / "store"]):
        asked = ["the quarry by the river", "--library", library, "--json", "inference.tokens_to_generate=3"]
        assert run("generate", work / "run", *asked, *stores) == 0
        hits = json.loads(capsys.readouterr().out)["segments"][0]["neighbors"]
        assert hits[0]["text"].startswith("The quarry")
        assert len(hits) == (2 if stores else 1)
    assert run("generate", work / "run", "river", "--library", tmp_path / "none") == 3


def test_inspect_config_and_doctor(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, kind in (
        (work / "store", "store"),
        (work / "store/neighbors/bm25", "neighbors"),
        (work / "store/index/bm25", "index"),
        (work / "run", "checkpoint"),
    ):
        assert run("inspect", path, "--verify") == 0
        assert f"kind: {kind}" in capsys.readouterr().out
    assert run("inspect", work / "store/neighbors/bm25", "--samples", 2) == 0
    assert "[d" in capsys.readouterr().out
    assert run("config", "keys", "model.optim") == 0
    assert "model.optim.lr (float) = 0.0006" in capsys.readouterr().out
    assert run("config", "show", "--preset", "tiny") == 0
    (work / "a.yaml").write_text(capsys.readouterr().out)
    assert run("config", "show", "--preset", "tiny", "seed=5") == 0
    (work / "b.yaml").write_text(capsys.readouterr().out)
    assert run("config", "diff", work / "a.yaml", work / "b.yaml") == 0
    assert capsys.readouterr().out == "seed: 1234 -> 5\n"
    assert run("doctor") == 0
    assert "loader:" in capsys.readouterr().out
    assert run("embed", work / "store") == 0
    assert run("index", work / "store", "--retriever", "hash") == 0
    assert run("neighbors", work / "store", "--retriever", "hash", "--k", 2) == 0


def test_a_dry_run_writes_nothing(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [f"model.data.store={work}/store", "model.data.neighbors=bm25", *TINY]
    assert run("train", "--preset", "tiny", "--dry-run", "--out", tmp_path / "r", *settings) == 0
    assert "4 steps; 21 documents" in capsys.readouterr().out
    assert run("train", "--print-config", "--device", "cpu", "--seed", 7, *settings) == 0
    shown = capsys.readouterr().out
    assert "accelerator: cpu" in shown
    assert "seed: 7" in shown
    assert not list(tmp_path.iterdir())


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
    with pytest.raises(SystemExit):
        run("eval", work / "run", "something")


def test_torchrun_of_one_process(work: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "-m", "retro_engine.train", "--preset", "tiny",
               "--out", str(tmp_path / "run"), f"model.data.store='{work}/store'", "model.data.neighbors=bm25", *TINY]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["step"] == 4


def damaged(work: Path, tmp_path: Path, name: str, kind: str) -> Path:
    """A copy of the work folder in which one file is damaged."""
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(work, copy)
    path = next(copy.glob(name))
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
    ("store/tokenizer.json", ["generate", "{}/run", "river", "--index", "{}/store"]),
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
    "unknown kind": (["prepare", "{}/a.pdf"], 2, "unknown kind"),
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
        "a.pdf": b"x", "empty.jsonl": b"", "binary.txt": b"\0\1\2", "bad.txt": b"caf\xe9 \xfa", "good.txt": b"good words",
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
    import shutil

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

    monkeypatch.setattr(cli, "_doctor", broken)
    assert run("doctor") == 1
    error = capsys.readouterr().err
    assert "on purpose" in Path(error.split()[-1]).read_text()


def test_errors_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", "/nowhere", "--json") == 3
    assert json.loads(capsys.readouterr().err)["exit_code"] == 3


def test_inspect_says_what_everything_is_and_whether_it_is_whole(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stores, tables, embeddings and indexes: what, from what, whole, of their store; and samples."""
    shutil.copytree(work / "store", tmp_path / "store")
    store = tmp_path / "store"
    assert run("build", store, "--retriever", "hybrid", "--embedder", "hash", "--k", 4, "--quiet") == 0
    capsys.readouterr()
    paths = ["neighbors/hybrid", "index/bm25", "index/hash", "embeddings/hash", ""]
    for name in paths:
        assert run("inspect", store / name, "--verify", "--samples", 2) == 0, name
        out = capsys.readouterr().out
        assert "verified: True" in out
        assert len(out.splitlines()) > 8
    assert run("inspect", store / "neighbors/hybrid") == 0
    out = capsys.readouterr().out
    assert "similarity: mean" in out
    assert "of the neighbors missing" in out
    assert run("inspect", store / "neighbors/hybrid", "--json") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    for name, victim in (("index/hash", "embeddings/hash/vectors-00000.npy"), ("index/bm25", "index/bm25/scores.npy")):
        raw = bytearray((store / victim).read_bytes())
        raw[-2] ^= 8
        (store / victim).unlink()
        (store / victim).write_bytes(raw)
        assert run("inspect", store / name, "--verify") == 3
        assert "is damaged" in capsys.readouterr().err
    assert run("build", store, "--retriever", "hybrid", "--embedder", "hash", "--name", "again") == 0
    said = capsys.readouterr().err
    assert said.count("is damaged: it is built again") == 2
    assert run("inspect", store / "index" / "hash", "--verify") == 0


def test_flags_of_building_that_cannot_be_used(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {
        ("--executor", "processes!"): 2,
        ("--workers", "0"): 2,
        ("--retriever", "bm52"): 2,
        ("--retriever", "hash", "--index", "IVF!"): 2,
        ("--retriever", "hybrid", "--embedder", "hash", "--fusion", "-1", "1"): 2,
        ("--weights", "0"): 2,
        ("--near-duplicates", "1.5"): 2,
        ("--k", "0"): 2,
        ("--k", "-3"): 2,
        ("--retriever", "hash", "--stop-words", "none"): 2,
        ("--stop-words", "englisch"): 2,
    }
    for number, (flags, code) in enumerate(wrong.items()):
        assert run("neighbors", work / "store", "--name", f"no{number}", *flags) == code, flags
        assert capsys.readouterr().err.startswith("error: "), flags
    assert run("embed", work / "store", "--retriever", "bm25") == 2
    assert run("neighbors", work / "store", "--name", "wide", "--k", "10000", "--quiet") == 0


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
    for command in (
        ("inspect", folder / "s", "--verify"),
        ("build", folder / "s"),
        ("inspect", folder / "s/neighbors/bm25"),
    ):
        assert run(*command) in (0, 2, 3), command
        assert "this is a bug" not in capsys.readouterr().err
