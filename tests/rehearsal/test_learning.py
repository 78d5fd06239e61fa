"""PPO and GRPO learn on CPU with verl's real trainers: a reward that a random model hardly gets is much higher after 20 steps."""

from pathlib import Path

import pytest

from bridge.runs import metrics
from door import bridge

pytestmark = pytest.mark.long
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return sum(character.isdigit() for character in solution_str) / max(1, len(solution_str))
"""
# So many answers a step, short ones, in one micro batch; one rank, which is as fast here as two.
SHORT = ["data.max_prompt_length=96", "data.max_response_length=16", "trainer.total_training_steps=20", "trainer.total_epochs=20",
         "trainer.save_freq=-1", "actor_rollout_ref.actor.optim.lr=1e-2", "critic.optim.lr=1e-2"]
PROMPTS = {"ppo": (64, 64), "grpo": (16, 80)}


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("learning")
    (folder / "digits.py").write_text(REWARD)
    for stage in ("data", "model"):
        assert bridge(stage, **settings_of(folder)).returncode == 0
    return folder


def settings_of(work_dir: Path, **settings: str) -> dict[str, str]:
    return {"WORK_DIR": str(work_dir), "DATA_SOURCE": "builtin", "MODEL": "tiny", "PROFILE": "tiny", "GPUS": "1", **settings}


@pytest.mark.parametrize("algo", PROMPTS)
def test_the_share_of_digits_in_the_answers_rises(work_dir, algo):
    prompts, answers = PROMPTS[algo]
    sizes = [f"data.train_batch_size={prompts}", f"actor_rollout_ref.actor.ppo_mini_batch_size={prompts}",
             *(f"{part}.ppo_micro_batch_size_per_gpu={answers}" for part in ("actor_rollout_ref.actor", "critic"))]
    result = bridge("ppo", *SHORT, *sizes, **settings_of(
        work_dir, RUN=algo, ALGO=algo, SEED="1", REWARD=f"{work_dir / 'digits.py'}:compute_score"))
    assert result.returncode == 0, result.stderr[-3000:]
    rewards = [row["critic/score/mean"] for row in metrics.read(work_dir / "runs" / algo / "ppo" / "metrics.jsonl")]
    assert len(rewards) == 20
    # Seen: 0.01 -> 0.87 with PPO, 0.99 with GRPO.
    assert max(rewards[:3]) < 0.05 and min(rewards[-3:]) > 0.4, rewards
