"""The package as a library of its own: its names, its version, and that two installations do not mix."""

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

from retro_engine.version import __version__

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "kernels" / "retro_kernels"
LOOK = f"""
import sys
from importlib.util import spec_from_file_location

class Finder:  # as an editable installation has one; it offers that one's extension to every other
    def find_spec(name, path=None, target=None):
        place = {{"retro_kernels": {str(PACKAGE / "__init__.py")!r}, "retro_kernels._cpu": sys.argv[1]}}.get(name)
        return place and spec_from_file_location(name, place)

sys.meta_path.insert(0, Finder)
import retro_kernels
from retro_kernels.rope import rope
assert retro_kernels.rope is rope and retro_kernels.__version__ == {__version__!r}
assert all(getattr(retro_kernels, name) for name in retro_kernels.__all__)
assert sys.modules["retro_kernels.cpp"].__file__ == {str(ROOT / "kernels" / "cpp.py")!r}
assert "retro_kernels._cpu" in sys.modules and not sys.modules["retro_kernels.cpp"].is_available()
for name in ("retro_engine", "tokenizers", "faiss", "numba", "omegaconf", "triton"):
    assert name not in sys.modules, name
import kernels
assert kernels.__file__.endswith("kernels.py")
import retro_kernels.of_another_installation
"""


def test_it_stands_alone_and_does_not_mix(tmp_path: Path) -> None:
    """A namespace package would take modules, and extensions, of every folder `retro_kernels` on the path."""
    other = tmp_path / "retro_kernels"
    other.mkdir()
    (other / "of_another_installation.py").write_text("")
    (other / "_cpu.py").write_text("")
    (tmp_path / "kernels.py").write_text("")  # PyPI's, which is found as ever
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", LOOK, str(other / "_cpu.py")]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.endswith("No module named 'retro_kernels.of_another_installation'\n"), done.stderr


def test_what_is_installed() -> None:
    """Types, links and wheels: what pyproject.toml says of them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for package, folder in (("retro_engine", ROOT / "retro_engine"), ("retro_kernels", PACKAGE)):
        assert "py.typed" in project["tool"]["setuptools"]["package-data"][package]
        assert (folder / "py.typed").is_file()
    assert "Typing :: Typed" in project["project"]["classifiers"] and project["project"]["urls"]
    wheels = project["tool"]["cibuildwheel"]
    assert wheels["macos"]["archs"] == ["arm64"] and "aarch64" in wheels["linux"]["archs"]
    compile(ast.parse(wheels["test-command"].split("'")[1]), "test-command", "exec")
