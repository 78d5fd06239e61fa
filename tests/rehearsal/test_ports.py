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
PROGRAMS = {r"-m bridge\.loopback torch\.distributed\.run": "torchrun", r"-m bridge\.loopback .*main_ppo": "driver",
            r"^ray::": "Ray worker", r"/gcs_server ": "gcs_server", r"/raylet ": "raylet",
            r"/runtime_env/agent/main\.py": "runtime_env agent", r"/_private/monitor\.py": "monitor",
            r"/dashboard/agent\.py": "metrics agent", r"-m (bridge\.on_cpu|verl\.|bridge\.packed)": "torchrun's rank"}


def program(command_line: str) -> str:
    """Which program of docs/security.md this is."""
    return next((name for pattern, name in PROGRAMS.items() if re.search(pattern, command_line)), command_line)


def table() -> dict[str, dict[tuple[str, str], str]]:
    """docs/security.md's rows by stage: {(program, address): when it is seen}."""
    rows = {}
    for line in (ROOT / "docs" / "security.md").read_text().splitlines():
        cells = [cell.strip().strip("`") for cell in line.split("|")[1:-1]]
        if len(cells) == 6 and cells[0] in ("sft", "ppo"):
            rows.setdefault(cells[0], {})[cells[1], cells[2]] = cells[3]
    return rows


def listeners(parent: psutil.Process) -> set[tuple[str, str]]:
    """(program, address) of every TCP socket that a descendant listens on now."""
    processes = {child.pid: child for child in parent.children(recursive=True)}
    found = set()
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.pid in processes:
            try:
                name = program(" ".join(processes[connection.pid].cmdline()))
            except psutil.NoSuchProcess:
                continue
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
    wanted = {row for row, when in table()[stage].items() if when == "always"}
    assert seen == wanted
    assert {address for _, address in seen} == {"127.0.0.1"}
