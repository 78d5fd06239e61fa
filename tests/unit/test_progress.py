"""What is shown of a training while it goes: by the door, and by `bridge follow` from the files of a run."""

import json
import os
import pty
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from bridge.errors import write_whole
from bridge.runs import progress, record
from door import SHELL, bridge, recorded

STARTED = "2026-11-30T12:00:00+00:00"
BEGAN = 1796040000.0
CONFIG = {"trainer": {"n_gpus_per_node": 4, "nnodes": 2}}
# A door that runs the program of its second argument, with a display.
DOOR = """
import os, sys, time
from pathlib import Path
from bridge.runs import launch, progress, record
from bridge.runs.metrics import Metrics
folder = Path(sys.argv[1]); kept = Metrics(folder / "metrics.jsonl", 0)
run = {"status": "running", "steps": 3, "config": {"trainer": {"n_gpus_per_node": 2, "nnodes": 1}},
       "attempts": [{"started": record.now(), "from_step": 0, "gpus": []}]}
shown = progress.Display("sft", folder, lambda: (run, kept.before + kept.rows))
sys.exit(launch.run([sys.executable, "-u", "-c", sys.argv[2]], os.environ, folder / "log.txt", kept, ["s3cret"], display=shown))
"""
FLOOD = """
    import time
    print("a flood of words"); print("(TaskRunner pid=7) bridge: the first save takes memory, s3cret")
    print("[rank1]: bridge: the first save takes memory, s3cret")
    for step in (1, 2, 3):
        print(f"Epoch 1/1: step:{step} - train/loss:{4 - step} - perf/throughput:1000.0"); time.sleep(0.7)
    print("step:3 - val/loss:0.5")"""


def running(**changes) -> dict:
    attempt = {"started": STARTED, "from_step": 0, "command": ["python"], "gpus": ["H100"] * 4, **changes.pop("attempt", {})}
    return recorded(status="running", steps=100, config=CONFIG, attempts=[attempt], **changes)


def rows(*steps: int, seconds: float = 2, **values: float) -> list[dict]:
    return [{"step": step, "time": BEGAN + seconds * step, **values} for step in steps]


def test_what_is_told_of_ppo_and_how_long_it_takes():
    told = rows(8, 9, 10, **{"critic/score/mean": 0.25, "response_length/mean": 141.4, "perf/throughput": 1500.0,
                             "perf/max_memory_reserved_gb": 61.23})
    told[1]["val-core/openai/gsm8k/reward/mean@1"] = 0.4
    found = progress.fields("ppo", running(attempt={"job_end": str(int(BEGAN) + 3620)}), told, 9, BEGAN + 25)
    # 90 steps of two seconds, of which five seconds are over; two nodes of four GPUs.
    assert found == {"step": "10/100", "s/step": "2", "left": "0:02:55", "job ends in": "0:59:55", "tokens/s": "12,000",
                     "reward": "0.250", "length": "141", "validation": "0.400", "GPU memory": "61.2 GB", "checkpoint": "9"}


def test_a_resumed_training_is_timed_from_its_resume_and_one_that_is_quiet_says_so():
    told = [*rows(1, 2, seconds=-5000, **{"train/loss": 2.0}), *rows(3, 4, **{"train/loss": 1.0})]
    found = progress.fields("sft", running(attempt={"from_step": 2}), told, 0, BEGAN + 100)
    assert (found["s/step"], found["left"], found["no step for"]) == ("2", "0:01:40", "0:01:32")
    assert (found["loss"], found["checkpoint"]) == ("1.000", "none") and "job ends in" not in found


@pytest.mark.parametrize("status", ["finished", "failed", "stopped"])
def test_a_training_that_has_ended_has_no_time_left(status):
    found = progress.fields("sft", {**running(attempt={"job_end": "1"}), "status": status}, rows(1, 2), 2, BEGAN + 999)
    assert {"left", "job ends in", "no step for"} & found.keys() == set() and found["step"] == "2/100"


def test_a_record_of_an_older_version_is_shown_without_a_total():
    before = running()
    del before["steps"]
    assert progress.fields("sft", before, [{"step": 7, "train/loss": 1.0}], 0, BEGAN)["step"] == "7"
    assert progress.fields("ppo", before, [], 0, BEGAN) == {"step": "0", "checkpoint": "none"}


