"""SEED= in SFT, a KL penalty and another kind of model, on CPU with verl's real trainers. SEED= in PPO: test_learning.py."""

import json
from pathlib import Path

import pytest

from bridge.errors import read_json
from bridge.runs import metrics
from bridge.stages import model
from bridge.standins import models
from door import bridge

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


def test_the_same_seed_draws_the_same_rows_of_sft_and_another_draws_others(work_dir):
    seen = {run: trained(work_dir, "sft", "trainer.total_training_steps=1", RUN=f"seed-{run}", SEED=seed)[0]["train/loss"]
            for run, seed in (("one", "1"), ("again", "1"), ("two", "2"))}
    assert seen["again"] == pytest.approx(seen["one"], rel=1e-5) and seen["two"] != pytest.approx(seen["one"], rel=1e-4)
    result = bridge("sft", "--dry-run", "trainer.total_training_steps=1", **settings_of(work_dir, RUN="seed-one", SEED="2"))
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
    # Nothing at first. Then a mean over a few drawn tokens, which may come out near nothing.
    first, second = (abs(row["actor/reward_kl_penalty"]) for row in rows)
    assert first < 1e-6 < second
    # The penalty is in what is learned from, and not in the score.
    assert rows[1]["critic/rewards/mean"] != rows[1]["critic/score/mean"]
