"""Weights of suffixes: found again where they are known, shares only, for the memory they were fitted for."""

import json
from pathlib import Path

import numpy as np
import pytest

from retro_engine.errors import MissingInputError, StoreError, UsageError
from retro_engine.memory.mixture import COUNTS, LENGTHS, SHAPE, Guesses, Mixture, collect


def guesses_of(rows: list[list[tuple[int, float]]]) -> Guesses:
    """(class, share) of each token's suffixes."""
    flat = [pair for row in rows for pair in row]
    classes, shares = (np.array([pair[i] for pair in flat]) for i in (0, 1))
    return Guesses(classes.astype(np.uint8), shares.astype(np.float32), np.cumsum([len(row) for row in rows]))


def test_a_suffix_is_mixed_over_the_shorter_ones() -> None:
    weights = np.zeros(SHAPE)
    weights.flat[3], weights.flat[90] = 0.5, 0.25
    guesses = guesses_of([[(3, 0.2), (90, 1.0)], [], [(3, 0.0)]])
    found = Mixture(weights).probabilities(np.array([0.1, 0.1, 0.1]), guesses)
    np.testing.assert_allclose(found, [0.75 * (0.5 * 0.1 + 0.5 * 0.2) + 0.25, 0.1, 0.05])


def test_counts_become_guesses_and_a_suffix_that_says_the_same_is_passed_over() -> None:
    context = np.array([[100, 40, 3, 3, 0], [100, 0, 0, 0, 0]])  # of 0 ... 4 tokens
    with_token = np.array([[100, 20, 10, 3, 2], [100, 7, 0, 0, 0]])
    found = collect(context, with_token)
    np.testing.assert_array_equal(found.ends_T, [3, 4])
    np.testing.assert_allclose(found.shares_J, [20 / 100, 10 / 40, 2 / 3, 7 / 100], rtol=1e-6)
    lengths = LENGTHS[found.classes_J // len(COUNTS)].tolist()
    assert lengths == [0, 1, 3, 0]  # of 2 and of 3 tokens there are the same three places
    assert COUNTS[found.classes_J % len(COUNTS)].tolist() == [256, 64, 4, 256]


def test_known_weights_are_found_again() -> None:
    """Tokens drawn from a mixture: the fitted weights are its, and fit better than others."""
    rng = np.random.default_rng(0)
    truth = {3: 0.7, 90: 0.2}
    rows, before = [], np.full(20_000, 0.05)
    for _ in before:
        row = [(3, rng.random() < (truth[3] + 0.3 * 0.05)), (90, rng.random() < 0.2)]
        rows.append([(which, float(is_right)) for which, is_right in row])
    chosen = np.array([any(share for _, share in row) or rng.random() < 0.05 for row in rows])
    kept = guesses_of([row for row, is_kept in zip(rows, chosen) if is_kept])
    p = before[: int(chosen.sum())]
    best = Mixture.fitted(p, kept)
    nats = -np.log(best.probabilities(p, kept)).sum()
    for which in (3, 90):
        for step in (-0.05, 0.05):
            other = best.weights_OC.copy()
            other.flat[which] = np.clip(other.flat[which] + step, 0, 1)
            assert -np.log(Mixture(other).probabilities(p, kept)).sum() > nats, (which, step)


def test_of_and_joined_keep_what_belongs_to_a_token() -> None:
    rows = [[(1, 0.1)], [], [(2, 0.2), (3, 0.3)], [(4, 0.4)]]
    whole = guesses_of(rows)
    again = Guesses.joined([whole.of(np.array([0, 1])), whole.of(np.array([2, 3]))])
    for name in ("classes_J", "shares_J", "ends_T"):
        np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))
    np.testing.assert_array_equal(whole.of(np.array([2])).classes_J, [2, 3])
    np.testing.assert_array_equal(whole.of(np.array([0, 2, 3])).longest().classes_J, [1, 3, 4])


@pytest.mark.parametrize("weight", [-0.01, 1.01, float("nan")])
def test_a_weight_is_a_share(weight: float, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="from 0 to 1"):
        Mixture.even(weight)
    path = tmp_path / "weights.json"
    path.write_text(json.dumps({"memory": "m", "weights": np.full(SHAPE, weight).tolist()}))
    with pytest.raises(UsageError, match="from 0 to 1"):
        Mixture.load(path, "m")


def test_saved_weights_are_of_one_memory(tmp_path: Path) -> None:
    path = tmp_path / "weights.json"
    Mixture.even(0.3).save(path, "a" * 64)
    np.testing.assert_array_equal(Mixture.load(path, "a" * 64).weights_OC, Mixture.even(0.3).weights_OC)
    with pytest.raises(StoreError, match="weights of memory aaaaaaaaaaaa"):
        Mixture.load(path, "b" * 64)
    with pytest.raises(MissingInputError):
        Mixture.load(tmp_path / "none", "a")
    for body in ({"memory": "m", "weights": [[0.5]]}, {"memory": "m", "weights": [["x"]]}, {"memory": "m"}):
        path.unlink()
        path.write_text(json.dumps(body))
        with pytest.raises((StoreError, UsageError)):
            Mixture.load(path, "m")
