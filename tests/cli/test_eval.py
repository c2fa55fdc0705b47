"""`retro eval`, as it is typed."""

import json
import re
from pathlib import Path

import pytest
from cli_helpers import run


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
