"""`retro explain`, as it is typed."""

import json
from pathlib import Path

import pytest

from retro_engine import cli


def test_explain(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["explain", str(work / "run"), "river stone amber", " lantern orchard"]
    page = tmp_path / "map.html"
    capsys.readouterr()
    assert cli.main([*command, "--json", "--html", str(page)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["neighbors"]) == 2
    assert [len(n["token_changes"]) for n in found["neighbors"]] == [len(found["tokens"])] * 2
    assert "".join(token["text"] for token in found["tokens"]) == " lantern orchard"
    assert "nats in all" in page.read_text()
    assert cli.main([*command, "--neighbors", "<b>river</b>", "--html", str(tmp_path / "given.html")]) == 0
    assert "&lt;b&gt;river" in (tmp_path / "given.html").read_text()
    assert "most on" in capsys.readouterr().out
    assert cli.main([*command[:3], "--k", "1"]) == 0, "the text is generated"
    assert cli.main([*command, "--k", "0"]) == 2
    assert cli.main(["explain", str(tmp_path), "a", "b"]) == 3
