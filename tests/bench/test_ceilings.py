"""The ceilings are rates that a machine can have."""

import torch

from retro_engine.bench.ceilings import measure_ceilings


def test_ceilings() -> None:
    ceilings = measure_ceilings(torch.device("cpu"), [torch.float32])
    assert ceilings.copy_gb_s > 0.1
    assert ceilings.matmul_gflop_s["fp32"] > 0.1
