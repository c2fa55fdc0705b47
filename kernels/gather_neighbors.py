"""Chunk ids -> the tokens of each chunk and of its continuation, with the number that is valid.

A neighbor is row c and the rows after it while they belong to the same document, r tokens in all; id -1 is a
missing neighbor of length 0. Reads ceil(r/m) rows and writes r tokens per id: that copy is the roofline.
"""

from retro_kernels import reference
from retro_kernels.backend import choose
from torch import Tensor


def gather_neighbors(
    table: Tensor,
    document: Tensor,
    row_lengths: Tensor,
    ids: Tensor,
    retrieved_length: int = 128,
    pad_id: int = 0,
) -> tuple[Tensor, Tensor]:
    """table [rows, m] tokens, document [rows], row_lengths [rows], ids [...] -> tokens [..., r], lengths [...].

    Raises ValueError for shapes that disagree and for ids below -1 or at or above the number of rows.
    """
    if table.dim() != 2 or table.shape[1] == 0:
        raise ValueError(f"table has shape {tuple(table.shape)}; expected [rows, m] with m >= 1")
    for name, tensor in (("document", document), ("row_lengths", row_lengths)):
        if tensor.shape != table.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected [rows] = [{table.shape[0]}]")
    if retrieved_length < 1:
        raise ValueError(f"retrieved_length={retrieved_length}: must be at least 1")
    if not ids.is_cuda and ids.numel() and (int(ids.min()) < -1 or int(ids.max()) >= table.shape[0]):
        raise ValueError(
            f"ids span {int(ids.min())} ... {int(ids.max())}; expected -1 (missing) to {table.shape[0] - 1}"
        )
    choose("gather_neighbors", table)
    return reference.gather_neighbors(table, document, row_lengths, ids, retrieved_length, pad_id)
