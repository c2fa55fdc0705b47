"""What docs/deploy holds: the unit and the image, by the tools that know them, where they are (its dashboard: tests/serve)."""

import argparse
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from retro_engine.cli.serve import add

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
