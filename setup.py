"""Builds the C++ neighbor loader and the CPU kernels when a compiler is there; without one their twins serve."""

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class OptionalBuildExt(build_ext):
    """A failing compiler leaves the package pure Python and says so."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:  # distutils' errors have no common base across setuptools versions
            print(f"retro-engine: {ext.name} was not built ({error}); its Python twin will be used")


def extensions() -> list[Extension]:
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:
        return []
    kernels = [f"csrc/cpu/{name}.cpp" for name in ("module", "scalar", "avx2", "avx512", "avx512_bf16")]
    options = {"cxx_std": 17, "extra_compile_args": ["-O3", "-Wno-psabi"]}
    return [
        Pybind11Extension("retro_engine.data._loader", ["csrc/loader/loader.cpp"], **options),
        Pybind11Extension(
            "retro_kernels._cpu", kernels, depends=["csrc/cpu/kernels.h", "csrc/cpu/kernels.inc"], **options
        ),
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": OptionalBuildExt})
