"""Who listens while a training runs, and where: what docs/security.md says, and nothing else."""

import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from door import ROOT, SHELL, bridge

# The last words of a command line that name a program; Ray's workers are called after what they do at the moment.
PROGRAMS = {r"\.loopback torch\.distributed\.run": "torchrun", r"\.loopback .*main_ppo": "driver",
            r"^ray::": "Ray worker", r"/gcs_server ": "gcs_server", r"/raylet ": "raylet",
            r"/runtime_env/agent/main\.py": "runtime_env agent", r"/_private/monitor\.py": "monitor",
            r"/dashboard/agent\.py": "metrics agent", r"-m (bridge\.trainers\.(on_cpu|packed)|verl\.)": "torchrun's rank"}

pytestmark = pytest.mark.long


def program(command_line: str) -> str:
    """Which program of docs/security.md this is."""
    return next((name for pattern, name in PROGRAMS.items() if re.search(pattern, command_line)), command_line)


def rows(stage: str, *when: str) -> set[tuple[str, str]]:
    """The rows of docs/security.md about this stage that say this in the column "when": (program, address)."""
    table = [[cell.strip().strip("`") for cell in line.split("|")[1:-1]]
             for line in (ROOT / "docs" / "security.md").read_text().splitlines()]
    return {(cells[1], cells[2]) for cells in table if len(cells) == 6 and cells[0] == stage and cells[3] in when}


def listeners(parent: psutil.Process) -> set[tuple[str, str]]:
    """(program, address) of every TCP socket that a descendant listens on now."""
    processes = {child.pid: child for child in parent.children(recursive=True)}
    found = set()
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.pid in processes:
            try:
                command_line = " ".join(processes[connection.pid].cmdline())
            except psutil.NoSuchProcess:
                continue
            # Of one that is about to end the system says nothing more.
            if not command_line:
                continue
            name = program(command_line)
            # An IPv4 address of a socket that could take both.
            found.add((name, connection.laddr.ip.removeprefix("::ffff:")))
    return found


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ports")
    for stage in ("data", "model"):
        assert bridge(stage, WORK_DIR=str(folder), DATA_SOURCE="builtin", MODEL="tiny").returncode == 0
    return folder


@pytest.mark.parametrize(("stage", "steps"), [("sft", 2), ("ppo", 1)])
def test_what_listens_during_a_training_is_what_the_page_says(work_dir, stage, steps):
    env = {**SHELL, "WORK_DIR": str(work_dir), "MODEL": "tiny", "PROFILE": "tiny", "GPUS": "2"}
    seen = set()
    with open(work_dir / f"{stage}.out", "wb") as output:
        door = subprocess.Popen([sys.executable, "-m", "bridge", stage, f"trainer.total_training_steps={steps}"], env=env,
                                stdout=output, stderr=subprocess.STDOUT)
        while door.poll() is None:
            seen |= listeners(psutil.Process(door.pid))
            time.sleep(0.1)
    assert door.returncode == 0, (work_dir / f"{stage}.out").read_text()[-3000:]
    assert rows(stage, "always") <= seen <= rows(stage, "always", "if free")
    assert {address for _, address in seen} == {"127.0.0.1"}
