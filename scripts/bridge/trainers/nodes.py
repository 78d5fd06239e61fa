"""Run a trainer over several nodes:  python -m bridge.trainers.nodes MODULE ARGUMENTS...   (over one: trainers.loopback)
The door starts it on the first node, `bridge join` on the others; they meet in a folder that scripts/host/job.sh makes. SFT is
torchrun's static rendezvous. PPO is Ray's cluster, encrypted; torch's store, gloo and NCCL are not (docs/security.md).
"""

import json
import os
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from bridge import hardware
from bridge.errors import UsageError, exit_status, read_json, write_whole
from bridge.trainers import loopback

# Seconds until all nodes are there, and then until Ray has them all.
JOINING = 600
# Seconds in which Ray brings the driver what a worker has printed: it looks ten times a second, and a busy machine is slower.
LAST_WORDS = 2
KEY, CERTIFICATE = "ray.key", "ray.crt"


def folder() -> Path:
    """Where the nodes of this job meet."""
    return Path(os.environ["BRIDGE_NODES_DIR"])


def listening() -> Path:
    """What the first node says there as long as it trains: {"address", "port", "temporary"}."""
    return folder() / "listening.json"


def is_there(file: Path, otherwise: bool) -> bool:
    """Whether a file is there; `otherwise` where that cannot be seen now. By opening it, which NFS answers from no cache."""
    try:
        open(file).close()
    except FileNotFoundError:
        return False
    except OSError:
        return otherwise
    return True


def wait_for_all(hosts: Callable[[], list[str]]) -> None:
    """Wait until there are as many hosts as nodes; a UsageError where there are not."""
    deadline, count = time.monotonic() + JOINING, int(os.environ["NODES"])
    while len(seen := hosts()) < count:
        if time.monotonic() > deadline:
            raise UsageError(f"{len(seen)} of {count} nodes are there after {JOINING} s: {', '.join(seen)}. The job has "
                             f"{os.environ.get('SLURM_JOB_NODELIST')}. What each node said stands in the job's log.")
        time.sleep(0.2)


def other_nodes() -> list[dict[str, str]]:
    """What the other nodes have left of themselves: {"host", "address", "first"}, the last being the first node's address."""
    files = [folder() / f"{number}.json" for number in range(1, int(os.environ["NODES"]))]

    def there() -> list[dict[str, str]]:
        return [read_json(file) for file in files if is_there(file, False)]

    wait_for_all(lambda: [socket.gethostname(), *(node["host"] for node in there())])
    return there()


def listen_at(address: str) -> None:
    """Let this process and those that it starts be found at this address of the node; the user's network cards win."""
    cards = {name: [found.address for found in addresses] for name, addresses in psutil.net_if_addrs().items()}
    card = next((name for name, addresses in cards.items() if address in addresses), None)
    if card is None:
        raise UsageError(f"{socket.gethostname()}: no network card has the address {address} that Slurm gives it: {cards}.")
    os.environ["BRIDGE_NODE_ADDRESS"] = address
    os.environ.setdefault("GLOO_SOCKET_IFNAME", card)
    # For NCCL a name is the beginning of one.
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={card}")


def close_ray() -> None:
    """Let all of Ray that is started here speak with those only who have the key of this run, over this node's address."""
    os.environ.update(RAY_USE_TLS="1", RAY_TLS_SERVER_KEY=str(folder() / KEY), RAY_TLS_SERVER_CERT=str(folder() / CERTIFICATE),
                      RAY_TLS_CA_CERT=str(folder() / CERTIFICATE),
                      RAY_RUNTIME_ENV_PLUGINS=json.dumps([{"class": "bridge.trainers.ray_agent.OwnNodeOnly"}]))
    loopback.close()
    loopback.close_ray()


def make_key(place: Path, addresses: list[str]) -> None:
    """A key for all nodes, and a certificate that names each: Ray looks whether it does."""
    names = ",".join(f"IP:{address},DNS:{address}" for address in ["127.0.0.1", *addresses])
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days",
                    "90", "-subj", "/CN=bridge", "-addext", f"subjectAltName={names},DNS:localhost", "-keyout", place / KEY,
                    "-out", place / CERTIFICATE], check=True, capture_output=True)


def torchrun(number: int, address: str, port: int) -> None:
    """Become torchrun on this node."""
    sys.argv[1:1] = [f"--nnodes={os.environ['NODES']}", f"--node_rank={number}", f"--master_addr={address}",
                     f"--master_port={port}", f"--local_addr={loopback.address()}"]
    loopback.close()
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def lead() -> None:
    """The first node: become the trainer."""
    others = other_nodes()
    address = others[0]["first"]
    listen_at(address)

    def say_where(port: int, temporary: str | None = None) -> None:
        write_whole(listening(), json.dumps({"address": address, "port": port, "temporary": temporary}))

    if sys.argv[0] == "torch.distributed.run":
        with socket.create_server((address, 0)) as free:
            port = free.getsockname()[1]
        say_where(port)
        return torchrun(0, address, port)
    make_key(folder(), [address, *(node["address"] for node in others)])
    close_ray()
    import ray

    ray_init = ray.init

    def init(*args, **options):
        started = ray_init(*args, **options)
        say_where(int(started.address_info["gcs_address"].rpartition(":")[2]), os.environ["RAY_TMPDIR"])
        wait_for_all(lambda: [node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]])
        return started

    ray.init = init
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    finally:
        # What the trainer said last, its last step's metrics among it, is still on its way here: at an exit Ray waits for that.
        time.sleep(LAST_WORDS)
        # Before the others end, or it would call that unexpected.
        ray.shutdown()


def follow(number: int) -> None:
    """Another node: become torchrun, or a node of Ray's cluster."""
    first = read_json(listening())
    address = read_json(folder() / f"{number}.json")["address"]
    listen_at(address)
    if sys.argv[0] == "torch.distributed.run":
        return torchrun(number, first["address"], first["port"])
    close_ray()
    gpus, on_cpu = int(os.environ["BRIDGE_NODE_GPUS"]), "BRIDGE_CPU_RANKS" in os.environ
    sys.argv = ["ray", "start", f"--address={first['address']}:{first['port']}", f"--node-ip-address={address}",
                f"--num-gpus={gpus}", *([f"--resources={json.dumps({'cpu': gpus})}"] if on_cpu else []), "--block",
                f"--num-cpus={max(hardware.cpu_count(), gpus + 1)}", "--min-worker-port=0", "--max-worker-port=0"]
    runpy.run_module("ray.scripts.scripts", run_name="__main__", alter_sys=True)


def main() -> None:
    """Become the trainer, or the part of it on this node."""
    sys.argv = sys.argv[1:]
    if number := int(os.environ.get("BRIDGE_NODE", "0")):
        return follow(number)
    try:
        lead()
    finally:
        # The others end now.
        listening().unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(exit_status(main))
