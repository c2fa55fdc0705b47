"""Flags that had another name: read as today's, with one line that says it; not in --help."""

import pytest

from retro_engine.cli.main import make_parser
from retro_engine.cli.renamed import FLAGS, VALUES, with_new_names
from retro_engine.errors import UsageError


@pytest.mark.parametrize(("old", "new"), [
    ("neighbors S --database A B --weights 1 .5 --index Flat --precision=bf16",
     "neighbors S --stores A B --source-weights 1 .5 --faiss Flat --dtype bf16"),
    ("generate R x --index S --mode dense --fusion 2 1 --weights int8",
     "generate R x --stores S --retriever dense --source-weights 2 1 --dtype int8"),
    ("eval R --index S --precision bf16-mixed", "eval R --stores S --dtype bf16"),
    ("eval R --precision=32", "eval R --dtype fp32"),
    ("import M --out x --dtype float16", "import M --out x --dtype fp16"),
    ("docs query L --mode hybrid --weights 1 2 --store S --store-weight .5 x",
     "docs query L --retriever hybrid --fusion 1 2 --stores S --source-weights 1 .5 x"),
    ("serve R --index --mode dense --weights 1 0", "serve R --stores --retriever dense --source-weights 1 0"),
    ("docs add L x --store S", "docs add L x --store S"),  # another flag
    ("generate R -- --index", "generate R -- --index"),
    ("config show", "config show"),
])  # fmt: skip
def test_old_spellings(old: str, new: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert " ".join(with_new_names(old.split())) == new
    said = capsys.readouterr().err.splitlines()
    assert all(line.startswith("note: ") and " now; " in line for line in said)
    assert bool(said) == (old != new)


def test_one_flag_in_two_spellings() -> None:
    with pytest.raises(UsageError, match="--mode is --retriever now"):
        with_new_names(["generate", "R", "--mode", "dense", "--retriever", "bm25"])


def test_every_new_spelling_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    for command in {*FLAGS, *VALUES}:
        with pytest.raises(SystemExit):
            make_parser().parse_args([*command.split(), "--help"])
        shown = capsys.readouterr().out
        for old, new in FLAGS.get(command, {}).items():
            assert new.split()[0] in shown, command
            assert f"{old} " not in shown, command
