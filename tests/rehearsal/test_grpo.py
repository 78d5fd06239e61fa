"""GRPO, SEED=, a KL penalty and another kind of model, on CPU with verl's real trainers."""

import json
import signal
from pathlib import Path

import pytest

from bridge.errors import read_json
from bridge.runs import metrics, record
from bridge.stages import model
from bridge.standins import models
from door import bridge, left_running, newest_checkpoint, stopped_after

pytestmark = pytest.mark.long
# It differs between the answers of a random model.
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return len(set(solution_str)) / max(1, len(solution_str))
"""


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("grpo")
    (folder / "reward.py").write_text(REWARD)
    for stage in ("data", "model"):
        assert bridge(stage, **settings_of(folder)).returncode == 0
    return folder


def settings_of(work_dir: Path, **settings: str) -> dict[str, str]:
    return {"WORK_DIR": str(work_dir), "DATA_SOURCE": "builtin", "MODEL": "tiny", "PROFILE": "tiny", "GPUS": "2",
            "REWARD": f"{work_dir / 'reward.py'}:compute_score", **settings}


def trained(work_dir: Path, stage: str, *arguments: str, **settings: str) -> list[dict]:
    """Metrics of a stage that ran to its end."""
    result = bridge(stage, *arguments, **settings_of(work_dir, **settings))
    assert result.returncode == 0, result.stderr[-3000:]
    return metrics.read(work_dir / "runs" / settings["RUN"] / stage / "metrics.jsonl")


def test_grpo_is_interrupted_goes_on_and_its_model_is_merged_and_evaluated(work_dir):
    arguments = ["trainer.total_training_steps=3", "actor_rollout_ref.actor.optim.lr=1e-3"]
    settings = settings_of(work_dir, RUN="grpo", ALGO="grpo")
    assert stopped_after(1, work_dir, "ppo", *arguments, **settings) == 128 + signal.SIGTERM
    assert left_running(work_dir) == []
    rows = trained(work_dir, "ppo", *arguments, RUN="grpo", ALGO="grpo")
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        # Better and worse answers than the others to their prompt, which are as far above as below; no critic.
        assert row["critic/advantages/min"] < 0 < row["critic/advantages/max"]
        assert "critic/vf_loss" not in row and row["actor/kl_coef"] == pytest.approx(0.001)
    # The first model is the reference itself, and each step leads further away.
    assert 0 < rows[0]["actor/kl_loss"] < rows[-1]["actor/kl_loss"]
    folder = work_dir / "runs" / "grpo" / "ppo"
    assert sorted(path.name for path in newest_checkpoint(folder, "ppo").path.iterdir() if path.is_dir()) == ["actor"]
    assert record.read(folder)["attempts"][-1]["from_step"] in (1, 2)
    for stage, also in (("merge", {"STAGE": "ppo"}), ("eval", {"STAGE": "ppo", "LIMIT": "4"})):
        result = bridge(stage, **{**settings, **also})
        assert result.returncode == 0, result.stderr[-3000:]
    assert (folder / "merged" / "model.safetensors").is_file()


# What the first step drew: the rows, the critic's head, the answers.
DRAWN = {"sft": ["train/loss"], "ppo": ["prompt_length/mean", "critic/values/mean", "actor/entropy", "critic/score/mean"]}


@pytest.mark.parametrize("stage", DRAWN)
def test_the_same_seed_draws_the_same_and_another_draws_other_numbers(work_dir, stage):
    seen = {}
    for run, seed in (("one", "1"), ("again", "1"), ("two", "2")):
        rows = trained(work_dir, stage, "trainer.total_training_steps=1", RUN=f"seed-{run}", SEED=seed)
        seen[run] = [rows[0][name] for name in DRAWN[stage]]
    assert seen["again"] == pytest.approx(seen["one"], rel=1e-5)
    # Not the mean length alone, which two draws may share.
    other = [one != pytest.approx(two, rel=1e-4) for one, two in zip(seen["one"], seen["two"], strict=True)]
    assert sum(other) >= max(1, len(other) - 1)
    result = bridge(stage, "--dry-run", "trainer.total_training_steps=1", **settings_of(work_dir, RUN="seed-one", SEED="2"))
    assert result.returncode != 0 and "seed: 1 -> 2" in result.stderr


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    """Qwen2.5's shape in small: biases in its attention, and more queries than keys."""
    small = {**read_json(models.SHAPES / "qwen2.5-0.5b.json"), "vocab_size": 50000, "hidden_size": 64, "intermediate_size": 128,
             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    folder = tmp_path_factory.mktemp("qwen") / "small"
    with pytest.MonkeyPatch.context() as patch:
        shapes = tmp_path_factory.mktemp("shapes")
        (shapes / "small.json").write_text(json.dumps(small))
        patch.setattr(models, "SHAPES", shapes)
        model.make("random:small", folder, folder / "none.parquet")
    return folder


def test_a_qwen_trains_with_sft_packed_and_with_a_kl_penalty_in_ppos_reward(work_dir, qwen):
    rows = trained(work_dir, "sft", "bridge.packed_tokens_per_gpu=512", "trainer.total_training_steps=8", "optim.lr=1e-3",
                   RUN="qwen", MODEL=str(qwen))
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    rows = trained(work_dir, "ppo", "algorithm.use_kl_in_reward=True", "actor_rollout_ref.actor.optim.lr=1e-3",
                   RUN="qwen", MODEL=str(qwen))
    assert [row["actor/reward_kl_penalty_coeff"] for row in rows] == [0.001, 0.001]
    assert abs(rows[0]["actor/reward_kl_penalty"]) < 1e-3 < abs(rows[1]["actor/reward_kl_penalty"])
    # The penalty is in what is learned from, and not in the score.
    assert rows[1]["critic/rewards/mean"] != rows[1]["critic/score/mean"]
