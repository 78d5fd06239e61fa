"""Who listens while a training runs, and where: what docs/security.md says, and nothing else."""

import re
from contextlib import suppress

import psutil

from door import ROOT

# The last words of a command line that name a program; Ray's workers are called after what they do at the moment.
PROGRAMS = {r"\.loopback torch\.distributed\.run": "torchrun", r"\.loopback .*main_ppo": "driver",
            r"^ray::": "Ray worker", r"/gcs_server ": "gcs_server", r"/raylet ": "raylet",
            r"/runtime_env/agent/main\.py": "runtime_env agent", r"/_private/monitor\.py": "monitor",
            r"/dashboard/agent\.py": "metrics agent", r"-m (bridge\.trainers\.(on_cpu|packed)|verl\.)": "torchrun's rank"}


def program(command_line: str) -> str:
    """Which program of docs/security.md this is."""
    return next((name for pattern, name in PROGRAMS.items() if re.search(pattern, command_line)), command_line)


def rows_of_the_page(stage: str, *when: str) -> set[tuple[str, str]]:
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


def listeners_by_stage(rehearsal: psutil.Process) -> dict[str, set[tuple[str, str]]]:
    """The same of each training that a rehearsal has going on now (at most one)."""
    found = {}
    for door in rehearsal.children():
        # One that has just ended has no command line.
        with suppress(psutil.NoSuchProcess):
            stage = door.cmdline()[-1:]
            if stage in (["sft"], ["ppo"]):
                found[stage[0]] = listeners(door)
    return found
