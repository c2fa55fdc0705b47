"""Gate: the C++ kernels and the loader under AddressSanitizer: the kernels' tests again, with instrumented builds.

Builds both modules with -fsanitize=address into a folder of their own, and runs tests/kernels and the loader's tests
on them in a process with the sanitizer's library preloaded: any access outside a buffer ends it.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-fsanitize=address", "-fno-omit-frame-pointer", "-Wno-psabi"]


def find(name: str) -> str:
    """The path of a library of g++'s."""
    return subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()


def test_the_cpp_kernels(tmp_path: Path) -> None:
    pybind11 = pytest.importorskip("pybind11")
    library = find("libasan.so") if shutil.which("g++") else ""
    if not os.path.isabs(library):
        pytest.skip("no g++ with AddressSanitizer")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    for package, folder in (("retro_kernels", "kernels"), ("retro_engine", "retro_engine")):
        shutil.copytree(ROOT / folder, tmp_path / package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "retro_kernels" / "retro_kernels" / "__init__.py").rename(tmp_path / "retro_kernels" / "__init__.py")
    sources = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    builds = [
        [*FLAGS, *include, *sources, "-o", tmp_path / "retro_kernels" / f"_cpu{suffix}"],
        [
            *FLAGS,
            *include,
            ROOT / "csrc/loader/loader.cpp",
            "-o",
            tmp_path / "retro_engine" / "data" / f"_loader{suffix}",
        ],
    ]
    for build in builds:
        subprocess.run(["g++", *build], check=True)
    tests = ["tests/kernels", "tests/data/test_loader.py"]
    deselected = ["--deselect", "tests/kernels/test_backend.py", "-k", "not registration and not gradcheck"]
    environment = os.environ | {
        "LD_PRELOAD": f"{library} {find('libstdc++.so.6')}",  # the second so that thrown exceptions are seen
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "PYTHONPATH": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    check = f"import retro_kernels.cpp as c; import retro_engine.data._loader as l; assert c.is_available(); assert all(m.__file__.startswith({str(tmp_path)!r}) for m in (c, l))"
    subprocess.run([sys.executable, "-P", "-c", check], env=environment, check=True)
    command = [sys.executable, "-P", "-m", "pytest", "-s", "-p", "no:cacheprovider", "-x", *deselected, *tests]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, (run.stdout + run.stderr)[-12000:]
