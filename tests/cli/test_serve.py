"""`retro serve`: its flags in the environment, and what it says when an extra is missing."""

import argparse
import sys

import pytest
from cli_helpers import run

from retro_engine.cli import serve


def test_serve_without_its_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert run("serve", "runs/none") == 4
    assert "pip install 'retro-engine[serve]'" in capsys.readouterr().err


@pytest.mark.parametrize(("weights", "stores"), [("WEIGHTS", "INDEX"), ("SOURCE_WEIGHTS", "STORES")])
def test_flags_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch, weights: str, stores: str) -> None:
    """Under the names that they had before as well."""
    for name, value in {
        "HOST": "::1", "PORT": "99", "PROXY": "true", "NEMO_COMPAT": "no", "ALLOW_HOST": "a.example b.example",
        weights: "2 1", stores: "", "METRICS_TOKEN": "t", "ALIAS": "gpt-4 b", "ALLOW_ORIGIN": "https://a.example",
        "ROOT_PATH": "/retro", "LOG": "json",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"RETRO_SERVE_{name}", value)
    parser = argparse.ArgumentParser()
    serve.add(parser.add_subparsers())
    args = parser.parse_args(["serve", "run", "--host", "127.0.0.1"])
    assert (args.host, args.port, args.proxy, args.nemo_compat) == ("127.0.0.1", 99, True, False)
    assert (args.allow_host, args.source_weights, args.stores) == (["a.example", "b.example"], [2.0, 1.0], [])
    assert args.metrics_token == "t"
    assert (args.alias, args.allow_origin) == (["gpt-4", "b"], ["https://a.example"])
    assert (args.root_path, args.log) == ("/retro", "json")


@pytest.mark.parametrize("name", ["", "a\nb", "a" * 257])
def test_a_name_that_nobody_can_send(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("serve", "runs/none", "--alias", name) == 2
    assert "--alias" in capsys.readouterr().err
