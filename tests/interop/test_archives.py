"""Archives that would run something, leave their folder, or unpack to anything are refused before that happens."""

import argparse
import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from retro_engine.errors import MissingInputError, StoreError
from retro_engine.interop.archives import opened_nemo, read_archive

RAN: list[str] = []


class Hostile:
    """Unpickled by pickle, it calls `os.system`."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {RAN[0]}",)


def test_tensors_and_containers_are_read(tmp_path: Path) -> None:
    content = {"model": {"a": torch.arange(3.0)}, "args": argparse.Namespace(num_layers=2), "iteration": 7}
    torch.save(content, tmp_path / "x.pt")
    found = read_archive(tmp_path / "x.pt")
    assert torch.equal(found["model"]["a"], content["model"]["a"])
    assert found["args"].num_layers == 2


def test_a_global_outside_tensors_and_containers_is_named_and_nothing_runs(tmp_path: Path) -> None:
    RAN[:] = [str(tmp_path / "ran")]
    torch.save({"model": {"a": torch.zeros(2)}, "extra": Hostile()}, tmp_path / "x.pt")
    with pytest.raises(StoreError, match=r"names (posix|os)\.system\n"):
        read_archive(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()
    nested = {"args": argparse.Namespace(path=Path("x"))}
    torch.save(nested, tmp_path / "y.pt")
    with pytest.raises(StoreError, match=r"names pathlib"):
        read_archive(tmp_path / "y.pt")


def test_archives_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="does not exist"):
        read_archive(tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(StoreError, match="not a torch archive"):
        read_archive(tmp_path / "x.pt")
    (tmp_path / ".metadata").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(StoreError, match=r"distributed checkpoint's pickle\n.*\n.*dcp_to_torch"):
        read_archive(tmp_path / ".metadata")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(StoreError, match="holds a list"):
        read_archive(tmp_path / "list.pt")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x/data.pkl", b"\0" * (1 << 24))
    with pytest.raises(StoreError, match="is compressed"):
        read_archive(tmp_path / "bomb.pt")
    with zipfile.ZipFile(tmp_path / "empty.pt", "w") as file:
        file.writestr("x/other", b"x")
    with pytest.raises(StoreError, match="no data.pkl"):
        read_archive(tmp_path / "empty.pt")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(50.0)}, tmp_path / "x.pt")
    whole = (tmp_path / "x.pt").read_bytes()
    for length in range(0, len(whole) - 1, max(1, len(whole) // 40)):
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        with pytest.raises(StoreError):
            read_archive(tmp_path / "cut.pt")


def nemo(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def weights() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, buffer)
    return buffer.getvalue()


GOOD = {"./model_config.yaml": b"hidden_size: 8\n", "./model_weights.ckpt": b"", "./x_vocab.json": b"{}"}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_nemo_file(tmp_path: Path, mode: str) -> None:
    path = nemo(tmp_path / "x.nemo", GOOD | {"./model_weights.ckpt": weights()}, mode)
    with opened_nemo(path) as (config, files, rest):
        assert config == {"hidden_size": 8}
        assert torch.equal(read_archive(files[0])["a"], torch.zeros(3))
        assert list(rest) == ["x_vocab.json"]
        folder = files[0].parent
    assert not folder.exists()


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil", "./../evil"])
def test_members_that_leave_the_folder(tmp_path: Path, name: str) -> None:
    path = nemo(tmp_path / "x.nemo", GOOD | {name: b"x"})
    with pytest.raises(StoreError, match="leaves its folder"), opened_nemo(path):
        pass
    assert not (tmp_path / "evil").exists()
    assert not (tmp_path.parent / "evil").exists()


def test_links_devices_and_bombs(tmp_path: Path) -> None:
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        with tarfile.open(tmp_path / "x.nemo", "w") as tar:
            info = tarfile.TarInfo("model_config.yaml")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        with pytest.raises(StoreError, match="no plain file"), opened_nemo(tmp_path / "x.nemo"):
            pass
    bomb = nemo(tmp_path / "bomb.nemo", GOOD | {"big": b"\0" * (1 << 24)}, "w:gz")
    assert bomb.stat().st_size < 1 << 17
    with pytest.raises(StoreError, match="more than 20 times"), opened_nemo(bomb):
        pass


@pytest.mark.parametrize(("members", "message"), [
    ({}, "has no model_config.yaml"),
    ({"model_config.yaml": b"a: 1"}, "has no model_config.yaml with"),
    (GOOD | {"./model_config.yaml": b"!!python/object/apply:os.system [x]"}, "is not YAML"),
    (GOOD | {"./model_config.yaml": b"- 1"}, "holds no settings"),
    (GOOD | {"./model_config.yaml": b"a: " + b"x" * (1 << 20)}, "larger than"),
    (GOOD | {"./model_config.yaml": b"a: [\xff"}, "is not YAML"),
])  # fmt: skip
def test_nemo_files_that_do_not_fit(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    padded = members | {"padding": os.urandom(1 << 18)}
    with pytest.raises(StoreError, match=message), opened_nemo(nemo(tmp_path / "x.nemo", padded)):
        pass


def test_a_nemo_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.nemo").write_bytes(b"PK\x03\x04" * 200)
    with pytest.raises(StoreError, match="is not a .nemo file"), opened_nemo(tmp_path / "x.nemo"):
        pass
    with pytest.raises(MissingInputError), opened_nemo(tmp_path / "y.nemo"):
        pass
