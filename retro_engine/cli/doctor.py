"""`retro doctor`: what is installed, and which implementations will be used."""

import argparse

from retro_engine.cli import flags

PACKAGES = (
    "torch", "numpy", "tokenizers", "safetensors", "faiss-cpu", "bm25s", "apsw", "numba", "tensorboard",
    "sentence-transformers", "starlette", "uvicorn", "ray", "pyarrow", "gguf", "pypdf", "python-docx",
)  # fmt: skip


def add(commands: flags.Commands) -> None:
    flags.command(commands, "doctor", run, "what is installed and which implementations will be used")


def run(args: argparse.Namespace) -> int:
    import platform

    import torch
    from retro_kernels.backend import backend

    from retro_engine import __version__
    from retro_engine.data.loader import has_native_loader

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {
        "retro-engine": __version__,
        "python": platform.python_version(),
        "device": device,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "kernels": backend(device),
        "loader": "C++" if has_native_loader() else "NumPy (no compiler when it was installed)",
    }
    flags.print_result(args, found | {package: _version(package) for package in PACKAGES})
    return 0


def _version(package: str) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
