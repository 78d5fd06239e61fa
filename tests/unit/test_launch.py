"""Running a child: output, exit status, signals, orphans. Each in a process of its own, as the door has it."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from bridge.runs import failure, hang, metrics
from door import SHELL

# The door's part around the child; the child's program is the argument after the log's folder.
DOOR = """
import sys, os
from pathlib import Path
from bridge.runs import hang, launch
from bridge.runs.metrics import Metrics
folder = Path(sys.argv[1])
kept = Metrics(folder / "metrics.jsonl", 0)
watch = hang.Watch(int(os.environ.get("HANG_SECONDS", 0)), kept, folder / "log.txt")
status = launch.run([sys.executable, "-u", "-c", sys.argv[2]], os.environ, folder / "log.txt", kept, ["s3cret"], watch)
sys.exit(hang.HUNG if watch.hung else status)
"""


def start(folder: Path, program: str, **env: str) -> subprocess.Popen:
    # A shell's background job or nohup hands on that SIGINT and SIGHUP are ignored; a person's shell does not.
    return subprocess.Popen([sys.executable, "-c", DOOR, str(folder), textwrap.dedent(program)], env={**SHELL, **env},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            preexec_fn=heed_signals)


def heed_signals() -> None:
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def wait_for(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def alive(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_output_is_shown_and_logged_and_metrics_are_kept(tmp_path):
    door = start(tmp_path, """
        import sys
        print("first"); print("second", file=sys.stderr); print("step:1 - loss:2.5"); print("no end of line", end="")""")
    out, _ = door.communicate(timeout=60)
    assert out == "first\nsecond\nstep:1 - loss:2.5\nno end of line"
    assert (tmp_path / "log.txt").read_text() == out
    [row] = metrics.read(tmp_path / "metrics.jsonl")
    assert row == {"step": 1, "time": row["time"], "loss": 2.5}


@pytest.mark.parametrize(("program", "status"), [
    ("import time; print('enough', flush=True); time.sleep(300)", 0), ("raise SystemExit(3)", 3)])
def test_a_child_is_ended_without_complaint_once_there_is_enough_but_its_own_failure_counts(tmp_path, program, status):
    until = DOOR.replace("watch)", "lambda: b'enough' in (folder / 'log.txt').read_bytes())")
    assert until != DOOR
    door = subprocess.run([sys.executable, "-c", until, str(tmp_path), program], env=SHELL, capture_output=True, text=True,
                          check=False, timeout=60)
    assert door.returncode == status, door.stderr


@pytest.mark.parametrize("status", [0, 1, 2, 77])
def test_the_exit_status_is_passed_on(tmp_path, status):
    door = start(tmp_path, f"raise SystemExit({status})")
    door.communicate(timeout=60)
    assert door.returncode == status


def test_a_child_ended_by_a_signal_gives_128_and_its_number(tmp_path):
    door = start(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    door.communicate(timeout=60)
    assert door.returncode == 137


def test_a_secret_in_the_output_is_masked(tmp_path):
    out, _ = start(tmp_path, "print('token s3cret end')").communicate(timeout=60)
    assert out == "token *** end\n"
    assert "s3cret" not in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_the_child_which_may_finish_its_work(tmp_path, number):
    door = start(tmp_path, f"""
        import signal, sys, time
        def end(*_): print("saved"); sys.exit(0)
        signal.signal({int(number)}, end); print("ready"); time.sleep(60)""")
    wait_for(lambda: (tmp_path / "log.txt").exists() and "ready" in (tmp_path / "log.txt").read_text())
    door.send_signal(number)
    out, _ = door.communicate(timeout=30)
    assert "saved" in out
    assert door.returncode == 128 + number


def test_the_run_goes_on_when_nobody_reads_its_output_any_more(tmp_path):
    door = start(tmp_path, "import time\nprint('first')\ntime.sleep(1)\nprint('second')\ntime.sleep(1)\nprint('third')")
    assert door.stdout.readline() == "first\n"
    door.stdout.close()
    assert door.wait(timeout=60) == 0
    assert (tmp_path / "log.txt").read_text() == "first\nsecond\nthird\n"


def test_no_orphan_is_left_not_even_a_daemon_that_ignores_sigterm(tmp_path):
    # As Ray's daemons: in a session of its own, its parent gone, the pipe still open.
    door = start(tmp_path, """
        import os, signal, subprocess, sys
        daemon = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(300)"
        child = subprocess.Popen([sys.executable, "-c", daemon], start_new_session=True, stdout=subprocess.PIPE)
        child.stdout.readline()
        print("daemon", child.pid)""")
    out, _ = door.communicate(timeout=60)
    assert door.returncode == 0
    assert not alive(int(out.split()[1]))


def test_the_child_ends_when_the_door_is_killed(tmp_path):
    door = start(tmp_path, "import os, time; print(os.getpid()); time.sleep(300)")
    wait_for(lambda: (tmp_path / "log.txt").exists() and (tmp_path / "log.txt").read_text().endswith("\n"))
    child = int((tmp_path / "log.txt").read_text())
    os.kill(door.pid, signal.SIGKILL)
    door.communicate(timeout=30)
    wait_for(lambda: not alive(child))


def test_a_child_that_ignores_the_signal_is_killed_by_the_second(tmp_path):
    door = start(tmp_path, """
        import signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN); print("ready"); time.sleep(300)""")
    wait_for(lambda: (tmp_path / "log.txt").exists() and "ready" in (tmp_path / "log.txt").read_text())
    door.terminate()
    time.sleep(0.5)
    assert door.poll() is None
    door.terminate()
    door.communicate(timeout=30)
    assert door.returncode == 128 + signal.SIGTERM


def test_a_log_on_a_full_disk_ends_no_training_and_is_said_once(tmp_path):
    program = DOOR.replace('folder / "log.txt"', 'Path("/dev/full")')
    assert program != DOOR
    door = subprocess.run([sys.executable, "-c", program, str(tmp_path), "print('first'); print('step:1 - loss:2.5')"],
                          env=SHELL, capture_output=True, text=True, check=False, timeout=60)
    assert door.returncode == 0 and door.stdout == "first\nstep:1 - loss:2.5\n"
    assert door.stderr.count("writing to log.txt failed: [Errno 28]") == 1
    assert [row["step"] for row in metrics.read(tmp_path / "metrics.jsonl")] == [1]


@pytest.mark.parametrize(("log", "why"), [
    ("sft_fails.log", "NotImplementedError: sequence_length=88 is larger than self.max_length=8 (sft_dataset.py, line 165)"),
    ("ppo_fails.log", "NotImplementedError: sequence_length=51 is larger than max_length=8 (torch_functional.py, line 377)"),
])
def test_the_reason_of_a_failure_is_the_cause_not_what_carries_it(log, why):
    assert failure.reason(Path(__file__).parent / "captured" / log, 0) == why


def test_the_reason_of_an_earlier_attempt_is_not_taken_and_none_is_made_up(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text('Traceback\n  File "/x/a.py", line 3, in f\nValueError: old\nsecond attempt\nan Error: of no traceback\n')
    assert failure.reason(log, 0) == "ValueError: old (a.py, line 3)"
    assert failure.reason(log, log.read_text().index("second")) is None


def test_a_program_that_makes_no_step_any_more_is_ended_and_says_where_each_process_was(tmp_path):
    # The first process knows the signal, so do its own child and a rank that was stopped; another program would end by it.
    rank = """
