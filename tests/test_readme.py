"""Every command and every Python example of the README runs, at the small sizes named in SIZES; docs/tree.md is true."""

import os
import re
import shutil
from pathlib import Path

import pytest
from helpers import write_corpus
from shell_blocks import ROOT, blocks, commands, run

README, COMMANDS = ROOT / "README.md", ROOT / "docs" / "commands.md"
NOT_RUN = ("make", "git", "cd", "bash")  # what runs these tests, or needs a clone of its own
MODEL = (
    "model.hidden_size=48 model.ffn_hidden_size=64 model.num_attention_heads=2 model.encoder_seq_length=128 "
    "trainer.max_steps=3 trainer.precision=32 trainer.limit_val_batches=1"
)
CORPUS = "../shared/data/wikipedia-featured-good.jsonl.zst"
DEMO_TEXT = "python-docs" if os.environ.get("RETRO_CAMPAIGN") else CORPUS  # all of Python's takes a minute and more
SIZES = {  # appended to a command, so that it ends in seconds; the last value of a setting counts
    f"retro demo {DEMO_TEXT}": "--steps 2 model.hidden_size=48 model.ffn_hidden_size=64 model.num_attention_heads=2",
    "retro demo": "--steps 2 --no-gate",
    "retro prepare": "--vocab-size 400",
    "retro train": MODEL,
    "torchrun": MODEL,
    "retro eval": "--limit 1",
    "retro generate": "--max-new-tokens 4",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the README's commands read: some text files and a corpus under ../shared."""
    base = tmp_path_factory.mktemp("readme")
    place = base / "here"
    (place / "docs").mkdir(parents=True)
    for number in range(12):
        (place / "docs" / f"{number}.md").write_text(
            f"# Page {number}\n\nThe neighbor table of page {number} names what nobody else holds. " * 6
        )
    data = base / "shared" / "data"
    data.mkdir(parents=True)
    import zstandard

    raw = write_corpus(data / "plain.jsonl", 60).read_bytes()
    (data / "wikipedia-featured-good.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(raw))
    return place


def test_the_commands_run(place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Those of the README, then the other choices of docs/commands.md, which go on with its stores and run."""
    shell = place.parent / "shell"
    shell.mkdir()
    found = [block for block in blocks(README) if not block.marker.startswith("not run")]
    found += [block for block in blocks(COMMANDS) if block.marker == "run"]
    words_of = [words for block in found for words in commands(block, shell) if words[0] not in NOT_RUN]
    stages = {" ".join(words[:2]) for words in words_of}
    assert {f"retro {name}" for name in ("prepare", "build", "train", "eval", "generate", "demo")} <= stages
    assert any(words[0] == "torchrun" for words in words_of)
    monkeypatch.chdir(place)
    for words in words_of:
        line = " ".join(DEMO_TEXT if word == "python-docs" else word for word in words)
        size = next((extra for prefix, extra in SIZES.items() if line.startswith(prefix)), "")
        done = run([*(DEMO_TEXT if word == "python-docs" else word for word in words), *size.split()])
        out, err = capfd.readouterr()
        assert done == 0, f"{line} {size}\n{out[-2000:]}\n{err[-2000:]}"


def test_the_python_examples_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    examples = blocks(README, "python")
    assert len(examples) >= 2
    for example in examples:
        small = example.text.replace("steps=400", "steps=3").replace("max_new_tokens=64", "max_new_tokens=4")
        shutil.rmtree(place / "runs" / "mine", ignore_errors=True)
        exec(compile(small, str(example), "exec"), {})


def test_the_file_tree_is_true() -> None:
    """Every path of docs/tree.md exists, and every module is in it; the README names every room."""
    tree = re.search(r"^```text\n(.*?)^```", (ROOT / "docs" / "tree.md").read_text(), re.M | re.S)
    assert tree is not None
    parents: list[str] = []
    for line in tree[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        path = "".join([*parents[:depth], name])
        assert (ROOT / path).exists(), path
        parents[depth:] = [name if name.endswith("/") else f"{name}/"]
    package = (ROOT / "retro_engine").rglob("*.py")
    modules = [path.relative_to(ROOT / "retro_engine") for path in package if not path.name.startswith("__")]
    for module in modules:
        room = rf"^  {module.parts[0]}/ .*\n(?:    .*\n)*" if len(module.parts) > 1 else r"(?s).*"
        lines = re.search(room, tree[1], re.M)
        assert lines is not None, room
        is_named = re.search(rf"\b({module.stem}\b|{module.stem.split('_')[0]}\*)", lines[0])
        assert is_named, f"{module} is not in docs/tree.md"
    rooms = {module.parts[0].removesuffix(".py") for module in modules} - {
        "errors",
        "version",
        "progress",
        "jit",
        "threads",
        "report",
    }
    assert all(f"`{room}`" in README.read_text() for room in rooms), rooms


def test_every_figure_is_filled_in() -> None:
    prose = re.sub(r"```.*?```|`[^`]*`", "", README.read_text(), flags=re.S)
    assert not re.findall(r"\b[A-Z]{3,}_[A-Z_]+\b", prose)


def test_length() -> None:
    assert len(README.read_text().splitlines()) <= 200
