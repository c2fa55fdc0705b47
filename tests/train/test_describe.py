"""What is said of a run before its first step."""

import pytest
from retro_kernels.backend import backend

from retro_engine.config import preset_model
from retro_engine.train.describe import kernels_in_use


def test_what_attention_runs_on_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """By type, and what a preset's masks leave to PyTorch; dropout of attention weights leaves nothing."""
    monkeypatch.delenv("RETRO_BACKEND", raising=False)
    fast = backend("cpu")
    base, mcore = (preset_model(name, vocab_size=9) for name in ("base", "mcore"))
    assert base.attention_dropout > 0
    assert kernels_in_use(base, "cpu", "32") == kernels_in_use(base, "cpu", "bf16-mixed") == fast
    assert kernels_in_use(base, "cpu", "64") == "reference"
    if fast == "cpp":
        assert kernels_in_use(mcore, "cpu", "32") == "cpp (PyTorch: self-attention (model.reset_attention=false))"
        assert "encoder's cross-attention" in kernels_in_use(preset_model("nemo", vocab_size=9), "cpu", "32")
