"""Gate: csrc compiles without a warning with clang for x86-64, and with clang and GCC for aarch64, where those are installed."""

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[2] / "csrc").glob("*/*.cpp"))
FLAGS = ["-std=c++17", "-O0", "-fPIC", "-ffp-contract=fast", "-Wall", "-Werror", "-Wno-psabi", "-c"]
CROSS = Path("/usr/aarch64-linux-gnu/include")  # of the C library
COMPILERS = {
    "clang for x86-64": ["clang++", "--target=x86_64-linux-gnu"],
    "clang for aarch64": ["clang++", "--target=aarch64-linux-gnu"],
    "GCC for aarch64": ["aarch64-linux-gnu-g++"],
}


@pytest.mark.parametrize("name", COMPILERS)
def test_compiles(tmp_path: Path, name: str) -> None:
    pybind11 = pytest.importorskip("pybind11")
    command = COMPILERS[name]
    if not shutil.which(command[0]) or ("aarch64" in name and not CROSS.exists()):
        pytest.skip(f"no {name}")
    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    run = subprocess.run([*command, *FLAGS, *include, *SOURCES], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert len(list(tmp_path.glob("*.o"))) == len(SOURCES)
