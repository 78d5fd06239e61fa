"""The door as tests use it: run it like a person would, and see what it leaves running."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

from bridge import door
from bridge.errors import exit_status
from bridge.runs import metrics, record
from bridge.trainers import stoppable

ROOT = Path(__file__).resolve().parents[1]
# What a person's shell would have, without any setting of the bridge. On a GPU node, too, the tests train on CPU.
SHELL = {**{name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ},
         # A training that hangs ends, and its log says where, before a test's patience does.
         "CUDA_VISIBLE_DEVICES": "-1", "HANG_SECONDS": "300"}


class Preloaded:
    """Runs Python programs as forks of one that has imported these modules (preloaded.py), which starts with the first."""

    def __init__(self, *modules: str):
        self.modules, self.asked, self.process = modules, None, None

    def end(self) -> None:
        """Let it end, if it was started, and wait for it."""
        if self.asked is not None:
            self.asked.close()
            self.process.wait()
            self.asked = None

    def run(self, *program: str, env: dict[str, str], cwd: Path | None = None,
            timeout: float = 300) -> subprocess.CompletedProcess:
        """What subprocess.run([sys.executable, *program], ...) would return; `program` begins with "-m", "-c" or a file."""
        if self.asked is None:
            self.asked, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            # One thread: neither the pools of BLAS and OpenMP, nor the one with which pyarrow's memory is tidied up.
            env_of_all = {**SHELL, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
                          "JE_ARROW_MALLOC_CONF": "background_thread:false"}
            self.process = subprocess.Popen([sys.executable, Path(__file__).with_name("preloaded.py"), *self.modules],
                                            env=env_of_all, stdin=theirs, stdout=subprocess.DEVNULL)
            theirs.close()
        length = 2 if program[0] in ("-m", "-c") else 1
        with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            message = {"program": program[:length], "arguments": program[length:], "env": env, "cwd": str(cwd or Path.cwd())}
            socket.send_fds(self.asked, [json.dumps(message).encode()], [stdout.fileno(), stderr.fileno()])
            self.asked.settimeout(None)
            child = self.asked.recv(64)
            assert child, f"no Python with {self.modules}: what it said is above"
            self.asked.settimeout(timeout)
            try:
                status = self.asked.recv(64)
            except TimeoutError:
                os.kill(int(child), signal.SIGKILL)
                self.asked.settimeout(None)
                self.asked.recv(64)
                raise
            said = []
            for file in (stdout, stderr):
                file.seek(0)
                said.append(file.read().decode())
        return subprocess.CompletedProcess(program, os.waitstatus_to_exitcode(int(status)), *said)


# What the door imports, and what the trainers do.
DOOR = Preloaded("hydra", "jinja2", "omegaconf", "pandas", "psutil", "pyarrow.parquet", "pynvml", "requests", "unittest.mock",
                 "xxhash", "yaml")
TRAINER = Preloaded("torch", "transformers.models.llama.modeling_llama", "verl.trainer.fsdp_sft_trainer", "vllm",
                    "verl.workers.fsdp_workers", "verl.trainer.main_ppo")


def bridge(*arguments: str, timeout: float = 600, **env: str) -> subprocess.CompletedProcess:
    """Run the door to its end; returns what it printed and its exit status."""
    return DOOR.run("-m", "bridge", *arguments, env={**SHELL, **env}, timeout=timeout)


def asked(*arguments: str, **env: str) -> subprocess.CompletedProcess:
    """What bridge() would return where nothing is started: a dry run, or what is refused. In this process, so that what many
    tests ask for is composed, imported and counted once. A stage that would start is an error."""
    with redirect_stdout(StringIO()) as stdout, redirect_stderr(StringIO()) as stderr, patch.object(
            door, "run_plan", side_effect=AssertionError("it would start")):
        status = exit_status(lambda: door.run([*arguments], {**SHELL, **env}))
    return subprocess.CompletedProcess(arguments, status, stdout.getvalue(), stderr.getvalue())


def recorded(**changes) -> dict:
    """A record of a run, as run.json holds it."""
    return {"status": "finished", "last_step": 0, "config": None, "inputs": None, "work_dir": None,
            "attempts": [{"command": ["python"]}], **changes}


def newest_checkpoint(stage_dir: Path, stage: str):
    """The newest complete checkpoint of a run; None if there is none."""
    return next((found for found in reversed(record.saved_checkpoints(stage_dir, stage)) if found.complete), None)


def stopped_after(step: int, work_dir: Path, stage: str, *arguments: str, timeout: float = 300, **env: str) -> int:
    """Start a stage, end it with SIGTERM once it has gone past `step`, whose checkpoint is whole; returns its status."""
    folder = work_dir / "runs" / env["RUN"] / stage

    def is_past() -> bool:
        saved = [checkpoint.step for checkpoint in record.saved_checkpoints(folder, stage) if checkpoint.complete]
        return step in saved and last_step(folder) >= step

    return ended(work_dir, stage, *arguments, when=is_past, how=lambda door: door.send_signal(signal.SIGTERM),
                 timeout=timeout, **env)


def stopped_on_request(step: int, work_dir: Path, stage: str, *arguments: str, timeout: float = 300, **env: str) -> int:
    """Start a stage, ask it to save and end once it has made `step`; returns its status."""
    folder = work_dir / "runs" / env["RUN"] / stage
    return ended(work_dir, stage, *arguments, when=lambda: last_step(folder) >= step,
                 how=lambda _: (folder / stoppable.REQUEST).touch(), timeout=timeout, **env)


def asked_to_stop(step: int, work_dir: Path, stage: str, *arguments: str, timeout: float = 300, **env: str) -> int:
    """Start a stage and ask it to stop once it has made `step`: it saves, says so and ends with 75. Returns its last step."""
    folder = work_dir / "runs" / env["RUN"] / stage
    assert stopped_on_request(step, work_dir, stage, *arguments, timeout=timeout, **env) == os.EX_TEMPFAIL
    assert left_running(work_dir) == []
    found = record.read(folder)
    assert found["status"] == "stopped" and found["attempts"][-1]["exit_status"] == os.EX_TEMPFAIL
    stopped_at = last_step(folder)
    newest = record.saved_checkpoints(folder, stage)[-1]
    assert (newest.step, newest.complete) == (stopped_at, True)
    said = (work_dir / f"{env['RUN']}.out").read_text()
    assert "was asked to stop" in said and "failed" not in said.splitlines()[-1]
    return stopped_at


def goes_on_to_its_end(steps: int, stopped_at: int, work_dir: Path, stage: str, *arguments: str, **env: str) -> list[dict]:
    """Start a stage that was asked to stop again: it continues from there. Returns its metrics, one row a step."""
    folder = work_dir / "runs" / env["RUN"] / stage
    result = bridge(stage, *arguments, **{"WORK_DIR": str(work_dir), **env})
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"continuing from {folder}/checkpoints/global_step_{stopped_at} " in result.stderr
    # The old request is not taken for a new one.
    assert not (folder / stoppable.REQUEST).exists() and not (folder / stoppable.ANSWER).exists()
    rows = metrics.read(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    found = record.read(folder)
    assert found["status"] == "finished" and found["attempts"][-1]["from_step"] == stopped_at
    return rows


def last_step(folder: Path) -> int:
    """Of the metrics in a stage's folder; 0 before the first."""
    rows = metrics.read(folder / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


def ended(work_dir: Path, stage: str, *arguments: str, when: Callable[[], bool], how: Callable[[subprocess.Popen], object],
          timeout: float, **env: str) -> int:
    """Start a stage and end it so, once it is time; returns its status."""
    said = work_dir / f"{env['RUN']}.out"
    with open(said, "wb") as output:
        started = subprocess.Popen([sys.executable, "-m", "bridge", stage, *arguments], stdout=output, stderr=subprocess.STDOUT,
                                env={**SHELL, "WORK_DIR": str(work_dir), **env})
        deadline = time.monotonic() + timeout
        while not when():
            assert started.poll() is None and time.monotonic() < deadline, said.read_text()[-3000:]
            time.sleep(0.1)
        how(started)
        return started.wait(timeout=120)


def left_running(work_dir: Path) -> list[str]:
    """Command lines of the processes that have this WORK_DIR in their environment."""
    return list(processes(work_dir).values())


def processes(work_dir: Path) -> dict[int, str]:
    """The same by process id, in the order in which they were started: ids begin anew after the system's largest."""
    found, started = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if str(work_dir).encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
                started[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[19])
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            # Ended meanwhile, or another user's.
            continue
    return {number: found[number] for number in sorted(started, key=started.get)}


def run_python(script: str, folder: Path = ROOT, preloaded: Preloaded = TRAINER) -> str:
    """The last line that a script prints in a process of its own: what it changes for good, it changes there.

    With torch, transformers, verl and vLLM imported already, unless it has to be another's imports, and nothing of ours.
    """
    result = preloaded.run("-c", script, env=dict(os.environ), cwd=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()[-1]
