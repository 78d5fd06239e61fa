"""Runs that an older version of the program began go on: captured/begun_*.json are their records, as that version wrote them.

It ran with these overrides of the profile tiny on the built-in data and the tiny model, and was ended before its first step.
Who changes what a run is has to see to it that these two go on, or are refused with the reason.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from shards import plan, write_shards

from bridge.errors import UsageError
from bridge.runs import checkpoints, record
from bridge.stages import data

CAPTURED = Path(__file__).with_name("captured")
LIBRARY = {"sft": "model.external_lib", "ppo": "actor_rollout_ref.model.external_lib"}
OVERRIDES = {"sft": ("bridge.packed_tokens_per_gpu=512", "trainer.save_freq=1"), "ppo": ("trainer.save_freq=1",)}


def begun_before(env: dict[str, str], stage: str) -> Path:
    """The folder of a run that an older version began, and that saved its first step."""
    folder = Path(env["WORK_DIR"]) / "runs" / "default" / stage
    folder.mkdir(parents=True)
    shutil.copy(CAPTURED / f"begun_{stage}.json", folder / "run.json")
    step = folder / "checkpoints" / "global_step_1"
    for part, kinds in checkpoints.contents(stage, json.loads((folder / "run.json").read_text())["config"]).items():
        write_shards(step / part, kinds=kinds)
    torch.save({"state": 1}, step / "data.pt")
    return folder


@pytest.mark.parametrize("stage", LIBRARY)
def test_a_run_that_names_modules_by_older_names_goes_on(env, stage):
    folder = begun_before(env, stage)
    assert "bridge.speedups" in (folder / "run.json").read_text()
    planned = plan(env, stage, f"{LIBRARY[stage]}=bridge.trainers.speedups", *OVERRIDES[stage])
    assert planned.resume_step == 1
    # What is said of the attempts before stays as it was.
    assert record.begin(planned, env)["attempts"][0] == json.loads((folder / "run.json").read_text())["attempts"][0]


@pytest.mark.parametrize(("stage", "setting", "said"), [
    ("ppo", {"ALGO": "grpo"}, "algorithm.adv_estimator: gae -> grpo"), ("ppo", {"SEED": "7"}, "data.seed: None -> 7"),
    ("sft", {"SEED": "7"}, "trainer.seed: 1 -> 7")])
def test_another_algorithm_or_seed_is_another_run_and_refused(env, stage, setting, said):
    begun_before(env, stage)
    with pytest.raises(UsageError, match=said):
        plan({**env, **setting}, stage, f"{LIBRARY[stage]}=bridge.trainers.speedups", *OVERRIDES[stage])


@pytest.mark.parametrize("stage", LIBRARY)
def test_without_the_library_it_is_another_run_and_refused(env, stage):
    begun_before(env, stage)
    with pytest.raises(UsageError, match=rf"{LIBRARY[stage]}: bridge.trainers.speedups -> None"):
        plan(env, stage, *OVERRIDES[stage])


@pytest.mark.parametrize("stage", LIBRARY)
def test_an_override_with_the_older_name_is_refused_with_the_new_one(env, stage):
    with pytest.raises(UsageError, match=f"{LIBRARY[stage]}=bridge.speedups: this module is called bridge.trainers.speedups now"):
        plan(env, stage, f"{LIBRARY[stage]}=bridge.speedups", *OVERRIDES[stage])


def test_data_that_were_made_before_are_known(tmp_path):
    shutil.copy(CAPTURED / "begun_data.json", tmp_path / "run.json")
    assert data.recorded_source(tmp_path) == "builtin"
