"""The chain on a node without internet: in a network namespace of its own, which has no route and no card but lo."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bridge.runs import metrics, record
from door import SHELL, bridge

pytestmark = pytest.mark.long
# lo is down in a new namespace.
INSIDE = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "_"]


def without_network(*command: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([*INSIDE, sys.executable, "-m", "bridge", *command], env={**SHELL, **env}, capture_output=True,
                          text=True, check=False, timeout=600)


@pytest.fixture(scope="module")
def node(tmp_path_factory) -> dict[str, str]:
    if os.geteuid() or subprocess.run([*INSIDE, "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs root, unshare and ip to make a network without routes")
    # W&B's key is there, as for a run that is sent from elsewhere later; its server is not.
    env = {"WORK_DIR": str(tmp_path_factory.mktemp("work")), "MODEL": "tiny", "PROFILE": "tiny", "GPUS": "2",
           "DATA_SOURCE": "builtin", "WANDB_API_KEY": "a" * 40}
    # On a node with internet, as a login node has it.
    for stage in ("data", "model"):
        assert bridge(stage, **env).returncode == 0
    return env


def test_the_chain_runs_without_internet(node):
    folder = Path(node["WORK_DIR"], "runs", "default")
    for stage, arguments, more in (
            ("sft", ["trainer.total_training_steps=2"], {}), ("merge", [], {}),
            ("ppo", ["trainer.total_training_steps=1"], {"INIT": "sft"}), ("eval", [], {"LIMIT": "4"})):
        result = without_network(stage, *arguments, **node, **more)
        assert result.returncode == 0, result.stderr[-3000:]
        assert "Traceback" not in result.stderr
        if stage in ("sft", "ppo"):
            assert metrics.read(folder / stage / "metrics.jsonl") and record.read(folder / stage)["status"] == "finished"
            assert list((folder / stage).glob("wandb/offline-run-*/*.wandb"))


def test_what_needs_the_internet_says_so_there(node, tmp_path):
    for stage, env in (("model", {"MODEL": "someone/model"}), ("data", {"WORK_DIR": str(tmp_path), "DATA_SOURCE": "hub"})):
        result = without_network(stage, **{**node, **env})
        assert result.returncode == 2 and "Traceback" not in result.stderr
        assert "internet" in result.stdout + result.stderr
