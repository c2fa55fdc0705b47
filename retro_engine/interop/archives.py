"""Torch archives and .nemo files, read so that nothing in them can run.

Before an archive is loaded its pickle is scanned: a global that is neither a tensor's nor a container's is refused by its
name. Loading itself is torch's `weights_only=True`, which runs no code either. A .nemo file is a tar archive: members are
read one by one, none is written where its name says, and nothing that grows out of proportion is unpacked.
"""

import argparse
import pickletools
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from retro_engine.errors import MissingInputError, StoreError

# Containers without code of their own; Megatron keeps its settings in a Namespace.
CONTAINERS: list[Any] = [argparse.Namespace]
MAX_MEMBERS = 10_000
MAX_CONFIG_BYTES = 1 << 20
MAX_GROWTH = 20  # unpacked bytes a byte of a compressed .nemo; weights in half precision shrink by less than 2
CONVERT = "where it was written: torch.save(model.state_dict(), FILE)"


def read_archive(path: str | Path) -> dict[str, Any]:
    """The dict in a torch archive, tensors mapped from the file. Raises StoreError naming the globals it asks for."""
    path = Path(path)
    if not path.is_file():
        raise MissingInputError(f"{path} does not exist", "expected a torch archive")
    if path.name == ".metadata":
        raise StoreError(
            f"{path} is a distributed checkpoint's pickle",
            "it can run code, and is never read",
            "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE, where it was written",
        )
    if not zipfile.is_zipfile(path):
        raise StoreError(f"{path} is not a torch archive", "those are zip files since torch 1.6", CONVERT)
    _check_zip(path)
    try:
        with torch.serialization.safe_globals(CONTAINERS):
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            if unsafe:
                raise StoreError(
                    f"{path} names {', '.join(sorted(unsafe))}", "only tensors and containers are read", CONVERT
                )
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except StoreError:
        raise
    except Exception as error:  # the library raises RuntimeError, UnpicklingError, KeyError, ... for damaged files
        raise StoreError(f"{path} cannot be read", str(error).splitlines()[0] if str(error) else "", CONVERT) from error
    if not isinstance(loaded, dict):
        raise StoreError(f"{path} holds a {type(loaded).__name__}", "expected a dict of tensors", CONVERT)
    return loaded


def _check_zip(path: Path) -> None:
    """torch stores members as they are: one that is compressed could unpack to anything."""
    try:
        with zipfile.ZipFile(path) as file:
            members = file.infolist()
            for member in members:
                if member.compress_type != zipfile.ZIP_STORED or member.file_size > path.stat().st_size:
                    raise StoreError(f"{path}: {member.filename} is compressed", "torch stores members as they are")
            pickles = [member for member in members if member.filename.endswith("data.pkl")]
            if len(pickles) != 1:
                raise StoreError(f"{path} is not a torch archive", "it has no data.pkl", CONVERT)
            for _ in pickletools.genops(file.read(pickles[0])):  # a damaged stream is refused before torch reads it
                pass
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise StoreError(f"{path} is damaged", str(error)) from error


@contextmanager
def opened_nemo(path: str | Path) -> Iterator[tuple[dict[str, Any], list[Path], dict[str, Path]]]:
    """The config of a .nemo file, its weight files (one a tensor-parallel rank, in order) and its other files by name.

    They lie in a temporary folder that goes when the block ends. Raises StoreError for a member that leaves the folder,
    is no plain file, or grows out of proportion.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingInputError(f"{path} does not exist", "expected a .nemo file")
    with tempfile.TemporaryDirectory(prefix="retro-nemo-") as folder:
        try:
            with tarfile.open(path) as tar:
                files = _unpacked(tar, path, Path(folder))
        except (tarfile.TarError, EOFError, OSError) as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"{path} is not a .nemo file", str(error), "a .nemo file is a tar archive") from error
        configs = [name for name in files if name.rsplit("/", 1)[-1] == "model_config.yaml"]
        weights = sorted(name for name in files if name.endswith("model_weights.ckpt"))
        if len(configs) != 1 or not weights:
            raise StoreError(f"{path} is not a .nemo file", "it has no model_config.yaml with model_weights.ckpt")
        config = _read_yaml(files[configs[0]], f"{path}: {configs[0]}")
        rest = {name: file for name, file in files.items() if name not in (*configs, *weights)}
        yield config, [files[name] for name in weights], rest


def _unpacked(tar: tarfile.TarFile, path: Path, folder: Path) -> dict[str, Path]:
    limit = MAX_GROWTH * path.stat().st_size
    files: dict[str, Path] = {}
    total = 0
    for number, member in enumerate(tar):
        name = member.name.removeprefix("./")
        if number >= MAX_MEMBERS:
            raise StoreError(f"{path} has more than {MAX_MEMBERS:,} members", "it is not a model")
        if member.isdir():
            continue
        if name.startswith("/") or ".." in name.split("/") or "\0" in name:
            raise StoreError(f"{path}: {member.name} leaves its folder", "it is not unpacked")
        if not member.isreg() or member.issparse():
            raise StoreError(f"{path}: {member.name} is no plain file", "links and devices are not unpacked")
        total += member.size
        if total > limit:
            raise StoreError(f"{path} unpacks to more than {MAX_GROWTH} times its size", "it is not unpacked")
        source = tar.extractfile(member)
        assert source is not None, name
        files[name] = folder / str(number)  # its own name never names a file here
        with open(files[name], "wb") as out:
            while piece := source.read(1 << 20):
                out.write(piece)
    return files


def _read_yaml(file: Path, name: str) -> dict[str, Any]:
    import yaml

    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise StoreError(f"{name} is larger than {MAX_CONFIG_BYTES:,} bytes", "it is not a model's settings")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise StoreError(f"{name} is not YAML", str(error).splitlines()[0]) from error
    if not isinstance(values, dict):
        raise StoreError(f"{name} holds no settings", f"it is a {type(values).__name__}")
    return values
