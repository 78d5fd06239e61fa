"""Ends of real trainings on the cluster of this ring, each at a random moment (docs/cluster.md). Needs root.

    PYTHONPATH=scripts:tests .venv/bin/python tests/slurm/kills.py FOLDER [NUMBER...]     (FOLDER: new, short; minutes a row)
"""

import random
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
from cluster import Cluster
from test_nodes import ADDRESSES, RANK, TINY, process
from test_slurm import ask_by_preemption, ask_by_signal

from bridge.runs import metrics, record
from conftest import Site
from door import ROOT, SHELL, left_running

# Steps of a run. SFT takes longer where the time limit has to come: Slurm looks at it twice a minute only.
LAST, LAST_AT_TIME_LIMIT = {"sft": 60, "ppo": 4}, 200
ARGS = {"sft": "trainer.total_epochs=400 trainer.save_freq=10", "ppo": "trainer.save_freq=1 data.max_response_length=32"}
# The moment: once a number of steps below the first is made (none: while it starts), up to so many seconds later.
MOMENTS = {"sft": (46, 3, 25), "ppo": (3, 8, 40)}
# What is killed: its command line has these words.
VICTIMS = {"rank of sft": RANK, "rank of ppo": "ray::WorkerDict", "door": "bin/bridge ", "`bridge join`": "bin/bridge join",
           "raylet": "raylet/raylet --", "`gcs_server`": "gcs/gcs_server --"}
ASK = {"SIGTERM by scancel": ask_by_signal, "preemption": ask_by_preemption,
       "time limit": lambda site, job: site.cluster.run("scontrol", "update", f"jobid={job}", "timelimit=2"),
       "scancel": lambda site, job: site.cluster.run("scancel", job)}
# Stage, nodes, what is done or killed, and on which node.
ROWS = [("sft", 2, "rank of sft", "n1"), ("sft", 2, "rank of sft", "n2"), ("sft", 2, "door", "n1"),
        ("sft", 2, "`bridge join`", "n2"), ("sft", 2, "SIGTERM by scancel"), ("sft", 2, "preemption"), ("sft", 2, "scancel"),
        ("sft", 2, "time limit"), ("sft", 1, "rank of sft", "n1"), ("sft", 1, "door", "n1"), ("sft", 1, "preemption"),
        ("sft", 1, "scancel"), ("ppo", 2, "rank of ppo", "n2"), ("ppo", 2, "raylet", "n2"), ("ppo", 2, "`gcs_server`", "n1"),
        ("ppo", 2, "`bridge join`", "n2"), ("ppo", 2, "door", "n1"), ("ppo", 2, "preemption"),
        ("ppo", 2, "another user's Ray", "n1"), ("ppo", 1, "door", "n1"), ("sft", 2, "node lost", "n2"),
        ("ppo", 2, "node lost", "n2")]
OTHERS_RAY = """
import os, sys, time, ray
ray.init(address="local", num_cpus=1, include_dashboard=False, _temp_dir="/var/tmp/other", _node_ip_address=sys.argv[1])
answer = ray.remote(lambda: len(ray.nodes()))
while not os.path.exists("/var/tmp/other-end"):
    assert ray.get(answer.remote(), timeout=60) == 1 and not time.sleep(1)
print("undisturbed")
"""
OTHERS_END = "cd /var/tmp; touch other-end; until [ -e other-ended ]; do sleep 1; done; tail -n 1 other-said; rm -rf other*"


def left(site: Site) -> list[str]:
    """What is left of a training after half a minute: processes, folders of Ray's, the folder with the key."""
    deadline, found = time.monotonic() + 30, [""]
    while found and time.monotonic() < deadline:
        # One may end while it is looked at.
        with suppress(psutil.Error):
            found = [*left_running(site.work_dir), *map(str, (site.work_dir / "jobs").glob("*.nodes")),
                     *(name for node in ADDRESSES for name in site.cluster.on(node, "ls", "/var/tmp").stdout.split())]
    return found


