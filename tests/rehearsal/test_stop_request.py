"""A run that is asked to stop saves the step it is in, ends with 75, and goes on from there: with each of verl's trainers."""

import os
from pathlib import Path

import pytest

from bridge.runs import metrics, record
from bridge.trainers import stoppable
from door import bridge, left_running, stopped_on_request

pytestmark = pytest.mark.long
STEPS = 64


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    for stage in ("data", "model"):
        assert bridge(stage, **settings_of(folder)).returncode == 0
    return folder


def settings_of(work_dir: Path, **settings: str) -> dict[str, str]:
    return {"WORK_DIR": str(work_dir), "DATA_SOURCE": "builtin", "MODEL": "tiny", "PROFILE": "tiny", "GPUS": "2", **settings}


# Nothing but the end and the request makes them save. In the background, but for one: then the end waits for it.
BACKGROUND = "model.external_lib=bridge.trainers.background_save"
TRAINERS = {"sft": ("sft", ["trainer.save_freq=-1"], STEPS),
            "sft-packed": ("sft", ["trainer.save_freq=-1", "bridge.packed_tokens_per_gpu=512", f"+{BACKGROUND}"], STEPS),
            "ppo": ("ppo", ["trainer.save_freq=-1", "trainer.total_training_steps=3", f"actor_rollout_ref.{BACKGROUND}"], 3)}


@pytest.mark.parametrize("name", list(TRAINERS))
def test_a_request_ends_it_after_the_step_with_a_checkpoint_and_the_same_command_goes_on(work_dir, name):
    stage, arguments, steps = TRAINERS[name]
    env = settings_of(work_dir, RUN=name)
    folder = work_dir / "runs" / name / stage
    assert stopped_on_request(1, work_dir, stage, *arguments, **env) == os.EX_TEMPFAIL
    assert left_running(work_dir) == []
    recorded = record.read(folder)
    assert recorded["status"] == "stopped" and recorded["attempts"][-1]["exit_status"] == os.EX_TEMPFAIL
    stopped_at = metrics.read(folder / "metrics.jsonl")[-1]["step"]
    assert 1 <= stopped_at < steps
    assert [(found.step, found.complete) for found in record.saved_checkpoints(folder, stage)] == [(stopped_at, True)]
    said = (work_dir / f"{name}.out").read_text()
    assert "was asked to stop" in said and "failed" not in said.splitlines()[-1]

    result = bridge(stage, *arguments, **env)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"continuing from {folder}/checkpoints/global_step_{stopped_at} " in result.stderr
    # The old request is not taken for a new one.
    assert not (folder / stoppable.REQUEST).exists() and not (folder / stoppable.ANSWER).exists()
    assert [row["step"] for row in metrics.read(folder / "metrics.jsonl")] == list(range(1, steps + 1))
    recorded = record.read(folder)
    # (verl's PPO saves at its end only where it saves at all.)
    assert recorded["status"] == "finished" and recorded["last_step"] == (steps if stage == "sft" else stopped_at)
    assert [attempt["from_step"] for attempt in recorded["attempts"]] == [0, stopped_at]
