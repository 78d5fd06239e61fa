"""How the rehearsal chooses its ranks and its profile; the whole of it runs in tests/rehearsal."""

import pytest

from bridge import settings
from bridge.compose import compose
from bridge.errors import UsageError
from bridge.stages import ppo, sft
from bridge.tools import rehearse

NAMES = dict.fromkeys(("WORK_DIR", "BRIDGE_MODEL_DIR", "BRIDGE_STAGE_DIR", "BRIDGE_RUN_NAME", "WANDB_PROJECT"), "x")


@pytest.mark.parametrize("model", ["tiny", "smollm2"])
@pytest.mark.parametrize("ranks", (1, 2, 4, 8))
def test_the_batches_divide_by_every_number_of_ranks(model, ranks):
    for stage in (sft, ppo):
        name = stage.__name__.rpartition(".")[2]
        config = compose(name, [f"profile/{name}={rehearse.profile(model, ranks)}"], NAMES)
        assert stage.divisibility(config, ranks, None) == []


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_more_than_two_ranks_take_the_tutorials_own_batches(stage):
    eight, tutorial = (compose(stage, [f"profile/{stage}={profile}"], NAMES) for profile in ("eight", "tutorial"))
    assert eight["data"]["train_batch_size"] == tutorial["data"]["train_batch_size"] == 256
    if stage == "sft":
        assert eight["data"]["micro_batch_size_per_gpu"] == 8
    else:
        for part in (eight["actor_rollout_ref"]["actor"], eight["critic"]):
            assert (part["ppo_mini_batch_size"], part["ppo_micro_batch_size_per_gpu"]) == (64, 4)


def test_a_number_of_ranks_that_cannot_be_is_refused_before_anything_is_removed(tmp_path):
    left = tmp_path / "rehearsal" / "runs" / "left.txt"
    left.parent.mkdir(parents=True)
    left.touch()
    env = {"WORK_DIR": str(tmp_path), "GPUS": "3", "CUDA_VISIBLE_DEVICES": ""}
    with pytest.raises(UsageError, match=r"^GPUS=3: data.train_batch_size=256 does not divide by 3 GPUs"):
        rehearse.run(settings.read(env), env, [])
    assert left.is_file()
