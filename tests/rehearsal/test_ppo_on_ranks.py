"""PPO on several ranks of FSDP, over gloo in float32: the update of the profile tuned is that of the tutorial."""

from pathlib import Path

import pytest

import both_updates
from both_updates import MINI_ROWS, TOKEN_MEAN, TUNED, TUTORIAL
from ranks import apart, in_a_process

# Seen: 3e-7 for the gradient, 1e-7 for the losses, the weights and what is computed before the update.
TOLERANCE = 1e-5
pytestmark = pytest.mark.long


@pytest.fixture(scope="module", params=[
    pytest.param(2, id="two_ranks"), pytest.param(8, id="eight_ranks")])
def results(request) -> dict[str, dict]:
    found = in_a_process(Path(both_updates.__file__), "--ranks", str(request.param))
    assert len(found[TUNED]["actor"]["forwards"]) == request.param
    return found


@pytest.mark.parametrize("part", ["actor", "critic"])
def test_the_tuned_profile_changes_neither_loss_nor_gradient_nor_weights(results, part):
    found, wanted = results[TUNED][part], results[TUTORIAL][part]
    assert len(wanted["losses"]) == len(wanted["gradients"]) == 2
    assert found["losses"].tolist() == pytest.approx(wanted["losses"].tolist(), rel=TOLERANCE)
    for ours, verls in zip(found["gradients"], wanted["gradients"], strict=True):
        assert apart(ours, verls) < TOLERANCE
    assert apart(found["parameters"], wanted["parameters"]) < TOLERANCE


@pytest.mark.parametrize(("part", "names"), [("actor", {"old_log_probs", "entropys"}), ("critic", {"values"})])
def test_the_tuned_profile_computes_the_same_log_probabilities_entropies_and_values(results, part, names):
    found, wanted = results[TUNED][part]["outputs"], results[TUTORIAL][part]["outputs"]
    assert set(wanted) == names
    for name in names:
        # 0 at padding.
        assert wanted[name][wanted[name] != 0].std() > 0.05
        assert apart({name: found[name]}, {name: wanted[name]}) < TOLERANCE, name


@pytest.mark.parametrize("part", ["actor", "critic"])
def test_all_ranks_run_as_many_forwards_as_the_one_that_needs_most(results, part):
    found = results[TUNED][part]
    for minis in zip(*found["needed"], strict=True):
        assert min(minis) < max(minis) < MINI_ROWS
    most = [max(minis) for minis in zip(*found["needed"], strict=True)]
    assert found["forwards"] == [most] * len(found["needed"])


@pytest.mark.parametrize("part", ["actor", "critic"])
def test_verls_mean_over_the_tokens_of_a_micro_batch_would_be_noticed(results, part):
    found, wanted = results[TOKEN_MEAN][part], results[TUTORIAL][part]
    for ours, verls in zip(found["gradients"], wanted["gradients"], strict=True):
        assert apart(ours, verls) > 1000 * TOLERANCE
    assert apart(found["parameters"], wanted["parameters"]) > 10 * TOLERANCE
