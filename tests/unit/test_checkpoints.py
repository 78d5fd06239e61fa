"""verl's checkpoint layout: what is complete, what is pruned, what resuming prepares."""

from pathlib import Path

import pytest
import torch
from shards import SAVED, write_checkpoint, write_shards

from bridge import settings
from bridge.runs import checkpoints
from bridge.stages import merge


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_checkpoint_with_all_files_whole_is_complete(tmp_path, stage):
    write_checkpoint(tmp_path, 10, stage)
    assert checkpoints.newest_complete(tmp_path, SAVED[stage]).step == 10


def test_steps_are_compared_as_numbers(tmp_path):
    for step in (9, 100, 20):
        write_checkpoint(tmp_path, step)
    assert checkpoints.newest_complete(tmp_path, SAVED["sft"]).step == 100


@pytest.mark.parametrize("missing", [
    "actor/model_world_size_2_rank_1.pt", "critic/optim_world_size_2_rank_0.pt", "actor/extra_state_world_size_2_rank_1.pt",
    "critic/fsdp_config.json", "actor/huggingface/config.json", "data.pt"])
def test_a_missing_file_makes_it_incomplete_and_is_named(tmp_path, missing):
    (write_checkpoint(tmp_path, 10, "ppo") / missing).unlink()
    [found] = checkpoints.list_checkpoints(tmp_path, SAVED["ppo"])
    assert Path(missing).name in found.faults[0]
    assert checkpoints.newest_complete(tmp_path, SAVED["ppo"]) is None


@pytest.mark.parametrize("keep_bytes", [0, 1, 200, -1])
def test_a_truncated_shard_makes_it_incomplete(tmp_path, keep_bytes):
    file = write_checkpoint(tmp_path, 10) / "optim_world_size_2_rank_1.pt"
    data = file.read_bytes()
    file.write_bytes(data[:keep_bytes])
    [found] = checkpoints.list_checkpoints(tmp_path, SAVED["sft"])
    assert "cut short" in found.faults[0]


def test_a_folder_of_another_name_is_no_checkpoint(tmp_path):
    write_checkpoint(tmp_path, 10).rename(tmp_path / "global_step_10.old")
    assert checkpoints.list_checkpoints(tmp_path, SAVED["sft"]) == []


def test_pruning_keeps_the_newest_complete_ones_and_what_is_being_written(tmp_path):
    for step in (10, 20, 30, 40):
        write_checkpoint(tmp_path, step)
    (tmp_path / "global_step_20" / "data.pt").unlink()
    (tmp_path / "global_step_40" / "data.pt").unlink()
    assert {path.name for path in checkpoints.prune(tmp_path, SAVED["sft"], 2)} == set()
    write_checkpoint(tmp_path, 50)
    removed = {path.name for path in checkpoints.prune(tmp_path, SAVED["sft"], 2)}
    assert removed == {"global_step_10", "global_step_20"}
    assert {path.name for path in tmp_path.iterdir()} == {"global_step_30", "global_step_40", "global_step_50"}


def test_pruning_nothing_when_all_are_kept(tmp_path):
    for step in (10, 20, 30):
        write_checkpoint(tmp_path, step)
    assert list(checkpoints.prune(tmp_path, SAVED["sft"], None)) == []
    assert len(checkpoints.list_checkpoints(tmp_path, SAVED["sft"])) == 3


@pytest.mark.parametrize("tracker", ["", "30", "garbage", None])
def test_resuming_puts_half_written_checkpoints_aside_and_mends_the_tracker(tmp_path, tracker):
    # PPO's trainer crashes on an empty tracker even when told what to resume.
    write_checkpoint(tmp_path, 10, "ppo")
    (write_checkpoint(tmp_path, 20, "ppo") / "data.pt").unlink()
    if tracker is not None:
        (tmp_path / checkpoints.TRACKER).write_text(tracker)
    newest = checkpoints.newest_complete(tmp_path, SAVED["ppo"])
    said = checkpoints.prepare_resume(tmp_path, "ppo", SAVED["ppo"], newest, steps_per_epoch=7)
    assert "global_step_20" in said[0] and not (tmp_path / "global_step_20").exists()
    assert (tmp_path / "global_step_20.set-aside" / "actor" / "model_world_size_2_rank_0.pt").is_file()
    assert (tmp_path / checkpoints.TRACKER).read_text() == "10"


def test_a_fresh_start_leaves_no_tracker_of_an_older_run(tmp_path):
    (tmp_path / checkpoints.TRACKER).write_text("30")
    checkpoints.prepare_resume(tmp_path, "sft", SAVED["sft"], None, steps_per_epoch=7)
    assert not (tmp_path / checkpoints.TRACKER).exists()


@pytest.mark.parametrize(("stage", "step", "put_aside"), [("sft", 14, True), ("sft", 10, False), ("ppo", 14, False)])
def test_the_data_loaders_state_is_put_aside_only_where_sft_would_skip_an_epoch(tmp_path, stage, step, put_aside):
    path = write_checkpoint(tmp_path, step, stage)
    newest = checkpoints.newest_complete(tmp_path, SAVED[stage])
    checkpoints.prepare_resume(tmp_path, stage, SAVED[stage], newest, steps_per_epoch=7)
    assert (path / "data.pt").exists() != put_aside
    # It stays a checkpoint to continue from.
    assert checkpoints.newest_complete(tmp_path, SAVED[stage]).step == step


def test_the_expected_size_is_that_of_weights_and_adam_in_fp32():
    assert checkpoints.expected_size(SAVED["sft"], 1_235_814_400) == pytest.approx(14.8e9, rel=0.01)
    assert checkpoints.expected_size(SAVED["ppo"], 1_235_814_400) == pytest.approx(29.7e9, rel=0.01)
    # Without a critic half of it, weights alone a third of that.
    assert checkpoints.expected_size(SAVED["grpo"], 1_235_814_400) == pytest.approx(14.8e9, rel=0.01)
    assert checkpoints.expected_size({".": ("model",)}, 1_235_814_400) == pytest.approx(4.94e9, rel=0.01)


def test_merging_says_which_newer_checkpoint_it_passes_over(tmp_path):
    folder = tmp_path / "runs" / "default" / "sft" / "checkpoints"
    for step in (10, 20):
        write_checkpoint(folder, step)
    (folder / "global_step_20" / "model_world_size_2_rank_1.pt").write_bytes(b"PK cut")
    plan = merge.plan(settings.read({"WORK_DIR": str(tmp_path)}), {})
    assert str(folder / "global_step_10") in plan.command
    assert "global_step_20 is newer but incomplete" in plan.notes[1]


def test_a_critic_is_known_by_its_weights_names(tmp_path):
    for name, weight in (("actor", "lm_head.weight"), ("critic", "score.weight")):
        write_shards(tmp_path / name)
        torch.save({weight: torch.zeros(2)}, tmp_path / name / "model_world_size_2_rank_0.pt")
    assert not checkpoints.is_value_model(tmp_path / "actor")
    assert checkpoints.is_value_model(tmp_path / "critic")
