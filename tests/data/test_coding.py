"""Who may read whose ids: both sides are named, and what to run."""

import pytest

from retro_engine.data.coding import Coding
from retro_engine.errors import StoreError

A = Coding("store/a", "a" * 64, 64)


@pytest.mark.parametrize(
    ("other", "what", "remedy"),
    [
        (Coding("store/b", "b" * 64, 64), "tokenizer", "--tokenizer store/a --chunk-size 64"),
        (Coding("store/b", "a" * 12 + "b" * 52, 64), "tokenizer", "retro prepare"),  # alike as far as it is shown
        (Coding("store/b", "a" * 64, 32), "chunk_size", "--tokenizer store/a --chunk-size 64"),
        (Coding("library", "a" * 64, 32, "library"), "chunk_size", "retro docs add"),
    ],
)
def test_each_side_and_the_remedy_are_named(other: Coding, what: str, remedy: str) -> None:
    A.check(A, Coding("elsewhere", A.tokenizer, A.chunk_size, "library"))
    with pytest.raises(StoreError) as found:
        A.check(A, other)
    lines = str(found.value).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"store/a has {what} ")
    assert lines[1].strip().startswith(f"{other.owner} has ")
    assert remedy in lines[2]


def test_a_model_that_lies_nowhere_asks_for_its_checkpoint() -> None:
    with pytest.raises(StoreError, match="--tokenizer CHECKPOINT"):
        Coding("the model", "c" * 64, 64, "model").check(A)
    with pytest.raises(StoreError, match="--tokenizer run/checkpoints/step-000001"):
        Coding("run/checkpoints/step-000001", "c" * 64, 64, "model").check(A)
