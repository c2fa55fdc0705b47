"""Chunk ids -> the tokens of each chunk and of its continuation, with the number that is valid.

A neighbor is row c and the rows after it while they are full and of the same document, r tokens in all; id -1 is a
missing neighbor of length 0. Reads ceil(r/m) rows and writes r tokens per id: that copy is the roofline.
"""

import torch
from retro_kernels import reference
from retro_kernels.backend import choose, gather_kernels
from retro_kernels.checks import check_range, check_whole, is_unobserved
from torch import Tensor

TABLE_TYPES = (torch.uint16, torch.int32, torch.int64)


def gather_neighbors(
    table: Tensor,
    document: Tensor,
    row_lengths: Tensor,
    ids: Tensor,
    retrieved_length: int = 128,
    pad_id: int = 0,
) -> tuple[Tensor, Tensor]:
    """table [rows, m] tokens, document [rows], row_lengths [rows], ids [...] -> tokens [..., r], lengths [...].

    The table is uint16, int32 or int64; tokens have its type, int64 for uint16. document and row_lengths are used in
    place as int32 and copied at every call otherwise; a row length counts as 0 ... m, whatever it is. On a GPU the table
    may stay in host memory that `cuda.register_host` was given. Raises ValueError for shapes and types that disagree and for ids below -1 or at
    or above the number of rows; on a GPU ids are data: one outside the table has length 0.
    """
    if table.dim() != 2 or table.shape[1] == 0:
        raise ValueError(f"table has shape {tuple(table.shape)}; expected [rows, m] with m >= 1")
    if table.dtype not in TABLE_TYPES:
        raise ValueError(f"table is {table.dtype}; expected one of {', '.join(map(str, TABLE_TYPES))}")
    for name, tensor in (("document", document), ("row_lengths", row_lengths)):
        if tensor.shape != table.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected [rows] = [{table.shape[0]}]")
        check_whole(name, tensor)
        if tensor.device != ids.device:
            raise ValueError(f"{name} is on {tensor.device}, ids are on {ids.device}: expected one device")
    if table.device != ids.device and not ids.is_cuda:
        raise ValueError(f"table is on {table.device}, ids are on {ids.device}: expected one device")
    if retrieved_length < 1:
        raise ValueError(f"retrieved_length={retrieved_length}: must be at least 1")
    check_range("ids", ids, table.shape[0] - 1, low=-1)
    if choose("gather_neighbors", ids) == "reference":
        return reference.gather_neighbors(table, document, row_lengths, ids, retrieved_length, pad_id)
    if is_unobserved(table, ids):
        return gather_kernels(ids).gather_neighbors(table, document, row_lengths, ids, retrieved_length, pad_id)
    return _gather_neighbors(table, document, row_lengths, ids, retrieved_length, pad_id)


@torch.library.custom_op("retro_kernels::gather_neighbors", mutates_args=())
def _gather_neighbors(
    table: Tensor, document: Tensor, row_lengths: Tensor, ids: Tensor, retrieved_length: int, pad_id: int
) -> tuple[Tensor, Tensor]:
    kernels = gather_kernels(ids)
    return kernels.gather_neighbors(table, document, row_lengths, ids, retrieved_length, pad_id)


@_gather_neighbors.register_fake
def _(table, document, row_lengths, ids, retrieved_length, pad_id):  # type: ignore[no-untyped-def]
    dtype = torch.int64 if table.dtype == torch.uint16 else table.dtype
    return ids.new_empty((*ids.shape, retrieved_length), dtype=dtype), ids.new_empty(ids.shape, dtype=torch.int64)