def test_values_that_are_no_numbers_are_shown_as_such():
    told = rows(1, 2, **{"train/loss": float("nan"), "perf/throughput": float("inf")})
    found = progress.fields("sft", running(), told, 0, BEGAN)
    assert (found["loss"], found["tokens/s"]) == ("nan", "inf")


def test_without_a_terminal_each_step_has_one_line_and_the_flood_is_in_the_log(tmp_path):
    door = subprocess.run([sys.executable, "-c", DOOR, str(tmp_path), textwrap.dedent(FLOOD).replace("0.7", "0")], env=SHELL,
                          capture_output=True, text=True, check=False, timeout=60)
    assert door.returncode == 0, door.stderr
    said, *lines = door.stdout.splitlines()
    assert said == "bridge: the first save takes memory, ***"
    # The validation's own line, if it came a moment after its step's.
    assert [*dict.fromkeys(line.split(",")[0] for line in lines)] == ["sft step 1/3", "sft step 2/3", "sft step 3/3"]
    assert "tokens/s 2,000, loss 3.000, checkpoint none" in lines[0] and "validation loss 0.500" in lines[-1]
    assert "a flood of words" in (tmp_path / "log.txt").read_text()


def terminal(command: list[str], **env: str) -> tuple[int, str]:
    """Exit status, and what a terminal of 100 columns got."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, env={**SHELL, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30", **env},
                               stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:
            # How Linux says that nobody writes to it any more.
            part = b""
        if not part:
            break
        shown += part
    os.close(ours)
    return process.wait(timeout=60), shown.decode()


def test_a_terminal_gets_one_block_that_changes(tmp_path):
    status, shown = terminal([sys.executable, "-c", DOOR, str(tmp_path), textwrap.dedent(FLOOD)])
    words = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert status == 0 and "a flood of words" not in words and "s3cret" not in words
    assert words.count("bridge: the first save takes memory, ***") == 1
    for found in ("sft, run", "2 x CPU rank", "step 1/3", "step 3/3", "tokens/s 2,000", "loss 1.000", "validation loss 0.500",
                  "log.txt"):
        assert found in words, found
    # The cursor goes up to draw over what it has drawn.
    assert "\x1b[1A" in shown


def test_of_the_flood_only_our_own_words_and_what_tells_of_trouble_are_shown(tmp_path):
    program = r"""
print("Jim crosses a bridge: how long does he walk?")
print("\x1b[36m(WorkerDict pid=7, ip=10.0.0.1)\x1b[0m bridge: too little memory is free")
print("n1:7:7 [0] NCCL WARN socketStartConnect failed"); print("n1:7:7 [0] NCCL WARN socketStartConnect failed")"""
    door = subprocess.run([sys.executable, "-c", DOOR, str(tmp_path), program], env=SHELL, capture_output=True, text=True,
                          check=False, timeout=60)
    assert door.stdout == "bridge: too little memory is free\nn1:7:7 [0] NCCL WARN socketStartConnect failed\n"


def test_a_display_that_fails_is_said_and_ends_no_training(tmp_path):
    broken = DOOR.replace("kept.before + kept.rows", "1 / 0")
    assert broken != DOOR
    door = subprocess.run([sys.executable, "-c", broken, str(tmp_path), "print('step:1 - train/loss:2.0')"], env=SHELL,
                          capture_output=True, text=True, check=False, timeout=60)
    assert door.returncode == 0, door.stderr
    assert door.stderr.count("the training goes on, but is shown no more: ZeroDivisionError") == 1
    assert "step:1" in (tmp_path / "log.txt").read_text()


def test_a_dumb_terminal_gets_lines(tmp_path):
    _, shown = terminal([sys.executable, "-c", DOOR, str(tmp_path), "print('step:1 - train/loss:2.0')"], TERM="dumb")
    assert shown.startswith("sft step 1/3, loss 2.000") and "\x1b" not in shown


def test_a_training_goes_on_when_nobody_reads_any_more(tmp_path):
    door = subprocess.Popen([sys.executable, "-c", DOOR, str(tmp_path), textwrap.dedent(FLOOD)], env=SHELL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    door.stdout.readline()
    door.stdout.close()
    assert door.wait(timeout=60) == 0, door.stderr.read()
    assert "step:3 - val/loss" in (tmp_path / "log.txt").read_text()
    door.stderr.close()


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run whose SFT goes on, and whose record and metrics are all that there is."""
    folder = tmp_path / "runs" / "mine" / "sft"
    (folder / "checkpoints" / "global_step_2").mkdir(parents=True)
    (folder / "checkpoints" / "global_step_2" / "checksums.json").write_text("{}")
    (folder / "checkpoints" / "global_step_3").mkdir()
    record.write_json(folder / "run.json", running(), [])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(1, 2, **{"train/loss": 2.5})))
    return tmp_path


