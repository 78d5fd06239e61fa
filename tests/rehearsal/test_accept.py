"""bridge accept on CPU with two ranks and verl's real trainers."""

import json
import socket

import pytest

from door import bridge, left_running

# The fixture runs minutes, and longer on a busy machine.
pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

SECRET = "hf_the_users_own_token_must_not_appear"


@pytest.fixture(scope="module")
def accepted(tmp_path_factory) -> dict:
    """What the acceptance test left behind."""
    folder = tmp_path_factory.mktemp("accept")
    result = bridge("accept", WORK_DIR=str(folder), PROFILE="tiny", GPUS="2", HF_TOKEN=SECRET, timeout=1500)
    report = json.loads((folder / "accept/accept.json").read_text())
    return {"folder": folder, "result": result, "report": report, "steps": {row["step"]: row for row in report["steps"]}}


def test_every_step_passes(accepted):
    assert {name: row["status"] for name, row in accepted["steps"].items()} == dict.fromkeys(
        ("check", "all-reduce", "sft", "sft resumed", "merge sft", "ppo", "ppo resumed", "merge ppo"), "ok")
    assert accepted["result"].returncode == 0


def test_bandwidth_is_measured_for_each_size(accepted):
    rows = accepted["steps"]["all-reduce"]["seen"]
    assert [row["megabytes"] for row in rows] == [1, 4, 16]
    for row in rows:
        assert row["algbw_gb_s"] == pytest.approx(row["megabytes"] / 1e3 / row["seconds"], rel=0.01, abs=1e-3)
        # 2 (n - 1) / n is 1 for two ranks.
        assert row["busbw_gb_s"] == row["algbw_gb_s"] > 0


def test_a_stopped_training_is_continued_from_its_checkpoint(accepted):
    for stage in ("sft", "ppo"):
        assert accepted["steps"][stage]["seen"].endswith("saved and stopped")
        assert accepted["steps"][f"{stage} resumed"]["seen"].startswith("continued from step 2; step 3 after ")


def test_the_page_says_the_same_and_neither_names_the_host_the_place_or_a_secret(accepted):
    page = (accepted["folder"] / "accept/accept.txt").read_text()
    assert page.startswith("bridge accept: 8 steps passed, 0 failed")
    assert page.strip() in accepted["result"].stdout
    both = page + json.dumps(accepted["report"])
    for hidden in (SECRET, str(accepted["folder"])):
        assert hidden not in both
    assert socket.gethostname() not in both.replace('"', " ").split()


def test_no_process_is_left(accepted):
    assert left_running(accepted["folder"]) == []