def do(site: Site, job: str, what: str, node: str = "") -> None:
    """Do to a job what the row says. What is to be killed and is not there yet is waited for."""
    def killed() -> bool | None:
        with suppress(StopIteration, psutil.Error):
            return process(site, VICTIMS[what], node).kill() is None

    if what in ASK:
        ASK[what](site, job)
    elif what in VICTIMS:
        site.cluster.wait_for(killed, f"{what} is killed", 100)
    elif what == "node lost":
        site.cluster.lose(node)
    else:
        # Python may lie in a home that is closed to others.
        other = ("setpriv --reuid=65534 --regid=65534 --clear-groups --inh-caps=+dac_read_search --ambient-caps=+dac_read_search "
                 f'{sys.executable} -c "$0" {ADDRESSES[node]}')
        site.cluster.on(node, "sh", "-c", f"({other}; touch /var/tmp/other-ended) > /var/tmp/other-said 2>&1 &", OTHERS_RAY,
                        env={**SHELL, "HOME": "/var/tmp"})


def row(site: Site, number: int) -> str:
    """Run a row; returns its line of the table."""
    (stage, nodes, what, *node), cluster, of_other = ROWS[number - 1], site.cluster, ""
    folder = site.work_dir / "runs" / f"row{number}" / stage
    steps = LAST_AT_TIME_LIMIT if what == "time limit" else LAST[stage]
    env = {**TINY, "RUN": f"row{number}", "NODES": str(nodes), "GPUS": "2" if (stage, nodes) == ("sft", 1) else "1",
           "SBATCH_SIGNAL": "B:USR1@90", **({"SBATCH_NODELIST": "n1"} if nodes == 1 else {})}

    def made() -> list[int]:
        return [line["step"] for line in metrics.read(folder / "metrics.jsonl")]

    def submit() -> str:
        return site.submit(f"STAGE={stage}", f"ARGS={ARGS[stage]} trainer.total_training_steps={steps}", **env)[stage]

    job, chance, (most, soon, starting) = submit(), random.Random(f"20 {number}"), MOMENTS[stage]
    after = chance.randrange(most)
    cluster.wait_for(lambda: len(made()) >= after, f"{after} steps are made")
    time.sleep(chance.uniform(0, soon if after else starting))
    do(site, job, what, *node)
    event, before = time.monotonic(), len(made())
    cluster.wait_for(lambda: (now := cluster.job(job))["JobState"] not in ("PENDING", "RUNNING", "COMPLETING")
                     or now["Restarts"] != "0", "the job has ended", 600)
    seconds, state, last, rest = time.monotonic() - event, cluster.job(job), len(made()), []
    end = state["JobState"] if state["Restarts"] == "0" else "put back"
    if what == "node lost":
        cluster.bring_back(*node)
    cluster.run("scontrol", "update", f"jobid={job}", "timelimit=60")
    if end not in ("put back", "COMPLETED"):
        rest, job = left(site), submit()
    finished = cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", seconds=600)["JobState"] == "COMPLETED"
    if what == "another user's Ray":
        of_other = f" ({cluster.on(*node, 'sh', '-c', OTHERS_END).stdout.strip()})"
    begun = steps if last == steps else record.read(folder)["attempts"][-1]["from_step"] or 0
    whole = "yes" if finished and made() == [*range(1, steps + 1)] else "NO"
    return (f"| {number} | {stage}, {nodes} | {'SIGKILL: ' * (what in VICTIMS)}{what}{' on '.join(['', *node])}{of_other} | "
            f"{before or 'start'} | {end} {seconds:.0f} s | {begun} | {max(last, before) - begun} | {whole} | "
            f"{'; '.join(rest + left(site)) or 'nothing'} |")


if __name__ == "__main__":
    (place := Path(sys.argv[1]) / "site").mkdir(parents=True)
    here = Site(Cluster(place.parent), place, ROOT)
    here.make("data", "model", **TINY).check_returncode()
    for chosen in map(int, sys.argv[2:] or range(1, len(ROWS) + 1)):
        print(row(here, chosen), flush=True)
    here.cluster.end()
