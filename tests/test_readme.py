"""Every command and every Python example of the README runs, at the small sizes named in SIZES."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import write_corpus

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
NOT_RUN = ("make ", "git ", "cd ", "bash ")  # what runs these tests, or needs a clone of its own
MODEL = (
    "model.hidden_size=48 model.ffn_hidden_size=64 model.num_attention_heads=2 model.encoder_seq_length=128 "
    "trainer.max_steps=3 trainer.precision=32 trainer.limit_val_batches=1"
)
CORPUS = "../shared/data/wikipedia-featured-good.jsonl.zst"
DEMO_TEXT = "python-docs" if os.environ.get("RETRO_CAMPAIGN") else CORPUS  # all of Python's takes a minute and more
SIZES = {  # appended to a command, so that it ends in seconds; the last value of a setting counts
    f"retro demo {DEMO_TEXT}": "--steps 2 model.hidden_size=48 model.ffn_hidden_size=64 model.num_attention_heads=2",
    "retro demo": "--steps 8 --no-gate",
    "retro prepare": "--vocab-size 400",
    "retro train": MODEL,
    "torchrun": MODEL,
    "retro eval": "--limit 1",
    "retro generate": "--max-new-tokens 4",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def commands() -> list[str]:
    joined = "\n".join(blocks("sh")).replace("\\\n", " ")
    lines = [line.split("  #")[0].strip() for line in joined.splitlines()]
    return [line for line in lines if line and not line.startswith(("#", *NOT_RUN))]


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


def test_there_are_commands() -> None:
    found = commands()
    for stage in ("prepare", "build", "train", "eval", "generate", "demo"):
        assert any(line.startswith(f"retro {stage}") for line in found), stage
    assert any(line.startswith("torchrun") for line in found)


def test_the_commands_run(place: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for line in commands():
        line = line.replace("demo python-docs", f"demo {DEMO_TEXT}")
        size = next((extra for prefix, extra in SIZES.items() if line.startswith(prefix)), "")
        done = subprocess.run(f"{line} {size}", shell=True, cwd=place, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line} {size}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_the_python_examples_run(place: Path) -> None:
    examples = blocks("python")
    assert len(examples) >= 2
    for number, example in enumerate(examples):
        small = example.replace("steps=400", "steps=3").replace("max_new_tokens=64", "max_new_tokens=4")
        shutil.rmtree(place / "runs" / "mine", ignore_errors=True)
        done = subprocess.run([sys.executable, "-c", small], cwd=place, capture_output=True, text=True)
        assert done.returncode == 0, f"example {number}\n{done.stderr[-2000:]}"


def test_the_file_tree_is_true() -> None:
    """Every path of the README's tree exists, and every module is in it."""
    tree = re.search(r"^```text\n(.*?)^```", README[README.index("## File tree") :], re.M | re.S)
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
        assert is_named, f"{module} is not in the README's tree"


def test_every_figure_is_filled_in() -> None:
    prose = re.sub(r"```.*?```|`[^`]*`", "", README, flags=re.S)
    assert not re.findall(r"\b[A-Z]{3,}_[A-Z_]+\b", prose)


def test_length() -> None:
    assert len(README.splitlines()) <= 250
