"""-log softmax of each row's label on NVIDIA GPUs in Triton and, in the logits' place, its gradient.

A program owns a row: one pass for the largest logit and the sum of exponentials beside it, one that turns logits into gradients,
whose reads come from L2 (a row of 50,000 in bf16 has 100 KB). No fp32 copy exists. Letters: V vocabulary, B a tile of it.
"""

# mypy: allow-untyped-defs
import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _cross_entropy(X, LABELS, LOSSES, V, BLOCK: tl.constexpr, HAS_GRADIENT: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    X += row * V
    label = tl.load(LABELS + row)
    peak, total = float("-inf"), 0.0
    for v0 in range(0, V, BLOCK):
        entry = v0 + tl.arange(0, BLOCK)
        x = tl.load(X + entry, mask=entry < V, other=float("-inf")).to(tl.float32)
        new_peak = tl.maximum(peak, tl.max(x, 0))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # nothing but -inf so far: adds 0
        total = total * tl.exp(peak - base) + tl.sum(tl.exp(x - base), 0)
        peak = new_peak
    base = tl.where(peak == float("-inf"), 0.0, peak)
    normalizer = tl.where(peak == float("-inf"), float("nan"), base + tl.log(total))
    is_there = (label >= 0) & (label < V)  # whatever the data say, nothing outside is read
    wanted = tl.load(X + label, mask=is_there, other=float("nan")).to(tl.float32)
    tl.store(LOSSES + row, normalizer - wanted)
    if HAS_GRADIENT:
        tl.debug_barrier()  # the label's logit is read before any thread writes
        for v0 in range(0, V, BLOCK):
            entry = v0 + tl.arange(0, BLOCK)
            x = tl.load(X + entry, mask=entry < V, other=0.0).to(tl.float32)
            slope = tl.exp(x - normalizer) - tl.where(entry == label, 1.0, 0.0)
            tl.store(X + entry, slope.to(X.dtype.element_ty), mask=entry < V)


def cross_entropy_(logits_TV: Tensor, labels_T: Tensor, has_gradient: bool) -> Tensor:
    """As `reference.cross_entropy_`; contiguous."""
    losses = torch.empty(logits_TV.shape[0], device=logits_TV.device)
    vocabulary = logits_TV.shape[1]
    with torch.cuda.device_of(logits_TV):
        _cross_entropy[(logits_TV.shape[0],)](
            *(logits_TV, labels_T.contiguous(), losses, vocabulary), HAS_GRADIENT=has_gradient, **tile(vocabulary)
        )
    return losses


def tile(vocabulary: int) -> dict[str, int]:
    """Entries of a tile, and warps."""
    block = max(32, min(4096, triton.next_power_of_2(vocabulary)))
    return {"BLOCK": block, "num_warps": 8 if block > 1024 else 4}
