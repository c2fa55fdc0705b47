"""What docs/deploy holds: the unit and the image, by the tools that know them, where they are (its dashboard: tests/serve)."""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from serve_helpers import make_run

from retro_engine.cli.serve import add
from retro_engine.data.store import Store
from retro_engine.serve.accounts import Accounts

DEPLOY = Path(__file__).parents[1] / "docs" / "deploy"
SYSTEMD, DOCKER = shutil.which("systemd-analyze"), shutil.which("docker")


def variables(text: str) -> set[str]:
    return set(re.findall(r"\bRETRO_SERVE_(\w+)=", text))


def test_files_name_flags_that_there_are() -> None:
    parser = argparse.ArgumentParser()
    add(parser.add_subparsers())
    (serve,) = (action.choices["serve"] for action in parser._actions if isinstance(action.choices, dict))
    known = {option.removeprefix("--").upper().replace("-", "_") for option in serve._option_string_actions}
    for name in ("Dockerfile", "retro-serve.service"):
        named = variables((DEPLOY / name).read_text())
        assert named and named <= known, (name, named - known)


@pytest.mark.skipif(SYSTEMD is None, reason="systemd-analyze is absent")
def test_the_unit_is_one(tmp_path: Path) -> None:
    """With its program in place, which systemd looks for."""
    program = tmp_path / "retro"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / "retro-serve.service"
    unit.write_text((DEPLOY / unit.name).read_text().replace("/opt/retro/bin/retro", str(program)))
    found = subprocess.run([str(SYSTEMD), "verify", "--man=no", str(unit)], capture_output=True, text=True, timeout=60)
    said = [line for line in found.stderr.splitlines() if "retro-serve" in line]
    assert not said and found.returncode == 0, found.stderr


def settings_of(name: str) -> tuple[dict[str, str], list[str]]:
    """The environment that a file gives the server, and its command after `retro`."""
    text = (DEPLOY / name).read_text()
    environment = dict(re.findall(r"\b(RETRO_\w+)=(\S+)", text))
    if name == "Dockerfile":
        (command,) = re.findall(r"^CMD (\[\"serve.*\])$", text, re.MULTILINE)
        return environment, json.loads(command)
    (line,) = re.findall(r"^ExecStart=\S+ (.*)$", text, re.MULTILINE)
    return environment, shlex.split(line)


@pytest.mark.skipif(not os.environ.get("RETRO_CAMPAIGN"), reason="a server is started: RETRO_CAMPAIGN=1")
@pytest.mark.parametrize("name", ["Dockerfile", "retro-serve.service"])
def test_what_they_start_serves(small_store: Store, tmp_path: Path, name: str) -> None:
    """Their settings and commands, with folders of the test in place of theirs: healthy, and ended by SIGTERM."""
    environment, command = settings_of(name)
    run = make_run(small_store, tmp_path / "run")
    here = {
        "/var/lib/retro/run": str(run),
        "/run/model": str(run),
        "/var/lib/retro": str(tmp_path),
        "/state": str(tmp_path),
        "8000": "0",
    }

    def placed(text: str) -> str:
        for there, mine in here.items():
            if text == there or text.startswith(f"{there}/"):
                return text.replace(there, mine, 1)
        return text

    variables = {key: placed(value) for key, value in environment.items()}
    Accounts(variables["RETRO_SERVE_ACCOUNTS"]).add_key("me", "admin")
    words = [sys.executable, "-m", "retro_engine.cli", *map(placed, command)]
    process = subprocess.Popen(
        words, env={"RETRO_SERVE_PORT": "0", **os.environ, **variables}, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        said = ""
        while "ready: model" not in said and (line := process.stderr.readline()):
            said += line
        port = re.findall(r"listening on http://[\d.]+:(\d+)", said)[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as answer:
            assert answer.status == 200
        process.terminate()
        assert process.wait(40) in (0, -signal.SIGTERM), said  # uvicorn raises the signal again once all has ended
    finally:
        process.kill()
        process.communicate()


@pytest.mark.skipif(DOCKER is None, reason="docker is absent")
def test_the_image_is_one() -> None:
    """Its syntax and steps; it is built with RETRO_CAMPAIGN, which takes the network."""
    root, file = DEPLOY.parents[1], DEPLOY / "Dockerfile"
    options = [] if os.environ.get("RETRO_CAMPAIGN") else ["--check"]
    command = [str(DOCKER), "build", *options, "-f", str(file), str(root)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    for said, why in {
        "unknown flag: --check": "docker has no buildx",
        "docker daemon": "no docker daemon runs",
    }.items():
        if found.returncode and said in found.stderr:
            pytest.skip(why)
    assert found.returncode == 0, found.stderr[-2000:]
