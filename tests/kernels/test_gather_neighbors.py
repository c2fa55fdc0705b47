"""`gather_neighbors` against the loader's definition."""

import pytest
import torch
from retro_kernels import cpp, reference
from retro_kernels.gather_neighbors import gather_neighbors

TABLE = torch.arange(1, 25).reshape(6, 4)
DOCUMENT = torch.tensor([0, 0, 1, 2, 2, 2])
LENGTHS = torch.tensor([4, 2, 4, 4, 4, 1])


def test_continuation_stops_at_the_document_and_at_a_short_row() -> None:
    ids = torch.tensor([[[0, 2, -1], [3, 5, 1]]])
    tokens, lengths = gather_neighbors(TABLE, DOCUMENT, LENGTHS, ids, 8, pad_id=0)
    assert lengths.tolist() == [[[6, 4, 0], [8, 1, 2]]]
    assert tokens[0, 0, 0].tolist() == [1, 2, 3, 4, 5, 6, 0, 0]
    assert tokens[0, 0, 1].tolist() == [9, 10, 11, 12, 0, 0, 0, 0]
    assert tokens[0, 0, 2].tolist() == [0] * 8
    assert tokens[0, 1, 0].tolist() == list(range(13, 21))
    for r in (1, 3, 4, 5, 9, 30):
        cut, valid = gather_neighbors(TABLE, DOCUMENT, LENGTHS, ids, r)
        assert cut.shape == (1, 2, 3, r)
        assert (valid <= r).all()
        assert cut[0, 0, 0, : valid[0, 0, 0]].tolist() == [1, 2, 3, 4, 5, 6][:r]


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int32, torch.int64])
def test_types_and_the_twin(dtype: torch.dtype) -> None:
    table = (TABLE + (65000 if dtype == torch.uint16 else 0)).to(dtype)
    ids = torch.randint(-1, 6, (2, 3, 2), generator=torch.Generator().manual_seed(3))
    found = gather_neighbors(table, DOCUMENT, LENGTHS, ids, 7, pad_id=3)
    exact = reference.gather_neighbors(table, DOCUMENT, LENGTHS, ids, 7, 3)
    assert all(torch.equal(a, b) for a, b in zip(found, exact))
    assert found[0].dtype == (torch.int64 if dtype == torch.uint16 else dtype)
    if cpp.is_available():
        torch.library.opcheck(torch.ops.retro_kernels.gather_neighbors.default, (table, DOCUMENT, LENGTHS, ids, 7, 3))


def test_wrong_arguments_are_named() -> None:
    for ids in (torch.tensor([6]), torch.tensor([-2])):
        with pytest.raises(ValueError, match="ids .* spans"):
            gather_neighbors(TABLE, DOCUMENT, LENGTHS, ids)
    with pytest.raises(ValueError, match="ids is torch.float32: expected a type of whole numbers"):
        gather_neighbors(TABLE, DOCUMENT, LENGTHS, torch.tensor([1.9]))
    with pytest.raises(ValueError, match="row_lengths is torch.bool"):
        gather_neighbors(TABLE, DOCUMENT, LENGTHS > 0, torch.tensor([1]))
    with pytest.raises(ValueError, match="document has shape"):
        gather_neighbors(TABLE, DOCUMENT[:2], LENGTHS, torch.tensor([0]))
    with pytest.raises(ValueError, match="table is torch.float32"):
        gather_neighbors(TABLE.float(), DOCUMENT, LENGTHS, torch.tensor([0]))
    wild = torch.tensor([4, -7, 4, 99, 4, 1])  # data, not arguments: nothing outside the table is read
    assert gather_neighbors(TABLE, DOCUMENT, wild, torch.tensor([0, 3, 1]), 8)[1].tolist() == [4, 8, 0]
    with pytest.raises(ValueError, match="retrieved_length"):
        gather_neighbors(TABLE, DOCUMENT, LENGTHS, torch.tensor([0]), 0)
    assert gather_neighbors(TABLE, DOCUMENT, LENGTHS, torch.zeros(0, dtype=torch.long), 5)[0].shape == (0, 5)
