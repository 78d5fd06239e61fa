"""Runs of verl's real trainers that are interrupted or asked to stop go on where they were saved, and end where one ends that ran
through. PPO that is asked to stop: test_learning.py."""

import json
import signal
import subprocess
from pathlib import Path

import pandas
import pytest

from bridge.runs import checkpoints, metrics, record
from bridge.trainers import stoppable
from door import asked_to_stop, bridge, goes_on_to_its_end, left_running, newest_checkpoint, stopped_after

pytestmark = pytest.mark.long
STEPS = 64


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    for stage in ("data", "model"):
        assert run(folder, stage).returncode == 0
    return folder


def settings_of(work_dir: Path, **settings: str) -> dict[str, str]:
    return {"WORK_DIR": str(work_dir), "DATA_SOURCE": "builtin", "MODEL": "tiny", "PROFILE": "tiny", "GPUS": "2", **settings}


def run(work_dir: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
    return bridge(*arguments, **settings_of(work_dir, **settings))


@pytest.fixture(scope="module")
def uninterrupted(work_dir) -> list[dict]:
    """Metrics of an sft that ran through: 64 steps, an epoch ends at 32."""
    result = run(work_dir, "sft", RUN="through")
    assert result.returncode == 0, result.stderr[-3000:]
    # Here a user has started it.
    assert "checkpoints/global_step_64. Next: make merge STAGE=sft RUN=through" in result.stderr
    return metrics.read(work_dir / "runs" / "through" / "sft" / "metrics.jsonl")


# In the order of verl's own trainer, of which the uninterrupted run is: packing, and saving in the background, change nothing
# but the time it takes.
PACKED = ["bridge.packed_tokens_per_gpu=512", "trainer.seed=0", "trainer.save_freq=33",
          "+model.external_lib=bridge.trainers.background_save"]


@pytest.mark.parametrize(("step", "arguments"), [(32, ["trainer.save_freq=32"]), (33, PACKED)],
                         ids=["at an epoch's end", "packed, saved in the background"])
def test_an_sft_interrupted_and_then_asked_to_stop_goes_on_and_ends_like_an_uninterrupted_one(
        work_dir, uninterrupted, step, arguments):
    settings = settings_of(work_dir, RUN=f"stopped-after-{step}")
    folder = work_dir / "runs" / settings["RUN"] / "sft"
    assert stopped_after(step, work_dir, "sft", *arguments, **settings) == 128 + signal.SIGTERM
    assert left_running(work_dir) == []
    assert record.read(folder)["status"] == "failed"
    # Within the second epoch, where nothing but the request makes it save.
    stopped_at = asked_to_stop(40, work_dir, "sft", *arguments, **settings)
    assert 40 <= stopped_at < STEPS
    # One line a step, none twice, none skipped: verl alone would skip the whole second epoch after step 32.
    rows = goes_on_to_its_end(STEPS, stopped_at, work_dir, "sft", *arguments, **settings)
    # The same batches in the same order. The first steps are equal; gloo's sums may differ in their last bits.
    for row, wanted in zip(rows, uninterrupted, strict=True):
        assert row["train/loss"] == pytest.approx(wanted["train/loss"], rel=2e-2), row["step"]
    assert rows[-1]["val/loss"] == pytest.approx(uninterrupted[-1]["val/loss"], rel=2e-2)
    recorded = record.read(folder)
    assert [attempt["from_step"] for attempt in recorded["attempts"]] == [0, step, stopped_at]
    assert recorded["last_step"] == STEPS


def test_a_finished_run_is_left_alone(work_dir, uninterrupted):
    result = run(work_dir, "sft", RUN="through")
    assert result.returncode == 0 and "is finished" in result.stderr
    assert "torch.distributed" not in result.stdout


# The made-up problems' own score is 0 for each answer of a random model. This one differs between its answers.
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return len(set(solution_str)) / max(1, len(solution_str))
"""


def test_an_interrupted_ppo_goes_on_without_repeating_or_skipping_a_step(work_dir):
    (work_dir / "reward.py").write_text(REWARD)
    pandas.read_parquet(work_dir / "data" / "gsm8k" / "test.parquet")[:24].to_parquet(work_dir / "few.parquet")
    arguments = ["trainer.total_training_steps=3", f"custom_reward_function.path={work_dir / 'reward.py'}",
                 "trainer.test_freq=2", f"data.val_files={work_dir / 'few.parquet'}"]
    assert stopped_after(1, work_dir, "ppo", *arguments, **settings_of(work_dir, RUN="ppo")) == 128 + signal.SIGTERM
    assert left_running(work_dir) == [], "Ray's daemons must end with the run"
    folder = work_dir / "runs" / "ppo" / "ppo"
    # As a crash while PPO writes it (not atomically) leaves it; verl alone would stop with a traceback.
    (folder / "checkpoints" / checkpoints.TRACKER).write_text("")
    result = run(work_dir, "ppo", *arguments, RUN="ppo")
    assert result.returncode == 0, result.stderr[-3000:]
    rows = metrics.read(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert 0 < row["critic/score/min"] < row["critic/score/mean"] < row["critic/score/max"] <= 1
        # What is learned from: better and worse answers than the critic expected.
        assert row["critic/advantages/min"] < 0 < row["critic/advantages/max"] and row["actor/pg_loss"] != 0
    assert len({row["critic/score/mean"] for row in rows}) == 3
    # The answers to the first 20 of 24 problems, at the second step and at the end.
    kept = {file.stem: [json.loads(line) for line in file.read_text().splitlines()]
            for file in (folder / stoppable.SAMPLES).iterdir()}
    [first, last] = kept["2"], kept["3"]
    assert [row["input"] for row in first] == [row["input"] for row in last] and len(kept) == 2
    asked = pandas.read_parquet(work_dir / "few.parquet")["extra_info"][:stoppable.SAMPLED]
    assert [row["question"] in given["input"] for row, given in zip(asked, first, strict=True)] == [True] * stoppable.SAMPLED
    assert all(given["score"] == pytest.approx(len(set(given["output"])) / max(1, len(given["output"]))) for given in last)
    # What a log of Slurm's gets: one line a step, and none of the trainer's own words.
    lines = [line for line in result.stdout.splitlines() if line.startswith("ppo step ")]
    assert lines[-1].startswith("ppo step 3/3, ") and ", reward 0." in lines[-1] and ", validation 0." in lines[-1]
    assert "pid=" not in result.stdout and "TaskRunner" in (folder / "log.txt").read_text()
    # The oldest went when a third was whole.
    assert [checkpoint.step for checkpoint in record.saved_checkpoints(folder, "ppo")] == [2, 3]
    again = run(work_dir, "ppo", *arguments, RUN="ppo")
    assert "is finished" in again.stderr


def test_a_failing_trainers_exit_status_is_passed_on_and_recorded(work_dir):
    result = run(work_dir, "sft", "data.truncation=error", "data.max_length=8", RUN="fails", GPUS="1")
    assert result.returncode == 1
    folder = work_dir / "runs" / "fails" / "sft"
    assert record.read(folder)["status"] == "failed" and record.read(folder)["attempts"][-1]["exit_status"] == 1
    # The end of what the trainer said, then the cause and its place, above the log's path.
    assert "bridge: the last lines of the log:\n    " in result.stderr and "NotImplementedError" not in result.stdout
    *_, why, where = result.stderr.splitlines()
    assert "is larger than self.max_length=8 (sft_dataset.py, line " in why and "NotImplementedError" in why
    assert where.endswith(f"the log is {folder / 'log.txt'}")
    # It saved nothing, so it may be started with other settings.
    assert run(work_dir, "sft", "--dry-run", RUN="fails", GPUS="1").returncode == 0


def test_an_older_step_and_any_folder_that_verl_wrote_can_be_merged(work_dir, uninterrupted):
    # The checkpoints of the runs above.
    sft, ppo = work_dir / "runs" / "through" / "sft", work_dir / "runs" / "ppo" / "ppo"
    newest = newest_checkpoint(ppo, "ppo").path
    for settings, merged, shards in (({"STAGE": "sft", "STEP": "32"}, sft, sft / "checkpoints" / "global_step_32"),
                                     ({"CKPT": str(newest)}, work_dir / "runs" / "through" / "ckpt", newest / "actor")):
        result = run(work_dir, "merge", RUN="through", **settings)
        assert result.returncode == 0, result.stderr
        assert (merged / "merged" / "model.safetensors").is_file()
        assert f" {shards} -> {merged / 'merged'}" in result.stderr.splitlines()[0]
    assert "writes no text" in run(work_dir, "merge", CKPT=str(newest / "critic")).stderr
