"""A training over two nodes of a real Slurm: who joins, how it ends, what others reach of it, and what is left."""

import json
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from bridge.runs import metrics, record
from bridge.trainers import nodes
from door import SHELL, left_running

# /var/tmp is each node's own.
TINY = {"PROFILE": "tiny", "MODEL": "tiny", "DATA_SOURCE": "builtin", "GPUS": "1", "NODES": "2", "RAY_TMPDIR": "/var/tmp"}
ADDRESSES = {"n1": "10.77.0.11", "n2": "10.77.0.12"}


# How a rank of SFT is started here, and not torchrun, which starts it.
RANK = "-u -m bridge.trainers.on_cpu"


def begin(site, stage: str, overrides: str, **env: str) -> str:
    """A job that trains."""
    for first in ("data", "model"):
        assert site.make(first, **TINY).returncode == 0
    [job] = site.submit(f"STAGE={stage}", f"ARGS={overrides}", **{**TINY, **env}).values()
    return job


def steps(site, stage: str) -> list[int]:
    """The steps that were made."""
    return [row["step"] for row in metrics.read(site.work_dir / "runs" / "default" / stage / "metrics.jsonl")]


def ended_well(site, job: str, stage: str, last: int) -> Path:
    """The folder of a stage that is finished, and of which nothing is left on either node."""
    assert site.cluster.wait(job, "COMPLETED", "FAILED", seconds=600)["JobState"] == "COMPLETED", site.log(f"{job}.0.log")
    folder = site.work_dir / "runs" / "default" / stage
    assert steps(site, stage) == list(range(1, last + 1)) and record.read(folder)["status"] == "finished"
    assert record.read(folder)["config"]["trainer"]["nnodes"] == 2
    nothing_left(site)
    return folder


def nothing_left(site) -> None:
    """No process of the training, no folder of Ray's, no key."""
    site.cluster.wait_for(lambda: left_running(site.work_dir) == [], "nothing runs")
    for node in ADDRESSES:
        assert site.cluster.on(node, "ls", "/var/tmp").stdout == ""
    assert list((site.work_dir / "jobs").glob("*.nodes")) == []


def running() -> Iterator[tuple[psutil.Process, str, dict[str, str]]]:
    """Every process with its command line and its environment; of one that is about to end the system says nothing."""
    for found in psutil.process_iter(["cmdline", "environ"]):
        yield found, " ".join(found.info["cmdline"] or ()), found.info["environ"] or {}


def process(site, words: str, node: str) -> psutil.Process:
    """A process of the training on a node."""
    return next(found for found, command, env in running()
                if words in command and str(site.work_dir) in env.values() and env.get("SLURMD_NODENAME") == node)


def agents(temporary: str) -> dict[str, str]:
    """Address -> port of Ray's agents for runtime environments whose folder this is."""
    found = {}
    for _, command, _ in running():
        told = dict(re.findall(r"--(node-ip-address|runtime-env-agent-port)=(\S+)", command))
        if "runtime_env/agent/main.py" in command and temporary in command and len(told) == 2:
            found[told["node-ip-address"]] = told["runtime-env-agent-port"]
    return found


def test_sft_over_two_nodes(site):
    job = begin(site, "sft", "trainer.total_training_steps=4 trainer.save_freq=2")
    folder = ended_well(site, job, "sft", 4)
    # A shard of each node's rank.
    shards = {file.name for file in (folder / "checkpoints" / "global_step_4").glob("model_*.pt")}
    assert shards == {f"model_world_size_2_rank_{rank}.pt" for rank in (0, 1)}
    assert "node 1 (n2, 10.77.0.12) joins" in site.log(f"{job}.0.log")
    # The next stage takes it as that of one node.
    assert site.make("merge", STAGE="sft", **TINY).returncode == 0


STRANGER = """
import sys
from ray._raylet import GcsClient
print(len(GcsClient(address=sys.argv[1]).get_all_node_info(timeout=10)))
"""


def test_ppo_over_two_nodes_of_which_strangers_get_no_answer(site):
    job = begin(site, "ppo", "trainer.total_training_steps=2")
    meeting = site.work_dir / "jobs" / f"{job}.0.nodes"
    site.cluster.wait_for(lambda: (meeting / "listening.json").exists(), "Ray listens")
    # It trains only once all have been asked.
    driver = process(site, "-m bridge.trainers.nodes", "n1")
    driver.suspend()
    try:
        ask_as_strangers(site, meeting)
    finally:
        driver.resume()
    ended_well(site, job, "ppo", 2)


