"""What the kernels' bench promises, on rows that are made up."""

from retro_engine.bench import kernels
from retro_engine.bench.frame import Row


def row(case: str, ratios: dict[str, float], share: float | None = None) -> Row:
    made = Row(case=case, implementation="ours (cpp)", median_s=1.0, low_s=1.0, high_s=1.0, ceiling_share=share)
    made.ratios = ratios
    return made


def test_targets() -> None:
    rows = [
        row("rope q and k fp32 8x512x8x64", {"eager": 4.5, "clone": 0.7}),
        row("chunked cross-attention fp32 2x1024x8x64 fwd", {"SDPA": 1.1, "bmm": 1.2, "eager": 5.5}, 0.5),
        row("chunked cross-attention fp32 2x1024x8x64 fwd+bwd", {"SDPA": 1.6, "bmm": 1.4, kernels.PADDED: 0.6}),
        row("chunked cross-attention bf16 2x1024x8x64 fwd+bwd", {"SDPA": 2.6, "bmm": 2.4, kernels.PADDED: 0.6}),
        row("causal self-attention fp32 2x512x8x64 fwd+bwd", {"SDPA": 1.3}),
        row("product of 1 row int8", {"reading": 0.81}, 0.81),
        row("gather neighbors 20000 of 200000 rows", {"eager": 5.0}),
    ]
    found = [(target.row.partition(": ")[2], target.value, target.holds) for target in kernels.targets(rows, False)]
    assert found == [
        ("against eager math", 4.5, True),
        ("share of what copying takes", 0.7, False),
        ("against the best other", 1.4, False),
        ("ours, half padded, share of the time", 0.6, True),
        ("against the best other", 2.4, False),
        ("ours, half padded, share of the time", 0.6, True),
        ("against SDPA", 1.3, True),
        ("share of the rate of reading", 0.81, True),
    ]
    assert len(kernels.targets(rows[1:2], True)) == 3, "on a GPU the forward pass has targets of its own"
