"""The door as tests use it: run it like a person would, and see what it leaves running."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from bridge.runs import metrics, record

ROOT = Path(__file__).resolve().parents[1]
# What a person's shell would have, without any setting of the bridge.
SHELL = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}


def bridge(*arguments: str, timeout: float = 600, **env: str) -> subprocess.CompletedProcess:
    """Run the door to its end; returns what it printed and its exit status."""
    return subprocess.run([sys.executable, "-m", "bridge", *arguments], env={**SHELL, **env}, capture_output=True, text=True,
                          check=False, timeout=timeout)


def recorded(**changes) -> dict:
    """A record of a run, as run.json holds it."""
    return {"status": "finished", "last_step": 0, "config": None, "inputs": None, "work_dir": None,
            "attempts": [{"command": ["python"]}], **changes}
def stopped_after(step: int, work_dir: Path, stage: str, *arguments: str, timeout: float = 300, **env: str) -> int:
    """Start a stage, end it with SIGTERM once it has gone past `step`, whose checkpoint is whole; returns its status."""
    folder = work_dir / "runs" / env["RUN"] / stage
    said = work_dir / f"{env['RUN']}.out"
    with open(said, "wb") as output:
        door = subprocess.Popen([sys.executable, "-m", "bridge", stage, *arguments], stdout=output, stderr=subprocess.STDOUT,
                                env={**SHELL, "WORK_DIR": str(work_dir), **env})
        deadline = time.monotonic() + timeout
        while True:
            rows = metrics.read(folder / "metrics.jsonl")
            saved = [checkpoint.step for checkpoint in record.saved_checkpoints(folder, stage) if checkpoint.complete]
            if step in saved and rows and rows[-1]["step"] >= step:
                break
            assert door.poll() is None and time.monotonic() < deadline, said.read_text()[-3000:]
            time.sleep(0.1)
        door.send_signal(signal.SIGTERM)
        return door.wait(timeout=120)


def left_running(work_dir: Path) -> list[str]:
    """Command lines of the processes that have this WORK_DIR in their environment."""
    return list(processes(work_dir).values())


def processes(work_dir: Path) -> dict[int, str]:
    """The same by process id."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if str(work_dir).encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            # Ended meanwhile, or another user's.
            continue
    return found


def run_python(script: str, folder: Path = ROOT) -> str:
    """The last line that a script prints in a process of its own: what it changes for good, it changes there."""
    result = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()[-1]
