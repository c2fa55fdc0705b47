"""The chooser of backends."""

import pytest
from retro_kernels.backend import backend


def test_a_forced_backend_that_is_missing_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RETRO_BACKEND", raising=False)
    assert backend() == "reference"
    monkeypatch.setenv("RETRO_BACKEND", "reference")
    assert backend() == "reference"
    monkeypatch.setenv("RETRO_BACKEND", "triton")
    with pytest.raises(ValueError, match="RETRO_BACKEND=triton is not available"):
        backend()
