"""Docs are true: shell blocks go through bash and the real parsers, examples run, links lead somewhere, the picture is its script's."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
import torch
from shell_blocks import PAGES, ROOT, Block, blocks, commands

from retro_engine.bench import checkout
from retro_engine.bench.__main__ import BENCHES, TAKEN_BY
from retro_engine.cli.main import read
from retro_engine.config import Config, flat_keys, load_config, nemo_keys, nemo_names
from retro_engine.config.hints import nearest_key
from retro_engine.errors import RetroError

DOCS = ROOT / "docs"
OTHERS = {"serve", "git", "cd", "export", "mkdir", "curl", "cat"}  # programs of which nothing is held
BENCH_FLAGS = {*TAKEN_BY, "out", "threads", "plot"}


@pytest.fixture(scope="module")
def called(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Block, list[str]]]:
    """Every command of every shell block, as bash calls it."""
    place = tmp_path_factory.mktemp("shell")
    return [(block, words) for page in PAGES for block in blocks(page) for words in commands(block, place)]


def test_the_shell_blocks_call_what_there_is(called: list[tuple[Block, list[str]]]) -> None:
    """Flags and settings are read by the command's own parser, as bash hands them over."""
    wrong = []
    for block, (program, *words) in called:
        try:
            check(program, words)
        except (RetroError, AssertionError) as error:
            wrong.append(f"{block}: {program} {' '.join(words)}\n  {error}")
    assert not wrong, "\n".join(wrong)
    programs = {words[0] for _, words in called}
    assert {"retro", "torchrun", "make", "pip", "python"} <= programs and len(called) > 100


def check(program: str, words: list[str]) -> None:
    """Raise for words that `program` would refuse."""
    if program == "torchrun":
        place = words.index("retro_engine.train")
        program, words = "retro", ["train", *words[place + 1 :]]
    if program == "retro":
        if "--version" not in words and "--help" not in words:
            args = read(words)
            if args.command == "train" or args.overrides:
                base = [("model.init_from", args.init_from)] if getattr(args, "init_from", None) else []
                load_config([*args.overrides, *base], getattr(args, "preset", None), say=lambda text: None)
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text()
        targets = [word for word in words if "=" not in word]
        assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets), "no such target"
    elif program in ("python", "bash", "sh"):
        check_script(words)
    elif program == "pip":
        check_pip(words)
    else:
        assert program in OTHERS, "nothing here knows this program"


def check_script(words: list[str]) -> None:
    if words[:2] == ["-m", "retro_engine.bench"]:
        known = {*BENCHES, *checkout.benches()}
        assert words[2] in known, f"one of {sorted(known)}"
        flags = [word[2:] for word in words if word.startswith("--")]
        assert set(flags) <= BENCH_FLAGS, flags
    elif words[0] == "-c":
        compile(words[1], "-c", "exec")
    elif not re.match(r"YOUR_", words[0]):
        assert (ROOT / words[0]).is_file(), "no such file"


