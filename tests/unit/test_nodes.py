"""Several nodes, as far as one process shows: who is waited for, what is refused, what is started where."""

import json
import socket
import subprocess

import pytest

from bridge.errors import UsageError
from bridge.stages import ppo, sft
from bridge.trainers import loopback, nodes
from door import bridge


@pytest.fixture
def job(monkeypatch, tmp_path):
    """The folder in which three nodes of a job meet."""
    for name, value in {"BRIDGE_NODES_DIR": str(tmp_path), "NODES": "3", "SLURM_JOB_NODELIST": "gpu[1-3]"}.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def leave(folder, number: int, **said: str) -> dict:
    node = {"host": f"gpu{number + 1}", "address": f"10.0.0.{number + 1}", "first": "10.0.0.1", **said}
    (folder / f"{number}.json").write_text(json.dumps(node))
    return node


def test_the_first_node_waits_for_the_others_and_says_who_came(job, monkeypatch):
    monkeypatch.setattr(nodes, "JOINING", 0.5)
    one = leave(job, 1)
    with pytest.raises(UsageError, match=rf"^2 of 3 nodes are there .*: {socket.gethostname()}, gpu2. .* gpu\[1-3\]"):
        nodes.other_nodes()
    two = leave(job, 2)
    assert nodes.other_nodes() == [one, two]


def test_what_is_found_at_an_address_is_bound_to_its_card_unless_the_user_names_one(monkeypatch):
    for name in ("BRIDGE_NODE_ADDRESS", "GLOO_SOCKET_IFNAME", "VLLM_HOST_IP"):
        # So that it is as before afterwards.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    assert loopback.address() == "127.0.0.1"
    nodes.listen_at("127.0.0.1")
    assert nodes.os.environ["GLOO_SOCKET_IFNAME"] == "lo" and nodes.os.environ["NCCL_SOCKET_IFNAME"] == "ib0"
    monkeypatch.setenv("BRIDGE_NODE_ADDRESS", "10.0.0.7")
    assert loopback.address() == "10.0.0.7"


def test_the_certificate_names_every_node_and_the_key_is_ones_own(tmp_path):
    nodes.make_key(tmp_path, ["10.0.0.1", "10.0.0.2"])
    text = subprocess.run(["openssl", "x509", "-noout", "-text", "-in", tmp_path / nodes.CERTIFICATE], capture_output=True,
                          text=True, check=True).stdout
    for address in ("127.0.0.1", "10.0.0.1", "10.0.0.2"):
        assert f"IP Address:{address}" in text
    assert (tmp_path / nodes.KEY).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(("trainer", "one", "several"), [
    (sft, ["bridge.trainers.loopback", "torch.distributed.run", "--standalone", "--nnodes=1", "--local_addr=127.0.0.1",
           "--nproc_per_node=8", "-m"], ["bridge.trainers.nodes", "torch.distributed.run", "--nproc_per_node=8", "-m"]),
    (ppo, ["bridge.trainers.loopback"], ["bridge.trainers.nodes"])])
def test_several_nodes_go_the_same_way_without_the_parts_of_one(trainer, one, several):
    for count, words in ((1, one), (2, several)):
        assert trainer.command(8, ["a.module"], ["key=value"], count)[3:] == [*words, "a.module", "key=value"]


def test_several_nodes_outside_a_job_and_join_by_hand_are_refused(tmp_path):
    settings = {"WORK_DIR": str(tmp_path / "work"), "NODES": "2", "PROFILE": "tiny", "GPUS": "1"}
    result = bridge("sft", **settings)
    assert result.returncode == 2 and "NODES=2: make submit starts trainings over several nodes" in result.stderr
    result = bridge("join", "sft", **settings)
    assert result.returncode == 2 and "join is for the jobs of make submit" in result.stderr
    assert not (tmp_path / "work").exists()


def test_the_batch_is_shared_by_the_gpus_of_all_nodes_and_a_copy_of_the_model_fits_into_one(tmp_path):
    result = bridge("ppo", "--dry-run", WORK_DIR=str(tmp_path), NODES="3", GPUS="2", TP="4", PROFILE="tutorial",
                    NCCL_SOCKET_IFNAME="lo")
    assert result.returncode == 2
    assert "GPUS=2 NODES=3: data.train_batch_size=256 does not divide by 6 GPUs." in result.stderr
    assert "TP=4 does not divide the 2 GPUs of a node" in result.stderr
    assert "NCCL_SOCKET_IFNAME=lo: over lo no node reaches another" in result.stderr