def ask_as_strangers(site, meeting: Path) -> None:
    """Ray answers who has the job's key, and its agents their own nodes."""
    ray = json.loads((meeting / "listening.json").read_text())
    assert ray["address"] == ADDRESSES["n1"] and meeting.stat().st_mode & 0o077 == 0
    with_key = {"RAY_USE_TLS": "1", "RAY_TLS_SERVER_KEY": str(meeting / nodes.KEY),
                **dict.fromkeys(("RAY_TLS_SERVER_CERT", "RAY_TLS_CA_CERT"), str(meeting / nodes.CERTIFICATE))}
    other = site.work_dir.parent / "other"
    other.mkdir()
    nodes.make_key(other, list(ADDRESSES.values()))
    others_key = {name: value.replace(str(meeting), str(other)) for name, value in with_key.items()}
    seen = {}
    for name, env in (("the key", with_key), ("another key", others_key), ("no key", {})):
        result = site.cluster.on("n2", sys.executable, "-c", STRANGER, f"{ray['address']}:{ray['port']}", env={**SHELL, **env})
        seen[name] = result.returncode
    assert seen["the key"] == 0 and seen["another key"] and seen["no key"], seen
    site.cluster.wait_for(lambda: sorted(agents(ray["temporary"])) == sorted(ADDRESSES.values()), "each node has an agent")
    ports = agents(ray["temporary"])
    # These speak no TLS.
    ask = "import sys, urllib.request as r; print(r.urlopen(r.Request(sys.argv[1], data=b''), timeout=10).status)"
    for asking in ADDRESSES:
        for asked, address in ADDRESSES.items():
            url = f"http://{address}:{ports[address]}/get_runtime_envs_info"

            def answered(asking=asking, asked=asked, url=url) -> bool:
                said = site.cluster.on(asking, sys.executable, "-c", ask, url)
                return said.stdout.strip() == "200" if asking == asked else "403: Forbidden" in said.stderr

            # One that has only begun to start does not listen yet.
            site.cluster.wait_for(answered, f"{asked}'s agent answers {asking} as it should", seconds=60)


def test_a_preempted_training_over_two_nodes_saves_and_goes_on(site):
    job = begin(site, "sft", "trainer.save_freq=-1 trainer.total_epochs=200")
    site.cluster.wait_for(lambda: steps(site, "sft"), "the first step is made")
    # All processes of the job's steps get it, those on the other node among them.
    site.cluster.run("scancel", "--signal=TERM", job)
    site.cluster.wait_for(lambda: site.cluster.job(job)["Restarts"] == "1", "put back")
    folder = site.work_dir / "runs" / "default" / "sft"
    saved = record.read(folder)["last_step"]
    assert saved >= 1 and record.read(folder)["attempts"][0]["exit_status"] == 75
    site.cluster.wait_for(lambda: steps(site, "sft")[-1] > saved, "it goes on")
    site.cluster.run("scancel", job)
    site.cluster.wait(job, "CANCELLED")
    assert steps(site, "sft") == list(range(1, len(steps(site, "sft")) + 1))
    assert record.read(folder)["attempts"][1]["from_step"] == saved
    site.cluster.wait_for(lambda: left_running(site.work_dir) == [], "nothing runs")


# Interrupted, Python ends as with an error of its own: first it ends the processes that load its data.
@pytest.mark.parametrize(("node", "words", "number"), [
    ("n2", RANK, signal.SIGKILL), ("n1", RANK, signal.SIGKILL), ("n2", RANK, signal.SIGINT),
    ("n2", "bin/bridge join", signal.SIGKILL)])
def test_a_process_that_dies_or_fails_on_either_node_ends_the_job(site, node, words, number):
    job = begin(site, "sft", "trainer.save_freq=-1 trainer.total_epochs=200")
    site.cluster.wait_for(lambda: steps(site, "sft"), "the first step is made")
    process(site, words, node).send_signal(number)
    assert site.cluster.wait(job, "FAILED")["Restarts"] == "0"
    nothing_left(site)


def test_a_node_that_does_not_see_the_folder_or_has_another_image_ends_the_job(standin):
    standin.make("submit", "STAGE=sft", "GPUS=1", "ARGS=--dry-run")
    image, other, commands = (standin.work_dir.parent / name for name in ("bridge.sif", "other.sif", "bin"))
    image.write_bytes(b"an image")
    other.write_bytes(b"an older one")
    commands.mkdir()
    (commands / "apptainer").write_text("#!/bin/sh\n")
    (commands / "apptainer").chmod(0o755)
    env = {"ENGINE": "apptainer", "IMAGE": str(image), "PATH": f"{commands}:{standin.env['PATH']}", "NODES": "2"}
    jobs = standin.work_dir / "jobs"
    jobs.mkdir(parents=True)
    for mount, words in ((("--bind", other, image), f"n2: IMAGE={image} is another image than on the first node"),
                         (("-t", "tmpfs", "tmpfs", jobs), f"n2 does not see {jobs}/")):
        assert standin.cluster.on("n2", "mount", *map(str, mount)).returncode == 0
        try:
            [job] = standin.submit("STAGE=sft", "GPUS=1", **env).values()
            standin.cluster.wait(job, "FAILED")
        finally:
            standin.cluster.on("n2", "umount", str(mount[-1]))
        assert words in standin.log(f"{job}.0.log") and "another node's part of sft has failed" in standin.log(f"{job}.log")


def test_the_environment_is_checked_on_each_node(standin):
    result = standin.make("check", "NODES=2")
    assert result.returncode == 0, result.stderr
    assert {"0: check on n1 with ", "1: check on n2 with "} <= {line for line in result.stdout.splitlines()}
