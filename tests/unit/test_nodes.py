"""Several nodes, as far as one process shows: who is waited for, what is refused, what is started where."""

import json
import socket
import subprocess

import pytest
from shards import started

from bridge.errors import UsageError
from bridge.runs import record
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


def joining(env: dict[str, str], first: str = "127.0.0.1", temporary: str | None = None, **changes) -> str:
    """What `bridge join` says, which is refused, where the first node's record has these changes."""
    folder = started(env, "sft").parent
    recorded = record.read(folder)
    recorded["inputs"] |= changes.pop("inputs", {})
    recorded["attempts"][-1] |= changes
    record.write_json(folder / "run.json", recorded, [])
    meeting = folder.parents[2] / "meeting"
    meeting.mkdir()
    (meeting / "listening.json").write_text(json.dumps({"address": first, "port": 1, "temporary": temporary}))
    slurm = {"SLURM_PROCID": "0", "SLURM_LAUNCH_NODE_IPADDR": first}
    result = bridge("join", "sft", **env, **slurm, NODES="2", BRIDGE_NODES_DIR=str(meeting))
    assert result.returncode == 2 and "Traceback" not in result.stderr and "joins" not in result.stderr, result.stderr
    return result.stderr


def test_a_node_with_another_model_or_other_packages_does_not_join(env):
    said = joining(env, inputs={"model": {"config": "0" * 64, "weights": {}}}, lock_sha256="0" * 64)
    host = socket.gethostname()
    assert f"{host}: {env['WORK_DIR']}/models/tiny is not that of the first node" in said
    assert f"{host}: requirements.lock in its image is not that of the first node" in said


def test_a_node_on_which_somebody_has_rays_folder_does_not_join(env, tmp_path):
    (taken := tmp_path / "ray-taken").mkdir()
    said = joining(env, temporary=str(taken))
    assert f"{taken} is there already: RAY_TMPDIR={tmp_path} is not this node's own. Name one on a local disk" in said
    assert taken.is_dir()


def test_a_node_that_has_no_way_to_the_first_one_over_ipv4_does_not_join(env):
    said = joining(env, first="fd00::1")
    assert len(said.splitlines()) == 1 and "no way over IPv4 to the first node, whose address Slurm gives as fd00::1" in said


def test_the_batch_is_shared_by_the_gpus_of_all_nodes_and_a_copy_of_the_model_fits_into_one(tmp_path):
    result = bridge("ppo", "--dry-run", WORK_DIR=str(tmp_path), NODES="3", GPUS="2", TP="4", PROFILE="tutorial",
                    NCCL_SOCKET_IFNAME="lo")
    assert result.returncode == 2
    assert "GPUS=2 NODES=3: data.train_batch_size=256 does not divide by 6 GPUs." in result.stderr
    assert "TP=4 does not divide the 2 GPUs of a node" in result.stderr
    assert "NCCL_SOCKET_IFNAME=lo: over lo no node reaches another" in result.stderr
