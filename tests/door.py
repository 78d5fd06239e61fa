"""The door as tests use it: run it like a person would, and see what it leaves running."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What a person's shell would have, without any setting of the bridge.
SHELL = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}


def bridge(*arguments: str, timeout: float = 600, **env: str) -> subprocess.CompletedProcess:
    """Run the door to its end; returns what it printed and its exit status."""
    return subprocess.run([sys.executable, "-m", "bridge", *arguments], env={**SHELL, **env}, capture_output=True, text=True,
                          check=False, timeout=timeout)


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


def run_python(script: str) -> str:
    """The last line that a script prints in a process of its own: what it changes for good, it changes there."""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()[-1]
