"""What a training step must reach against the rivals, on rows that are made up."""

import pytest

from retro_engine.bench import model
from retro_engine.bench.frame import Row


def test_the_better_rival_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    seconds = {"ours": 2.0, "ours, bf16": 1.0, "megatron-core": 2.8, "retro-pytorch": 3.0}
    mib = {"ours": 80.0, "ours, bf16": 60.0, "megatron-core": 200.0, "retro-pytorch": 100.0}
    rows = [
        Row(case="step", implementation=name, median_s=s, low_s=s, high_s=s, peak_mib=mib[name], ceiling_share=0.9)
        for name, s in seconds.items()
    ]
    found = {target.row: (target.value, target.holds) for target in model.targets("57M", rows)}
    assert found == {
        "step 57M: times as fast as the faster peer, fp32": (1.4, True),
        "step 57M: times as fast as the faster peer, the best type": (2.8, True),
        "step 57M: memory against the leaner peer": (0.6, False),
        "step 57M: share of the fp32 matmul rate": (0.9, True),
    }
