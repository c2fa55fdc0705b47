"""Neighbor gathering on NVIDIA GPUs in Triton: one program owns one id and walks its row and the rows after it."""

# mypy: allow-untyped-defs
import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _gather_neighbors(
    TABLE, DOCUMENT, ROW_LENGTHS, IDS, TOKENS, LENGTHS, rows, pad_id,
    M: tl.constexpr, R: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, UNSIGNED: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    row = tl.load(IDS + number).to(tl.int64)
    place = tl.arange(0, BLOCK)
    total = 0
    goes_on = (row >= 0) & (row < rows)
    document = tl.load(DOCUMENT + row, mask=goes_on, other=-1)
    for step in range(SPAN):
        at = row + step
        goes_on = goes_on & (at < rows)
        goes_on = goes_on & (tl.load(DOCUMENT + at, mask=goes_on, other=-2) == document)
        length = tl.minimum(tl.maximum(tl.load(ROW_LENGTHS + at, mask=goes_on, other=0).to(tl.int32), 0), M)
        to = step * M + place
        valid = (place < length) & (to < R)
        tokens = tl.load(TABLE + at * M + place, mask=valid, other=0)
        tokens = tokens.to(TOKENS.dtype.element_ty)
        if UNSIGNED:  # stored as int16
            tokens = tokens & 0xFFFF
        tl.store(
            TOKENS + number * R + to,
            tl.where(valid, tokens, pad_id),
            mask=(place < M) & (to < R),
        )
        total += length
        goes_on = goes_on & (length == M)
    tl.store(LENGTHS + number, tl.minimum(total, R))


def gather_neighbors(
    table: Tensor, document: Tensor, row_lengths: Tensor, ids: Tensor, retrieved_length: int, pad_id: int
) -> tuple[Tensor, Tensor]:
    """As `reference.gather_neighbors`; an id outside the table gives length 0."""
    is_unsigned = table.dtype == torch.uint16
    dtype = torch.int64 if is_unsigned else table.dtype
    tokens = torch.empty((*ids.shape, retrieved_length), dtype=dtype, device=ids.device)
    lengths = torch.empty(ids.shape, dtype=torch.int64, device=ids.device)
    M = table.shape[1]
    if ids.numel():
        table = table.contiguous().view(torch.int16) if is_unsigned else table.contiguous()
        with torch.cuda.device_of(ids):
            _gather_neighbors[(ids.numel(),)](
                *(table, document.contiguous(), row_lengths.contiguous(), ids.contiguous(), tokens, lengths),
                *(table.shape[0], pad_id),
                **constants(M, retrieved_length),
                UNSIGNED=is_unsigned,
                num_warps=1,
            )
    return tokens, lengths


def constants(chunk_length: int, retrieved_length: int) -> dict[str, int]:
    """The kernel's constexpr arguments."""
    span = -(-retrieved_length // chunk_length)
    return {"M": chunk_length, "R": retrieved_length, "SPAN": span, "BLOCK": triton.next_power_of_2(chunk_length)}
