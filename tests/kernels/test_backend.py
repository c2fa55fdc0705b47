"""The chooser: what runs by default, what is forced, and what cannot be."""

import warnings

import pytest
import torch
from retro_kernels import cpp
from retro_kernels.backend import backend, choose, say_that_cpp_is_missing


@pytest.fixture(autouse=True)
def _free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RETRO_BACKEND", raising=False)


def test_the_default() -> None:
    assert backend() == ("cpp" if cpp.is_available() else "reference")
    if cpp.is_available():
        assert choose("rope", torch.zeros(1), torch.zeros(1)) == "cpp"
        assert choose("rope", torch.zeros(1, dtype=torch.bfloat16)) == "cpp"
    assert choose("rope", torch.zeros(1, dtype=torch.float64)) == "reference"
    assert choose("rope", torch.zeros(1, device="meta")) == "reference", "any other device"
    assert choose("rope", torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)) == "reference"


@pytest.mark.parametrize("name", ["opencl", "Triton", "cuda"])
def test_a_forced_backend_that_is_missing_raises(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if name == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setenv("RETRO_BACKEND", name)
    with pytest.raises(ValueError, match=f"RETRO_BACKEND={name}"):
        backend()


def test_a_forced_backend_that_cannot_take_the_tensors_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    if not cpp.is_available():
        pytest.skip("no C++ extension")
    monkeypatch.setenv("RETRO_BACKEND", "cpp")
    with pytest.raises(ValueError, match="cpp cannot run rope\n  the tensors are torch.float64"):
        choose("rope", torch.zeros(1, dtype=torch.float64))
    monkeypatch.setenv("RETRO_BACKEND", "reference")
    assert choose("rope", torch.zeros(1)) == "reference"


def test_a_missing_extension_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "is_available", lambda: False)
    say_that_cpp_is_missing.cache_clear()
    with pytest.warns(RuntimeWarning, match="no C\\+\\+ extension here.*\n  pip install -v"):
        assert choose("rope", torch.zeros(1)) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend() == "reference"
        say_that_cpp_is_missing.cache_clear()
        monkeypatch.setenv("RETRO_BACKEND", "reference")
        assert backend() == "reference", "who asks for it is not told"
