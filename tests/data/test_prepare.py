"""`retro prepare` end to end: reproducible, flat in memory, and small corpora that must work."""

import errno
import io
import json
import os
import sys
import time
from pathlib import Path

import pytest
from forks import Fork
from helpers import write_corpus

from retro_engine.cli import main
from retro_engine.data import files
from retro_engine.data.corpus import Reader
from retro_engine.data.prepare import prepare
from retro_engine.errors import MissingInputError, OutOfResourceError, StoreError
from retro_engine.retrieval.neighbors import build_neighbors


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "c.jsonl", 200)
    stores = [prepare([source], tmp_path / name, vocab_size=400) for name in ("a", "b")]
    assert stores[0].fingerprint == stores[1].fingerprint
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_rows_set_aside_are_listed_and_the_rest_is_kept(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "c.jsonl", 5)
    source.write_bytes(source.read_bytes() + b'{"no": 1}\n[]\n\xff\n')
    said: list[str] = []
    store = prepare([source], tmp_path / "s", vocab_size=300, say=said.append)
    assert store.num_documents == 5
    listed = [json.loads(line) for line in (tmp_path / "s" / "set_aside.jsonl").read_text().splitlines()]
    assert [row["source"] for row in listed] == [f"{source}:{i}" for i in (6, 7, 8)]
    assert "3 rows set aside" in said[-1]
    assert store.counts["set_aside"] == 3
    with pytest.raises(StoreError, match=r"c.jsonl:6: no key 'text'"):
        prepare([source], tmp_path / "t", vocab_size=300, is_strict=True)
    assert not (tmp_path / "t" / "manifest.json").exists()


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOMEM, errno.EIO])
def test_what_the_system_let_nobody_read_is_not_left_out(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [write_corpus(tmp_path / f"{name}.jsonl", 5) for name in "ab"]
    real = files.open_file

    def opened(path: Path) -> object:
        if path.name == "b.jsonl" and is_failing:
            raise OSError(code, os.strerror(code))
        return real(path)

    is_failing = True
    monkeypatch.setattr(files, "open_file", opened)
    monkeypatch.setattr(files, "sha256_file", lambda path: "0")  # which reads it before
    with pytest.raises(OutOfResourceError, match=r"b\.jsonl was not read"):
        prepare(sources, tmp_path / "s", vocab_size=300)
    assert not (tmp_path / "s" / "manifest.json").exists()
    is_failing = False
    monkeypatch.undo()
    assert prepare(sources, tmp_path / "s", vocab_size=300).num_documents == 10


def test_files_passed_over_are_said_and_listed_but_no_rows(tmp_path: Path) -> None:
    """Whatever their names are made of; a stray file does not change the store, and only a fault stops --strict."""
    import os

    folder = tmp_path / "in"
    folder.mkdir()
    for name in (b"caf\xe9.txt", b"notes.odt", b".hidden"):
        with open(os.fsencode(folder) + b"/" + name, "w") as file:
            file.write("words of a text")
    said: list[str] = []
    store = prepare([folder], tmp_path / "s", vocab_size=300, say=said.append, is_strict=True)
    assert store.name(0) == (f"{folder}/caf\\xe9.txt", "caf\\xe9")
    assert said[:3] == [
        f"passed over: {folder}/.hidden: hidden: its name starts with a dot",
        f"passed over: {folder}/notes.odt: of an unknown kind",
        f"2 passed over, listed in {tmp_path}/s/set_aside.jsonl",
    ]
    listed = [json.loads(line) for line in (tmp_path / "s" / "set_aside.jsonl").read_text().split("\n")[:-1]]
    assert [row["reason"] for row in listed] == ["hidden: its name starts with a dot", "of an unknown kind"]
    assert store.counts["set_aside"] == 0
    (folder / "gone.txt").symlink_to("nowhere")
    assert prepare([folder], tmp_path / "t", vocab_size=300).fingerprint == store.fingerprint
    with pytest.raises(StoreError, match=r"gone.txt: a link to nothing"):
        prepare([folder], tmp_path / "u", vocab_size=300, is_strict=True)


def test_nothing_usable(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(StoreError, match="there is no document"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "s")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingInputError, match="no input in"):
        prepare([tmp_path / "empty"], tmp_path / "s")
    assert not (tmp_path / "s" / "manifest.json").exists()


def test_other_keys_and_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for raw in (b'{"body": "some words"}\n', b"plain words of one document"):
        monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": io.BytesIO(raw)}))
        out = tmp_path / str(len(raw))
        store = prepare(["-"], out, vocab_size=300, reader=Reader(text_key="body"))
        assert store.num_documents == 1
        assert not list(out.glob(".stdin*"))


@pytest.mark.parametrize(
    "documents", [["one word"], ["a"], [f"document {i} of ten" for i in range(10)], ["short", "also short"]]
)
def test_small_corpora_work_with_a_note(tmp_path: Path, documents: list[str]) -> None:
    """Documents shorter than one chunk, one document only, ten documents, a corpus of one chunk."""
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    said: list[str] = []
    store = prepare([tmp_path / "c.jsonl"], tmp_path / "s", vocab_size=300, say=said.append)
    assert store.num_rows == store.num_documents == len(documents)
    assert any("shorter than one chunk" in line for line in said)
    assert any("one document only" in line for line in said) == (len(documents) == 1)
    for retriever in ("bm25", "hash"):
        table = build_neighbors(store, [store], retriever, num_neighbors=4)
        assert table.num_neighbors == 4


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """Four times the text (the first already fills a shard), the same memory."""
    import subprocess

    peaks = []
    for copies in (1, 4):
        source = tmp_path / f"{copies}.jsonl"
        line = json.dumps({"text": "documentation tokenizers encyclopedia architecture. " * 400}) + "\n"
        source.write_text(line * (500 * copies))  # 10 and 40 MB
        code = (
            "from pathlib import Path; from retro_engine.data import prepare as p; p.SAMPLE_BYTES = 1 << 20\n"
            f"p.prepare([{str(source)!r}], Path({str(tmp_path / f's{copies}')!r}), vocab_size=400, chunk_size=2)\n"
            "print(*[line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] < peaks[0] * 1.18, peaks  # KiB; ru_maxrss would count what the parent had before exec


def test_kill_9_and_again_gives_the_same_bytes(tmp_path: Path) -> None:
    """Killed anywhere, a store is not there; run again, it is the one that an undisturbed run writes."""
    source = write_corpus(tmp_path / "c.jsonl", 4000)
    words = ["prepare", str(source), "--vocab-size", "400", "--chunk-size", "8", "--quiet", "--out"]
    start = time.monotonic()
    assert main([*words, str(tmp_path / "whole")]) == 0
    duration = time.monotonic() - start
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    for number in range(200 if os.environ.get("RETRO_CAMPAIGN") else 2):
        out = tmp_path / f"killed{number}"
        with Fork(main, [*words, str(out)]) as process:
            while process.is_running() and not out.exists():
                time.sleep(0.001)
            time.sleep(duration * (0.5 + 0.24 * (number % 3)))
        if not (out / "manifest.json").exists():
            assert main([*words, str(out)]) == 0
        found = {path.name: path.read_bytes() for path in out.iterdir()}
        assert found == expected


def test_an_interrupted_run_goes_on_after_its_last_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in any shard: finished ones are not written again, the tokenizer is not trained again, same bytes."""
    from retro_engine.data import prepare as module
    from retro_engine.data import store as store_module

    monkeypatch.setattr(store_module, "SHARD_ROWS", 50)
    source = write_corpus(tmp_path / "c.jsonl", 200)
    source.write_bytes(b"[]\n" + source.read_bytes() + b"{}\n")
    prepare([source], tmp_path / "whole", vocab_size=300, chunk_size=16)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    shards = len(list((tmp_path / "whole").glob("shard-*.ok")))
    assert shards > 8
    for stop in (1, 7):
        out = tmp_path / f"s{stop}"
        real = store_module.array_file.write_array

        def failing(path: Path, *given: object, stop: int = stop, real: object = real) -> str:
            if path.name == f"documents-{stop:05d}.bin":
                raise KeyboardInterrupt
            return real(path, *given)  # type: ignore[operator]

        with monkeypatch.context() as patch:
            patch.setattr(store_module.array_file, "write_array", failing)
            with pytest.raises(KeyboardInterrupt):
                prepare([source], out, vocab_size=300, chunk_size=16)
        before = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.ok")}
        assert len(before) == stop
        damaged = out / "tokens-00000.bin"
        if stop == 7:  # then everything from there on is written again
            raw = damaged.read_bytes()
            damaged.unlink()
            damaged.write_bytes(raw[:-1])
        with monkeypatch.context() as patch:
            patch.setattr(module, "_train_tokenizer", None)
            prepare([source], out, vocab_size=300, chunk_size=16)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == expected
        after = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.ok")}
        assert (before.items() <= after.items()) == (stop != 7)


def test_other_inputs_start_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run over other text left behind is not mixed in."""
    from retro_engine.data import store as store_module

    monkeypatch.setattr(store_module, "SHARD_ROWS", 50)
    source = write_corpus(tmp_path / "c.jsonl", 60)
    prepare([source], tmp_path / "out", vocab_size=300, chunk_size=16)
    (tmp_path / "out" / "manifest.json").unlink()
    write_corpus(tmp_path / "c.jsonl", 50, seed=5)
    again = prepare([source], tmp_path / "out", vocab_size=300, chunk_size=16)
    fresh = prepare([source], tmp_path / "fresh", vocab_size=300, chunk_size=16)
    assert again.fingerprint == fresh.fingerprint
    names = sorted(path.name for path in (tmp_path / "fresh").iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
