"""Packed SFT computes what verl's padding trainer computes: loss, gradient, weights after a step, validation loss."""

import pytest

from both_trainers import both_trainers
from ranks import apart

PADDED, ONE, MANY, TOKEN_MEAN = ("padded float32", "packed float32, one forward", "packed float32, many forwards",
                                 "token mean float32")
# Seen: 2e-7 for the gradient, 1e-7 for the losses and the weights.
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=[
    pytest.param(1, id="one_rank", marks=pytest.mark.long), pytest.param(2, id="two_ranks"),
    pytest.param(8, id="eight_ranks", marks=pytest.mark.long)])
def results(request) -> dict[str, dict]:
    return both_trainers("cpu", request.param, [PADDED, ONE, MANY, TOKEN_MEAN])


@pytest.mark.parametrize("packed", [ONE, MANY])
def test_packing_changes_neither_loss_nor_gradient_nor_the_step_nor_the_validation(results, packed):
    found, wanted = results[packed], results[PADDED]
    assert found["train/loss"] == pytest.approx(wanted["train/loss"], rel=TOLERANCE)
    assert found["val/loss"] == pytest.approx(wanted["val/loss"], rel=TOLERANCE)
    assert apart(found["gradients"], wanted["gradients"]) < TOLERANCE
    assert apart(found["parameters"], wanted["parameters"]) < TOLERANCE


def test_the_learning_rate_is_logged_as_verl_logs_it(results):
    assert results[ONE]["train/lr(1e-3)"] == results[PADDED]["train/lr(1e-3)"] > 0


def test_the_budget_decides_the_forwards_and_groups_are_divided_by_it(results):
    assert results[ONE]["training forwards"] == 1
    # More than the 4 groups of a rank: rows of a group are in different forwards.
    assert results[MANY]["training forwards"] > 4


def test_a_plain_mean_over_all_tokens_would_be_noticed(results):
    naive, wanted = results[TOKEN_MEAN], results[PADDED]
    assert abs(naive["train/loss"] / wanted["train/loss"] - 1) > 10 * TOLERANCE
    assert apart(naive["gradients"], wanted["gradients"]) > 100 * TOLERANCE
