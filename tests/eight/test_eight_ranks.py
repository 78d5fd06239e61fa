"""Eight ranks with the tutorial's own batches, on CPU: SFT stopped and continued, PPO, and the merges of their shards.

A ring of its own, since it takes minutes: make test ARGS=tests/eight. All of the chain: make rehearse GPUS=8.
"""

import signal
from pathlib import Path

import pytest

from bridge.runs import checkpoints, metrics, record
from door import bridge, left_running, newest_checkpoint, stopped_after

RANKS = 8
SETTINGS = {"DATA_SOURCE": "builtin", "MODEL": "tiny", "PROFILE": "eight", "GPUS": str(RANKS), "RUN": "eight",
            "CUDA_VISIBLE_DEVICES": ""}
# The built-in problems are short: less padding to compute on. And what the random model answers says nothing, however long.
SHORT = {"sft": ["data.max_length=128"], "ppo": ["data.max_prompt_length=64", "data.max_response_length=8"]}


def run(work_dir: Path, *arguments: str, **settings: str) -> str:
    """Run a stage to its end; returns what it said."""
    result = bridge(*arguments, WORK_DIR=str(work_dir), **SETTINGS, **settings)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    return result.stderr


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory) -> Path:
    """An SFT that was stopped at its first checkpoint and continued, and a step of PPO from its merged model."""
    folder = tmp_path_factory.mktemp("eight")
    run(folder, "data")
    run(folder, "model")
    assert stopped_after(2, folder, "sft", *SHORT["sft"], **SETTINGS) == 128 + signal.SIGTERM
    assert left_running(folder) == []
    assert f"continuing from {folder}/runs/eight/sft/checkpoints/global_step_2 " in run(folder, "sft", *SHORT["sft"])
    run(folder, "merge", STAGE="sft")
    run(folder, "ppo", *SHORT["ppo"], "trainer.total_training_steps=1", INIT="sft")
    run(folder, "merge", STAGE="ppo")
    assert left_running(folder) == []
    return folder / "runs" / "eight"


def test_a_stopped_sft_goes_on_where_it_was_saved(work_dir):
    rows = metrics.read(work_dir / "sft" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [attempt["from_step"] for attempt in record.read(work_dir / "sft")["attempts"]] == [0, 2]


def test_ppo_updates_actor_and_critic(work_dir):
    row, = metrics.read(work_dir / "ppo" / "metrics.jsonl")
    assert row["actor/grad_norm"] > 0 and row["critic/grad_norm"] > 0


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_the_merged_weights_are_the_eight_shards_one_after_the_other(work_dir, stage):
    import torch
    from safetensors.torch import load_file

    newest = newest_checkpoint(work_dir / stage, stage)
    assert newest.step == {"sft": 4, "ppo": 1}[stage]
    folder = newest.path / next(iter(checkpoints.mergeable(stage)))
    shards = [torch.load(folder / f"model_world_size_{RANKS}_rank_{rank}.pt", weights_only=False) for rank in range(RANKS)]
    merged = load_file(work_dir / stage / "merged" / "model.safetensors")
    assert len(list(folder.glob("model_*.pt"))) == RANKS and len(merged) > 10
    uneven = 0
    for name, tensor in merged.items():
        parts = [shard[name].to_local() for shard in shards]
        uneven += len({len(part) for part in parts}) > 1
        assert torch.equal(tensor, torch.cat(parts).to(torch.bfloat16)), name
    # The vocabulary does not divide by eight.
    assert uneven
