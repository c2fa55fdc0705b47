"""Builds the C++ neighbor loader and CPU kernels where there is a compiler, and the CUDA kernels where there is nvcc.

Each is optional: without it the twin in Python serves. GCC and clang build them. On x86-64 the CPU kernels are built four times
(scalar, AVX2, AVX-512, AVX-512 with bf16); elsewhere the x86 files are empty, and the scalar build (vectors of four floats) is all.
"""

import shutil
import subprocess
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

# Products are fused with sums whatever the compiler's default: clang's would be within an expression only.
OPTIONS = ["-O3", "-ffp-contract=fast", "-Wno-psabi"]
CUDA_KERNELS = "retro_kernels._cuda"
CUDA_TARGETS = ["arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90"]


class BuildPy(build_py):
    """retro_kernels is its `__init__.py` and the modules of kernels/, which is no package: it would shadow PyPI's `kernels`."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        found: list[tuple[str, str, str]] = super().find_package_modules(package, package_dir)
        if package == "retro_kernels":
            found += [(package, Path(path).stem, path) for path in sorted(glob("kernels/*.py"))]
        return found


class OptionalBuildExt(build_ext):
    """A failing compiler leaves the package pure Python and says so."""

    def build_extension(self, ext: Extension) -> None:
        try:
            if ext.name == CUDA_KERNELS:
                self.build_cuda(ext)
            else:
                super().build_extension(ext)
        except Exception as error:  # distutils' errors have no common base across setuptools versions
            print(f"retro-engine: {ext.name} was not built ({error}); its Python twin will be used")

    def build_cuda(self, ext: Extension) -> None:
        """A shared library with a C interface: no Python, no torch in it."""
        path = Path(self.get_ext_fullpath(ext.name))
        path.parent.mkdir(parents=True, exist_ok=True)
        targets = [f"-gencode={target}" for target in CUDA_TARGETS]
        options = ["-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", *targets]
        subprocess.run(["nvcc", *options, "-o", str(path), *ext.sources], check=True)


def extensions() -> list[Extension]:
    cuda = [Extension(CUDA_KERNELS, ["csrc/cuda/kernels.cu"], optional=True)] if shutil.which("nvcc") else []
    try:
        from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
    except ImportError:
        return cuda  # a C interface: it needs no pybind11
    ParallelCompile("RETRO_BUILD_JOBS").install()  # an extension's files side by side, as many as there are processors
    kernels = [f"csrc/cpu/{name}.cpp" for name in ("module", "scalar", "avx2", "avx512", "avx512_bf16", "avx512_amx")]
    options = {"cxx_std": 17, "extra_compile_args": OPTIONS, "optional": True}
    return [
        *cuda,
        Pybind11Extension(
            "retro_engine.data._loader", ["csrc/loader/loader.cpp"], depends=["csrc/compiler.h"], **options
        ),
        Pybind11Extension("retro_kernels._cpu", kernels, depends=glob("csrc/**/*.[hi]*", recursive=True), **options),
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": OptionalBuildExt, "build_py": BuildPy})
