"""Settings files that would hang, grow or run something: a typed error, at once, in little memory."""

import os
import time
import tracemalloc
from pathlib import Path

import pytest

from retro_engine.config import load_config
from retro_engine.config.yaml_file import MAX_BYTES, read_yaml
from retro_engine.errors import MissingInputError, RetroError, UsageError

LAUGHS = (
    "a0: &a0 [" + "x," * 9 + "x]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))
)
REFERENCES = "".join(
    f"{key}: '${{{before}}}${{{before}}}${{{before}}}'\n"
    for key, before in zip(
        ("checkpoint_name", "retro_model_file", "prompt", "model.data.store", "model.data.valid_store", "exp_manager.exp_dir"),
        ("checkpoint_dir", "checkpoint_name", "retro_model_file", "prompt", "model.data.store", "model.data.valid_store"),
    )
)  # fmt: skip
HOSTILE = {
    "a billion laughs": (LAUGHS, "unfolds to more than"),
    "laughs as merge keys": ("a: &a {" + ",".join(f"k{i}: {i}" for i in range(300)) + "}\n"
                             + "b: [" + ",".join(["{<<: *a}"] * 300) + "]\n", "unfolds to more than"),
    "an alias inside of itself": ("a: &a [*a]\n", "stands inside"),
    "an alias of nothing": ("a: *b\n", "stands inside|not YAML"),
    "deep lists": ("a: " + "[" * 50_000, "nested more than"),
    "deep mappings": ("a: " + "{a: " * 10_000, "nested more than"),
    "deep blocks": ("".join(" " * i + "a:\n" for i in range(300)), "nested more than"),
    "a file without end": ("a: 1\n" * (1 << 20), "larger than"),
    "many values": ("a: [" + "1," * 20_000 + "1]", "unfolds to more than"),
    "a number of 5,000 digits": ("seed: " + "9" * 5000, "no number"),
    "a hexadecimal number of 5,000 digits": ("seed: 0x" + "f" * 5000, "no number"),
    "references that triple": (REFERENCES, "references"),
    "a reference to itself": ("prompt: ${prompt}\n", "do not resolve|does not fit"),
    "an object": ("a: !!python/object/apply:os.system [id]\n", "not YAML"),
    "no UTF-8": (b"prompt: \xff\xfe\n", "not YAML"),
    "NUL": ("prompt: 'a\0b'\n", "not YAML"),
    "a key twice": ("seed: 1\nseed: 2\n", "not YAML"),
    "a lone value": ("seven\n", "not a setting"),
    "two documents": ("seed: 1\n---\nseed: 2\n", "not YAML"),
    "a set": ("model: !!set {a, b}\n", "."),
    "bytes": ("seed: !!binary aGVsbG8=\n", "."),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_at_once(tmp_path: Path, name: str) -> None:
    content, why = HOSTILE[name]
    path = tmp_path / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    tracemalloc.start()
    start = time.monotonic()
    try:
        with pytest.raises(RetroError, match=why):
            load_config(file=str(path))
        assert time.monotonic() - start < 5
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_pipes_devices_and_folders_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "link.yaml").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe.yaml", tmp_path / "link.yaml", Path("/dev/zero"), tmp_path):
        with pytest.raises(MissingInputError, match="not a plain file"):
            load_config(file=str(path))


def test_anchors_and_references_of_honest_files_work(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "\ufeffmodel:\n  hidden_size: &d 96\n  ffn_hidden_size: *d\n  mup_base_hidden_size: ${.hidden_size}\n"
    )
    model = load_config(file=str(path)).model
    assert (model.hidden_size, model.ffn_hidden_size, model.mup_base_hidden_size) == (96, 96, 96)
    path.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(UsageError, match="larger than"):
        read_yaml(path)