def check_pip(words: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [name for word in words for found in re.findall(r"\[(.*)\]", word) for name in found.split(",")]
    assert all(name in project["optional-dependencies"] for name in extras), extras


def test_the_example_of_the_kernels_page() -> None:
    """Every op in a plain PyTorch model that is not ours."""
    page = DOCS / "kernels.md"
    (code,) = [block.text for block in blocks(page, "python")]
    names: dict[str, object] = {}
    exec(compile(code, str(page), "exec"), names)
    for parameter in (names["embed"].weight, names["project"].weight):  # type: ignore[attr-defined]
        assert parameter.grad.abs().sum() > 0
    assert "retro_engine" not in code


def test_the_layer_of_the_tutorial() -> None:
    layer, loss = [block.text for block in blocks(DOCS / "tutorial-kernels.md", "python")]
    names: dict[str, object] = {}
    exec(layer, names)
    assert names["out"].shape == (2, 48, 64)  # type: ignore[attr-defined]
    assert all(parameter.grad.norm() > 0 for parameter in names["layer"].parameters())  # type: ignore[attr-defined]
    exec(loss, names)
    logits, labels = names["logits"], names["labels"]
    torch.testing.assert_close(names["loss"], names["expected"])
    own = logits.grad  # type: ignore[attr-defined]
    torch.nn.functional.cross_entropy(again := logits.detach().requires_grad_(), labels, ignore_index=-1).backward()  # type: ignore[attr-defined, arg-type]
    torch.testing.assert_close(own, again.grad)


def test_links_lead_somewhere() -> None:
    """Relative links of README, CONTRIBUTING and docs, with their anchors; `make docs` builds the site strictly too."""
    wrong = []
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            if re.match(r"[a-z]+:", link):
                continue
            if not target.exists() or anchor and anchor not in anchors(target):
                wrong.append(f"{page.name}: {link}")
    assert not wrong, wrong


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """As GitHub and Python-Markdown both make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


def test_the_picture_is_what_its_script_draws() -> None:
    spec = importlib.util.spec_from_file_location("architecture", DOCS / "architecture.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DOCS / "architecture.svg").read_text(encoding="utf-8") == module.draw(), "python docs/architecture.py"


def test_the_keys_of_others_are_side_by_side_with_ours() -> None:
    """docs/coming-from.md has every name that config/nemo_names.py and nemo_keys.py know, and names no key of ours that there is not."""
    text = (DOCS / "coming-from.md").read_text(encoding="utf-8")
    known = {*flat_keys(Config())}
    named = re.findall(r'"((?:model|trainer|exp_manager)\.[\w.]*\w)"', Path(nemo_names.__file__).read_text())
    values = {*nemo_names.PRECISIONS, *nemo_names.OPTIMIZERS, *nemo_names.SCHEDULES, *named}
    whole = {name.lstrip("-") for name in re.findall(r"[\w.-]+", text)}
    assert not [name for name in {*values, *nemo_keys.RENAMED, *nemo_keys.ONLY} if name not in whole]
    (nothing,) = re.findall(r"^Settings that mean nothing here.*?\n\n", text, re.M | re.S)
    lines = re.findall(r"(?:^|`((?:\w+\.)+)`: )([^;]*)", nothing.split(": ", 1)[1])
    listed = {section + name for section, names in lines for name in re.findall(r"`(\w+)`", names)} - {
        "exp_manager.save_top_k"
    }
    assert listed == {key.removesuffix(".") for key in nemo_keys.MEANINGLESS}
    ours = [
        row.split(" | ", 1)[1]
        for row in re.findall(r"^\| (?!\(|`(?:model|trainer|exp_manager|inference)\.` ).*", text, re.M)
    ]
    keys = re.findall(r"\b(?:model|trainer|exp_manager|inference)\.[\w.]*\w", " ".join(ours))
    assert len(keys) > 50 and not [key for key in keys if key not in known]
    same = re.findall(r"^\| `((?:\w+\.)+)` \| (.*) \|$", text, re.M)
    assert len(same) == 6
    for section, names in same:
        assert not [name for name in re.findall(r"`([\w.]+)`", names) if section + name not in known], section
    page = re.findall(r"^\| (`[-\w`, ()]+) \| (`.*) \|$", text[text.index("| argument, or field") :], re.M)
    for theirs, mine in page:
        for name in re.findall(r"`([-\w]+)`", theirs):
            hint = nearest_key(name, flat_keys(Config()))
            is_ours = name.lstrip("-").replace("-", "_") in known
            assert is_ours or any(key in hint for key in re.findall(r"\b\w+\.[\w.]*\w", mine)), (name, hint, mine)
    assert len(page) > 20 and not [
        name for name in nemo_keys.OTHERS if name.replace("_", "-") not in whole and name not in whole
    ]
    (top,) = re.findall(r"^\| \(top level.*?\| (.*) \|$", text, re.M)
    assert {*re.findall(r"`(\w+)`", top)} <= known