import os, signal, time
from bridge.trainers import stoppable
stoppable.write_stacks_when_asked()
os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(1000)"""
    door = start(tmp_path, """
        import os, subprocess, sys, time
        from bridge.trainers import stoppable
        stoppable.write_stacks_when_asked()
        other = subprocess.Popen(["sleep", "1000"])
        def waits_for_a_rank_that_does_not_come():
            while other.poll() is None:
                time.sleep(0.1)
        rank = subprocess.Popen([sys.executable, "-c", os.environ["PROGRAM"]], env={**os.environ, "RANK": "8"})
        os.waitpid(rank.pid, os.WUNTRACED)
        print("step:1 - loss:2.5", flush=True)
        if os.fork() == 0:
            time.sleep(1000)
        waits_for_a_rank_that_does_not_come()
        print("the other program has ended")
        """, HANG_SECONDS="2", RANK="7", PROGRAM=rank, BRIDGE_STAGE_DIR=str(tmp_path))
    out, said = door.communicate(timeout=120)
    assert door.returncode == hang.HUNG
    assert re.search(r"no step for \d+ s: it hangs", said)
    log = (tmp_path / "log.txt").read_text()
    # The rank is told, and its own child, which does the same, only once.
    assert re.search(r"it hangs, .*\nbridge: process \d+, rank 7:\n(.*\n)*.* in waits_for_a_rank_that_does_not_come\n", log)
    assert re.search(r'\nbridge: process \d+, rank 8:\n(.*\n)*  File "<string>"', log)
    assert log.count(", rank ") == log.count("(most recent call first)") == 2 and "the other program" not in log


@pytest.mark.parametrize(("seconds", "steps", "hangs_after"), [
    # Nothing is known at the start, nor what a step takes after the first line.
    (None, [], hang.START), (None, [100], hang.START), (None, [100, 800], 10 * 700),
    (None, [100, 101, 102], hang.LEAST), (None, [100, 300, 310], 10 * 200), (7, [], 7), (7, [100, 300], 7), (0, [1, 2], None)])
def test_a_training_hangs_when_its_step_takes_much_longer_than_the_others(monkeypatch, tmp_path, seconds, steps, hangs_after):
    now = [0.0]
    monkeypatch.setattr(hang.time, "monotonic", lambda: now[0])
    kept = metrics.Metrics(tmp_path / "metrics.jsonl", 0)
    watch = hang.Watch(seconds, kept, tmp_path / "log.txt")
    for number, now[0] in enumerate(steps):
        watch.looked = now[0]
        kept.add(number, {"loss": 1.0})
        assert watch.hanging_for() is None
    last = now[0]
    for now[0], hanging in ((last + (hangs_after or 1e6), False), (last + (hangs_after or 1e6) + 1, hangs_after is not None)):
        watch.looked = now[0]
        assert (watch.hanging_for() is not None) == hanging


def test_a_suspended_job_does_not_hang(monkeypatch, tmp_path):
    now = [0.0]
    monkeypatch.setattr(hang.time, "monotonic", lambda: now[0])
    kept = metrics.Metrics(tmp_path / "metrics.jsonl", 0)
    watch = hang.Watch(100, kept, tmp_path / "log.txt")
    # Nobody looked for an hour: this process was stopped, too.
    now[0] += 3600
    assert watch.hanging_for() is None
    now[0] = watch.looked = now[0] + 101
    assert watch.hanging_for() == 101
    kept.add(1, {"loss": 1.0})
    assert watch.hanging_for() is None
    now[0] = watch.looked = now[0] + 100
    assert watch.hanging_for() is None


def test_the_end_of_a_log_is_this_attempts_and_stops_where_torchrun_begins(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("of the attempt before\n")
    start = log.stat().st_size
    assert failure.last_lines(log, 20, start) == [""]
    with log.open("a") as more:
        more.write("one\ntwo\nWatchdog caught collective operation timeout\nE1130 failed (exitcode: -6) local_rank: 1\n"
                   "Traceback\n")
    assert failure.last_lines(log, 3, start) == ["two", "Watchdog caught collective operation timeout",
                                                 "E1130 failed (exitcode: -6) local_rank: 1"]
    assert failure.last_lines(tmp_path / "none", 3) == [""]
