"""PPO and GRPO learn on CPU with verl's real trainers, and what they learn from is as reckoned by hand (docs/grpo.md).

A reward that a random model hardly gets is much higher after some steps, though the training was asked to stop and went on.
"""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from bridge.errors import read_json
from bridge.runs import metrics, record
from door import asked_to_stop, bridge, goes_on_to_its_end

pytestmark = pytest.mark.long
# The share of digits. Where verl trains, it also leaves each step's batch beside this file, as both losses had it.
REWARD = """
import itertools, pathlib, sys

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return sum(character.isdigit() for character in solution_str) / max(1, len(solution_str))

if trainer := sys.modules.get("verl.trainer.ppo.ray_trainer"):
    import torch
    measure, folder = trainer.compute_data_metrics, pathlib.Path(__file__).parent
    numbers = itertools.count(1 + len(list(folder.glob("*.pt"))))

    def look_and_measure(batch, **options):
        torch.save((dict(batch.batch), list(batch.non_tensor_batch["uid"])), folder / f"{next(numbers)}.pt")
        return measure(batch, **options)

    trainer.compute_data_metrics = look_and_measure
"""
STEPS, LENGTH = 26, 16
# So many prompts and answers a step, in one micro batch; one rank, since two without a core each wait for each other.
PROMPTS = {"ppo": (64, 64), "grpo": (16, 80)}


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("learning")
    for stage in ("data", "model"):
        assert bridge(stage, **settings_of(folder)).returncode == 0
    # Answers end at random, most of them early: every token with an e ends one.
    file = folder / "models/tiny/generation_config.json"
    file.write_text(json.dumps({**read_json(file), "eos_token_id": ends(folder)}))
    return folder


def ends(work_dir: Path) -> list[int]:
    """The tokens that end an answer."""
    vocabulary = read_json(work_dir / "models/tiny/tokenizer.json")["model"]["vocab"]
    return [number for token, number in vocabulary.items() if "e" in token]


def settings_of(work_dir: Path, **settings: str) -> dict[str, str]:
    return {"WORK_DIR": str(work_dir), "DATA_SOURCE": "builtin", "MODEL": "tiny", "PROFILE": "tiny", "GPUS": "1", **settings}


def command(work_dir: Path, algo: str, run: str, steps: int = STEPS, seed: str = "1") -> tuple[list[str], dict[str, str]]:
    """Arguments and settings of a training."""
    folder = work_dir / f"reward-{run}"
    folder.mkdir(exist_ok=True)
    (folder / "digits.py").write_text(REWARD)
    prompts, answers = PROMPTS[algo]
    # Nothing but a request makes it save.
    arguments = ["data.max_prompt_length=96", f"data.max_response_length={LENGTH}", f"trainer.total_training_steps={steps}",
                 f"trainer.total_epochs={STEPS}", "trainer.save_freq=-1", f"data.train_batch_size={prompts}",
                 f"actor_rollout_ref.actor.ppo_mini_batch_size={prompts}",
                 *(f"{part}.{setting}" for part in ("actor_rollout_ref.actor", "critic") for setting in (
                     "optim.lr=1e-2", f"ppo_micro_batch_size_per_gpu={answers}"))]
    # One of them in the background: then the end waits for it.
    if algo == "ppo":
        arguments.append("actor_rollout_ref.model.external_lib=bridge.trainers.background_save")
    return arguments, settings_of(work_dir, RUN=run, ALGO=algo, SEED=seed, REWARD=f"{folder / 'digits.py'}:compute_score")


# The algorithm, and each step's metrics and batch.
Trained = tuple[str, list[dict], list[tuple[dict[str, torch.Tensor], list[str]]]]


def train(work_dir: Path, algo: str) -> Trained:
    """Train, be asked to stop, and go on."""
    arguments, settings = command(work_dir, algo, algo)
    stopped_at = asked_to_stop(4, work_dir, "ppo", *arguments, **settings)
    folder = work_dir / "runs" / algo / "ppo"
    # All that it saved; GRPO has no critic.
    (saved,) = record.saved_checkpoints(folder, "ppo")
    parts = sorted(path.name for path in saved.path.iterdir() if path.is_dir())
    assert parts == (["actor", "critic"] if algo == "ppo" else ["actor"])
    rows = goes_on_to_its_end(STEPS, stopped_at, work_dir, "ppo", *arguments, **settings)
    # (verl's PPO saves at its end only where it saves at all.)
    assert record.read(folder)["last_step"] == stopped_at
    return algo, rows, [torch.load(work_dir / f"reward-{algo}/{row['step']}.pt", weights_only=True) for row in rows]


@pytest.fixture(scope="module")
def ppo(work_dir) -> Trained:
    return train(work_dir, "ppo")


