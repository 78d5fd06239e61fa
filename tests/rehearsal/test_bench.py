"""bridge bench on CPU with verl's real trainers: what it measures, and a case that fails on the way."""

import json
from datetime import datetime

import pytest

from bridge.runs import metrics
from bridge.tools import trial
from door import DOOR, SHELL, left_running

# The fixture runs minutes, and longer on a busy machine.
pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

CASES = """
warm_up: 1
steps: {sft: 4, ppo: 2}
cases:
  - {name: sft-tiny, profile: tiny}
  - {name: sft-odd, profile: tiny, against: sft-tiny, overrides: [data.train_batch_size=7]}
  - {name: ppo-tiny, profile: tiny}
peak: {}
method: []
"""
# The door with other cases than those of configs/bench.yaml, which need a GPU.
BENCH = """
import os, sys
from pathlib import Path
import yaml
from bridge import door
from bridge.tools import bench
bench.CASES = yaml.safe_load(Path(os.environ["WORK_DIR"], "cases.yaml").read_text())
sys.exit(door.run(["bench"], os.environ))
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict:
    """What a benchmark of two ranks left behind."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "cases.yaml").write_text(CASES)
    (folder / "bench/cache").mkdir(parents=True)
    for file in ("cache/stale", trial.MARK):
        (folder / "bench" / file).touch()
    env = {"WORK_DIR": str(folder), "MODEL": "tiny", "DATA_SOURCE": "builtin", "GPUS": "2"}
    result = DOOR.run("-c", BENCH, env={**SHELL, **env}, timeout=1500)
    return {"folder": folder / "bench", "result": result,
            "json": json.loads((folder / "bench/bench.json").read_text())}


def test_a_case_that_fails_is_recorded_with_what_it_said_and_the_next_goes_on(measured):
    assert measured["result"].returncode == 1
    odd = measured["json"]["sft"]["odd"]
    assert odd["status"] == "failed" and odd["exit_status"] == 2 and odd["steps_made"] == 0
    assert any("data.train_batch_size=7 does not divide by 2 GPUs" in line for line in odd["log"])
    assert measured["json"]["ppo"]["tiny"]["status"] == "measured"
    assert measured["json"]["ratios"] == {}


@pytest.mark.parametrize(("stage", "steps"), [("sft", 4), ("ppo", 2)])
def test_the_figures_are_those_of_the_steps_that_were_run(measured, stage, steps):
    case = measured["json"][stage]["tiny"]
    rows = metrics.read(measured["folder"] / "runs" / f"{stage}-tiny" / stage / "metrics.jsonl")
    assert len(case["seconds_of_each_step"]) == steps - 1
    assert 0 < case["seconds_per_step"] <= case["first_step_seconds"] * 2
    # Real tokens are less than the padded positions, and rows of the made-up problems have 60 to 130.
    assert 0 < case["tokens_per_second"] < case["padded_tokens_per_second"]
    assert case["start_seconds"] > 3
    started = datetime.fromisoformat(case["started"]).timestamp()
    # "started" is written to the second; the first line comes when the first step is over.
    assert started + case["start_seconds"] + case["first_step_seconds"] == pytest.approx(rows[0]["time"], abs=1.1)
    if stage == "sft":
        assert 60 < case["row_tokens"] < 130 and case["tokens_per_step"] == pytest.approx(16 * case["row_tokens"], rel=1e-3)
    else:
        assert case["tokens_per_step"] == rows[1]["perf/total_num_tokens"]
        assert case["tokens_per_second"] == pytest.approx(rows[1]["perf/throughput"], rel=0.01)
        assert sum(case["phases"][phase] for phase in ("gen", "old_log_prob", "values", "update_critic", "update_actor")) \
            == pytest.approx(case["phases"]["step"], rel=0.1)
        assert 0 < case["answer_tokens"] <= 48


def test_nothing_is_saved_and_no_process_is_left_where_a_training_is_ended_early(measured):
    for name in ("sft", "ppo"):
        assert not list((measured["folder"] / "runs" / f"{name}-tiny" / name / "checkpoints").glob("global_step_*"))
    assert left_running(measured["folder"]) == []


def test_the_first_case_starts_without_the_caches_of_before(measured):
    assert (measured["folder"] / "cache").is_dir() and not (measured["folder"] / "cache/stale").exists()


def test_the_closing_table_and_the_files_beside_it_show_the_cases(measured):
    page = (measured["folder"] / "bench.md").read_text()
    assert page.strip() in measured["result"].stdout
    assert all(f"| {name} |" in page for name in ("sft-tiny", "ppo-tiny")) and "sft-odd failed after 0 steps" in page
