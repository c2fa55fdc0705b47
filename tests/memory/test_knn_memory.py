"""A memory of states: nearest ones found, weights as good as any, what is held out is not there, damage is refused."""

import numpy as np
import pytest
import torch

from retro_engine.errors import StoreError, UsageError
from retro_engine.memory.knn_memory import INDEX, KnnMemory, KnnMixture, KnnWriter, Recalled

WEIGHTS, TOKENIZER = "a" * 64, "b" * 64


@pytest.fixture(scope="module")
def states() -> torch.Tensor:
    return torch.randn(400, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def memory(states: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> KnnMemory:
    """State n is before token n % 7, in document n // 100."""
    writer = KnnWriter(16, 400)
    for start in range(0, 400, 150):
        numbers = np.arange(start, min(start + 150, 400))
        writer.add(states[start : start + 150], numbers % 7, numbers // 100)
    return writer.publish(tmp_path_factory.mktemp("memory") / "knn", WEIGHTS, TOKENIZER)


def test_a_state_finds_itself_unless_it_is_held_out(memory: KnnMemory, states: torch.Tensor) -> None:
    numbers = np.arange(0, 400, 9)
    found = memory.recall(states[numbers], numbers % 7)
    nearest = found.distances_TK.argmin(1)
    assert found.is_it_TK[np.arange(len(numbers)), nearest].all()
    left, marks = memory.without(np.array([1, 3, 99]))
    assert marks.tolist() == [1, 3]
    held = np.isin(numbers // 100, marks)
    hidden = left.recall(states[numbers], numbers % 7).distances_TK.min(1)
    assert (hidden[~held] == found.distances_TK.min(1)[~held]).all() and (hidden[held] > 1).all()
    with pytest.raises(StoreError, match="nothing but documents that are held out"):
        memory.without(np.arange(4))


def test_fitted_weights_are_as_good_as_others() -> None:
    rng = np.random.default_rng(0)
    distances = rng.gamma(2.0, 1.0, (3000, 8)).astype(np.float32)
    distances[::50] = np.inf  # nothing was found
    is_it = rng.random((3000, 8)) < np.exp(-distances / 2) * 0.4
    recalled, before = Recalled(distances, is_it), np.full(3000, 0.05)
    best = KnnMixture.fitted(before, recalled)
    most = np.log(best.probabilities(before, recalled)).sum()
    assert 0 < best.weight < 1
    for weight in (0, best.weight - 0.05, best.weight + 0.05):
        assert np.log(KnnMixture(weight, best.temperature).probabilities(before, recalled)).sum() < most
    np.testing.assert_array_equal(best.probabilities(before, recalled)[::50], 0.05)
    nothing = Recalled(np.full((4, 8), np.inf, np.float32), np.zeros((4, 8), bool))
    np.testing.assert_array_equal(KnnMixture.fitted(before[:4], nothing).probabilities(before[:4], nothing), 0.05)
    for weight, temperature in ((-0.1, 1), (1.1, 1), (0.5, 0), (0.5, np.inf)):
        with pytest.raises(UsageError):
            KnnMixture(weight, temperature)


def test_another_models_states_and_damage_are_refused(memory: KnnMemory) -> None:
    memory.check(TOKENIZER, WEIGHTS, "the run")
    with pytest.raises(StoreError, match="has weights aaaaaaaaaaaa"):
        memory.check(TOKENIZER, "c" * 64, "the run")
    with pytest.raises(StoreError, match="has tokenizer bbbbbbbbbbbb"):
        memory.check("c" * 64, WEIGHTS, "the run")
    path = memory.folder / INDEX
    path.chmod(0o644)
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + b"\0")
    with pytest.raises(StoreError, match=r"is damaged[^$]*retro memory knn RUN makes it"):
        KnnMemory(memory.folder)
    path.write_bytes(raw)
    assert KnnMemory(memory.folder).summary()["tokens"] == 400
