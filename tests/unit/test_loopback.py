"""A trainer that listens on the loopback address only: who reaches Ray's ports runs what he likes as the owner of the trainer."""

import os
import subprocess
import sys

import pytest

TRAINER = """
import sys, psutil, ray
assert __name__ == "__main__"
started = ray.init(num_cpus=1, log_to_driver=False, runtime_env={"env_vars": {"SAID": "works"}})
said = ray.get(ray.remote(lambda: __import__("os").environ["SAID"]).remote())
me = psutil.Process()
pids = {me.pid, *(child.pid for child in me.children(recursive=True))}
# Of all processes at once: psutil passes over those that end meanwhile, as Ray's short-lived ones do.
ports = {connection.laddr for connection in psutil.net_connections()
         if connection.pid in pids and connection.status == psutil.CONN_LISTEN}
addresses = {port.ip.removeprefix("::ffff:") for port in ports}
print(sys.argv[1:], said, repr(started.dashboard_url), addresses, 52365 in {port.port for port in ports})
"""


def test_the_module_runs_with_its_arguments_and_its_ray_listens_on_the_loopback_address_only(tmp_path):
    # The cluster of another is not taken, wherever RAY_ADDRESS says that it is.
    (tmp_path / "trainer.py").write_text(TRAINER)
    result = subprocess.run([sys.executable, "-m", "bridge.trainers.loopback", "trainer", "a=b c"], capture_output=True,
                            text=True, check=False, timeout=120,
                            env={**os.environ, "PYTHONPATH": str(tmp_path), "RAY_ADDRESS": "127.0.0.1:1"})
    # 52365: where the dashboard's agent takes jobs.
    assert result.stdout.strip().endswith("['a=b c'] works '' {'127.0.0.1'} False"), result.stdout + result.stderr


STORES = """
import os, psutil, socket
from bridge.trainers import loopback
loopback.close()
import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousParameters, c10d_rendezvous_backend
elastic = c10d_rendezvous_backend.create_backend(RendezvousParameters("c10d", "localhost:0", "run", 1, 1, local_addr=None))[1]
port = socket.create_server(("", 0)).getsockname()[1]
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1")
dist.init_process_group("gloo")
dist.all_reduce(__import__("torch").ones(1))
other = dist.TCPStore("localhost", elastic.port, is_master=False)
other.set("said", "works")
listening = [connection.laddr for connection in psutil.Process().net_connections("tcp") if connection.status == "LISTEN"]
print(elastic.get("said").decode(), {address.ip for address in listening}, len(listening) >= 3,
      {elastic.port, port} <= {address.port for address in listening}, os.environ["NCCL_SOCKET_IFNAME"])
"""


@pytest.mark.parametrize(("given", "wanted"), [({}, "lo"), ({"NCCL_SOCKET_IFNAME": "enp1"}, "enp1")])
def test_torchs_stores_and_gloo_listen_on_the_loopback_address_only_and_the_users_card_wins(given, wanted):
    # Of torchrun and of a process group without it.
    result = subprocess.run([sys.executable, "-c", STORES], capture_output=True, text=True, check=False, timeout=120,
                            env={**os.environ, **given})
    assert result.stdout.strip() == f"works {{'127.0.0.1'}} True True {wanted}", result.stdout + result.stderr
