"""bridge join STAGE: another node's part in a training over several nodes. scripts/host/node.sh starts it on each.
It leaves its address where the nodes meet (trainers.nodes), waits until the first one listens, and then runs that one's command
with its output in the job's log."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from bridge import hardware
from bridge.environment import clean_environment
from bridge.errors import UsageError, read_json, refuse, say, write_whole
from bridge.runs import launch, record
from bridge.settings import Settings
from bridge.stages import train
from bridge.trainers import nodes

# Seconds in which it may turn out that the first node has ended, too.
GRACE = 10


def run(settings: Settings, env: Mapping[str, str], arguments: list[str]) -> int:
    """Take part till the first node ends; returns 0, or the status of this part if it failed before."""
    if len(arguments) != 1 or arguments[0] not in train.TRAINERS or not env.get("BRIDGE_NODES_DIR"):
        raise UsageError("join is for the jobs of make submit NODES=2, and takes the stage: sft or ppo.")
    # A preemption's signal, which all processes of a job step get, would end what is to be saved. Children inherit both: one
    # is for threads that libraries have begun here, the other for programs that handle the signal themselves.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    host, number = socket.gethostname(), int(env["SLURM_PROCID"]) + 1
    problems: list[str] = []
    gpus, on_cpu = train.choose_hardware(settings, env, [], problems, dry_run=False)
    few = None if on_cpu else hardware.core_problem(hardware.cpu_count(), gpus)
    refuse(f"{host}: {problem}" for problem in problems + train.interface_problems(env))
    # Where srun was started the door is.
    first = env["SLURM_LAUNCH_NODE_IPADDR"]
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
            route.connect((first, 9))
            address = route.getsockname()[0]
    except OSError as error:
        raise UsageError(f"{host}: no way over IPv4 to the first node, whose address Slurm gives as {first} ({error.strerror}). "
                         "Ask the administrator for one, or use NODES=1.") from error
    own_file = nodes.folder() / f"{number}.json"
    write_whole(own_file, json.dumps({"host": host, "address": address, "first": first}))
    while not nodes.is_there(nodes.listening(), False):
        if not nodes.is_there(own_file, True):
            return 0
        time.sleep(0.5)
    recorded = record.read(settings.stage_dir(arguments[0]))
    attempt = recorded["attempts"][-1]
    own = {**clean_environment(settings, env), **attempt["environment"], "BRIDGE_NODE": str(number),
           "BRIDGE_NODE_GPUS": str(gpus)}
    model, same = Path(own["BRIDGE_MODEL_DIR"]), "is not that of the first node. Put it where all nodes see one, or copy it anew."
    refuse([f"{host}: {model} {same}"] * (train.model_fingerprint(model) != recorded["inputs"]["model"])
           + [f"{host}: requirements.lock in its image {same}"] * (record.machine(env)["lock_sha256"] != attempt["lock_sha256"]))
    if not on_cpu:
        own["CUDA_VISIBLE_DEVICES"] = ",".join(gpu.device for gpu in hardware.visible_gpus(env)[:gpus])
    if folder := read_json(nodes.listening())["temporary"]:
        # Ray's folder has one name on all nodes, and is each node's own: nobody else has made it.
        try:
            os.mkdir(folder, mode=0o700)
        except FileExistsError:
            raise UsageError(f"{host}: {folder} is there already: RAY_TMPDIR={Path(folder).parent} is not this node's own. "
                             "Name one on a local disk of each node, or leave it out (/tmp).") from None
        record.keep_ray_folder(folder)
        own["RAY_TMPDIR"] = folder
    say(f"node {number} ({host}, {address}) joins" + (f"; warning: {few}" if few else ""))
    launch.adopt_orphans()
    end_with_this = partial(launch.end_with_parent, signal.SIGKILL)
    child = subprocess.Popen([sys.executable, *attempt["command"][1:]], env=own, stdin=subprocess.DEVNULL, start_new_session=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=end_with_this)
    # Slurm calls this task ended only once nobody holds its output: a rank that outlives it must not.
    subprocess.Popen(["cat"], stdin=child.stdout, start_new_session=True, preexec_fn=end_with_this)
    child.stdout.close()
    status, failed_at = 0, None
    while nodes.is_there(nodes.listening(), True):
        if child.poll():
            failed_at = failed_at or time.monotonic()
            if time.monotonic() > failed_at + GRACE:
                status = child.returncode
                say(f"{arguments[0]} on node {number} ({host}) ended with {status}")
                break
        time.sleep(0.5)
    launch.stop_all(((signal.SIGKILL, GRACE),))
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    return 128 - status if status < 0 else status