@pytest.fixture(scope="module")
def grpo(work_dir) -> Trained:
    return train(work_dir, "grpo")


@pytest.fixture(params=PROMPTS)
def trained(request) -> Trained:
    return request.getfixturevalue(request.param)


def test_the_share_of_digits_in_the_answers_rises(trained):
    _, rows, _ = trained
    rewards = [row["critic/score/mean"] for row in rows]
    # Where nothing is learned it stays below 0.05.
    assert max(rewards[:3]) < 0.05 and min(rewards[-3:]) > 0.4, rewards


def test_an_answers_tokens_up_to_its_end_are_learned_from_and_no_others(work_dir, trained):
    _, _, batches = trained
    for batch, _ in batches:
        is_end = torch.isin(batch["responses"], torch.tensor(ends(work_dir)))
        wanted = [[not any(row[:place]) for place in range(LENGTH)] for row in is_end.tolist()]
        assert batch["response_mask"].bool().tolist() == wanted
    # Most of the first answers end early, at more than one place, or nothing was tried.
    lengths = batches[0][0]["response_mask"].sum(1).tolist()
    assert sum(length < LENGTH for length in lengths) > len(lengths) / 2 and len(set(lengths)) > 4


def test_advantages_are_those_reckoned_by_hand(trained):
    algo, _, batches = trained
    for batch, prompts in batches:
        scores, mask = batch["token_level_scores"].sum(1), batch["response_mask"].bool()
        if algo == "ppo":
            # Discounted by nothing: how much better an answer is than the critic said at each of its tokens, scaled over all.
            gains = scores.unsqueeze(1) - batch["values"]
            wanted = (gains - gains[mask].mean()) / (gains[mask].var() + 1e-8).sqrt()
        else:
            wanted = torch.zeros_like(batch["advantages"])
            for prompt in set(prompts):
                own = torch.tensor([other == prompt for other in prompts])
                wanted[own] = ((scores[own] - scores[own].mean()) / (scores[own].std() + 1e-6)).unsqueeze(1)
        torch.testing.assert_close(batch["advantages"][mask], wanted.expand_as(mask)[mask], rtol=1e-3, atol=1e-4)


def test_losses_are_those_reckoned_by_hand(trained):
    algo, rows, batches = trained
    for row, (batch, _) in zip(rows, batches, strict=True):
        mask = batch["response_mask"].bool()
        # A step's only update comes first: no probability has changed, and nothing is clipped.
        assert row["actor/pg_loss"] == pytest.approx(-batch["advantages"][mask].mean().item(), abs=1e-4)
        if algo == "ppo":
            errors = (batch["values"] - batch["returns"])[mask]
            assert row["critic/vf_loss"] == pytest.approx(0.5 * (errors ** 2).mean().item(), rel=1e-3)
        else:
            assert "critic/vf_loss" not in row and row["actor/kl_coef"] == pytest.approx(0.001)
    if algo == "grpo":
        # The first model is the reference itself, and leaves it.
        assert abs(rows[0]["actor/kl_loss"]) < 1e-6 < rows[-1]["actor/kl_loss"]


# What a first step drew: the rows, the critic's head, the answers.
DRAWN = ["prompt_length/mean", "critic/values/mean", "actor/entropy", "critic/score/mean"]


def test_the_same_seed_draws_the_same_and_another_draws_other_numbers(work_dir, ppo):
    _, rows, _ = ppo
    first = [rows[0][name] for name in DRAWN]
    for run, seed, like in (("again", "1", partial(pytest.approx, rel=1e-5)), ("two", "2", partial(pytest.approx, rel=1e-4))):
        arguments, settings = command(work_dir, "ppo", run, steps=1, seed=seed)
        result = bridge("ppo", *arguments, **settings)
        assert result.returncode == 0, result.stderr[-3000:]
        (row,) = metrics.read(work_dir / "runs" / run / "ppo" / "metrics.jsonl")
        same = [row[name] == like(value) for name, value in zip(DRAWN, first, strict=True)]
        # Of another seed not the mean length alone, which two draws may share.
        assert all(same) if run == "again" else sum(same) <= 1, (row, first)
    arguments, settings = command(work_dir, "ppo", "again", steps=1, seed="2")
    result = bridge("ppo", "--dry-run", *arguments, **settings)
    assert result.returncode != 0 and "seed: 1 -> 2" in result.stderr


def test_what_grpo_trained_is_merged_and_evaluated(work_dir, grpo):
    for stage, more in (("merge", {}), ("eval", {"LIMIT": "4"})):
        result = bridge(stage, **settings_of(work_dir, RUN="grpo", STAGE="ppo", **more))
        assert result.returncode == 0, result.stderr[-3000:]
    assert (work_dir / "runs/grpo/ppo/merged/model.safetensors").is_file()
