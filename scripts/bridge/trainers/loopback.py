"""Run a trainer that listens on the loopback address only:  python -m bridge.trainers.loopback verl.trainer.main_ppo OVERRIDES...
Ray does the work of whoever reaches its ports, as the trainer's owner; torch's store, gloo and NCCL would use the network.
verl 0.5.0 has no settings for this (docs/security.md). Ray's dashboard is left out. With trainers.nodes: the node's address.
"""

import os
import runpy
import socket
import sys

from bridge.trainers import stoppable


def address() -> str:
    """Where this process is found."""
    return os.environ.get("BRIDGE_NODE_ADDRESS", "127.0.0.1")


def close() -> None:
    """Let this process, and those it starts, find each other over this address; what the user has set wins."""
    stoppable.write_stacks_when_asked()
    # It is what is called in every worker.
    seed()
    # For gloo, NCCL and vLLM. Within a node NCCL's ranks only find each other over sockets: data go through NVLink or memory.
    for name, value in {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": address()}.items():
        os.environ.setdefault(name, value)
    close_store()


def seed() -> None:
    """Where SEED= is set, before a model is built: seed what verl does not, the critic's new head and the answers' tokens."""
    if "BRIDGE_SEED" not in os.environ:
        return
    import torch

    # Far apart, so that no rank draws what a rank of the next seed does.
    number = int(os.environ["BRIDGE_SEED"]) << 20
    # Ranks differ, or they would draw alike. FSDP hands rank 0's head to the others.
    torch.manual_seed(number + int(os.environ.get("RANK", "0")))
    plain = torch.cuda.manual_seed
    # verl lets vLLM sample from 1000 and the rank on, whatever rollout.seed is, and calls this for nothing else.
    torch.cuda.manual_seed = lambda own: plain(own + number)


def close_store() -> None:
    """Let torch's TCPStore listen on this address only: it has no setting for that, but takes a socket that listens."""
    from torch.distributed import TCPStore

    init = TCPStore.__init__

    def listen(self, host_name, port, world_size=None, is_master=False, *more, **options) -> None:
        if is_master and "master_listen_fd" not in options:
            listener = socket.create_server((address(), port))
            host_name, port = listener.getsockname()
            # The store closes it. Its newer backend, libuv's, takes no socket.
            options.update(master_listen_fd=listener.detach(), use_libuv=False)
        init(self, host_name, port, world_size, is_master, *more, **options)

    TCPStore.__init__ = listen


def close_ray() -> None:
    """Let Ray, once started here, listen on this address, without its dashboard, and call close() in its workers."""
    import ray
    from ray._private import utils

    ray_init = ray.init
    # on_cpu's calls close(), too.
    hook = "bridge.trainers.on_cpu.setup" if "BRIDGE_CPU_RANKS" in os.environ else "bridge.trainers.loopback.close"

    def init(*args, runtime_env=None, **options):
        runtime_env = {"worker_process_setup_hook": hook, **(runtime_env or {})}
        # "local": not the cluster that a RAY_ADDRESS in the environment names.
        return ray_init(*args, address="local", runtime_env=runtime_env, include_dashboard=False, _node_ip_address=address(),
                        **options)

    ray.init = init
    # Or the dashboard's agent would start whole, with a port for jobs.
    utils.check_dashboard_dependencies_installed = lambda: False


def main() -> None:
    """Become the module (sys.argv[1]) with the rest of the arguments."""
    sys.argv = sys.argv[1:]
    close()
    if sys.argv[0] != "torch.distributed.run":
        close_ray()
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
