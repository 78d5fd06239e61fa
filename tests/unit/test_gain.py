"""tests/gpu/gain.py's permutation test: whether it finds a gain, and finds none where there is none."""

import gain
import numpy as np
import pytest

PROBLEMS, SEEDS = 1319, 3


def scores(rng, shares: np.ndarray, models: int) -> np.ndarray:
    """Scores 0 and 1 of so many models, each right with these probabilities by problem."""
    return (rng.random((models, shares.size)) < shares).astype(float)


def shares(rng) -> np.ndarray:
    """Problems as a small model finds them: 8 % are solved in the mean, most of them never."""
    return rng.beta(0.15, 1.7, PROBLEMS)


def test_models_of_one_kind_rarely_differ():
    found = []
    for number in range(100):
        rng = np.random.default_rng(number)
        same = shares(rng)
        found.append(gain.permutation_test(scores(rng, same, 1), scores(rng, same, SEEDS), draws=2000)["p"])
    # p is below a limit as often as the limit says, about: here at most 12 of 100 below 5 %, at most 5 below 1 %.
    assert sum(p < 0.05 for p in found) <= 12
    assert sum(p < 0.01 for p in found) <= 5
    # And it is no p that is never small, or small alone.
    assert 0.3 < np.mean(found) < 0.7


@pytest.mark.parametrize("sign", [1, -1])
def test_a_gain_is_found_and_so_is_a_loss(sign):
    rng = np.random.default_rng(0)
    low = shares(rng)
    high = np.minimum(1, low + 0.04)
    before, after = scores(rng, low, 1), scores(rng, high, SEEDS)
    found = gain.permutation_test(*((before, after) if sign > 0 else (after, before)))
    assert found["p"] < 0.001
    assert found["gain"] == pytest.approx(sign * (after.mean() - before.mean()))
    assert found["gain"] * sign > 0.02


def test_the_share_of_signs_is_exact_where_all_can_be_counted():
    # Five problems, right after and not before: of 32 signs two sums are as far from 0.
    found = gain.permutation_test([[0] * 5 + [1]], [[1] * 5 + [1]])
    assert found["p"] == pytest.approx(2 / 32, abs=0.005)
    assert (found["problems"], found["problems_that_differ"]) == (6, 5)


def test_means_of_different_numbers_of_models_are_compared():
    # (1 + 1 + 0) / 3 - 0, and (1 + 0 + 0) / 3 - 1.
    found = gain.permutation_test([[0, 1]], [[1, 1], [1, 0], [0, 0]])
    assert found["gain"] == pytest.approx((2 / 3 - 2 / 3) / 2)
    assert found["p"] == 1


def test_nothing_changed():
    assert gain.permutation_test([[0, 1, 0]], [[0, 1, 0]] * 3)["p"] == 1


def test_answers_to_other_problems_are_refused():
    with pytest.raises(ValueError, match="answers to 3 and to 2 problems"):
        gain.permutation_test([[0, 1, 0]], [[0, 1]])