def test_follow_shows_a_run_from_its_files_until_it_has_ended(run_folder):
    folder = run_folder / "runs" / "mine" / "sft"
    follower = subprocess.Popen([sys.executable, "-m", "bridge", "follow"],
                                env={**SHELL, "WORK_DIR": str(run_folder), "RUN": "mine"}, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True)
    first = follower.stdout.readline()
    assert first.startswith("sft step 2/100, s/step 2, ") and "loss 2.500, checkpoint 2" in first
    write_whole(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows(1, 2, 3, 4, **{"train/loss": 1.5})))
    assert [follower.stdout.readline().split(",")[0] for _ in "34"] == ["sft step 3/100", "sft step 4/100"]
    record.write_json(folder / "run.json", {**running(), "status": "failed"}, [])
    said = follower.communicate(timeout=60)[1]
    assert follower.returncode == 0 and f"sft of run 'mine': failed; the log is {folder / 'log.txt'}" in said


def test_follow_says_that_there_is_no_step_yet(run_folder):
    (run_folder / "runs" / "mine" / "sft" / "metrics.jsonl").unlink()
    record.write_json(run_folder / "runs" / "mine" / "sft" / "run.json", {**running(), "status": "failed"}, [])
    result = subprocess.run([sys.executable, "-m", "bridge", "follow"], env={**SHELL, "WORK_DIR": str(run_folder), "RUN": "mine"},
                            capture_output=True, text=True, check=False, timeout=60)
    assert "sft of run 'mine' is failed, and has made no step yet" in result.stderr, result.stderr


def test_follow_ends_when_nobody_reads_any_more(run_folder):
    follower = subprocess.Popen([sys.executable, "-m", "bridge", "follow"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                env={**SHELL, "WORK_DIR": str(run_folder), "RUN": "mine"}, text=True)
    follower.stdout.readline()
    follower.stdout.close()
    write_whole(run_folder / "runs" / "mine" / "sft" / "metrics.jsonl",
                "".join(json.dumps(row) + "\n" for row in rows(1, 2, 3, **{"train/loss": 1.5})))
    assert follower.wait(timeout=60) == 0
    follower.stderr.close()


def test_follow_takes_what_was_begun_last_unless_a_stage_is_named(run_folder):
    later = run_folder / "runs" / "mine" / "ppo"
    later.mkdir()
    attempt = {"started": "2026-11-30T12:30:00+00:00", "from_step": 0, "command": ["python"], "gpus": []}
    record.write_json(later / "run.json", recorded(config=CONFIG, steps=5, attempts=[attempt]), [])
    (later / "metrics.jsonl").write_text(json.dumps({"step": 5, "time": time.time(), "critic/score/mean": 0.5}) + "\n")
    record.write_json(run_folder / "runs" / "mine" / "sft" / "run.json", {**running(), "status": "finished"}, [])
    env = {"WORK_DIR": str(run_folder), "RUN": "mine"}
    assert bridge("follow", **env).stdout == "ppo step 5/5, reward 0.500, checkpoint none\n"
    assert bridge("follow", STAGE="sft", **env).stdout.startswith("sft step 2/100, ")


def test_follow_says_what_it_cannot_follow_and_what_there_is(run_folder):
    env = {"WORK_DIR": str(run_folder)}
    missing = bridge("follow", RUN="other", **env)
    assert missing.returncode == 2 and "run 'other' has no sft and no ppo that has begun" in missing.stderr
    assert "Runs there: mine." in missing.stderr
    assert "STAGE=base: only trainings are followed" in bridge("follow", RUN="mine", STAGE="base", **env).stderr
    assert "follow takes no arguments; got --all" in bridge("follow", "--all", RUN="mine", **env).stderr
