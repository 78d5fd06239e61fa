"""A real Slurm on this machine: one controller and two nodes with names and addresses of their own, of Debian's packages.

Everything lives in namespaces of its own (processes, network, host names; on each node a /var/tmp of its own): nothing of it is
seen by other programs, two such clusters do not meet, and all of it is gone when the tests' process ends, however it ends. Needs
root. Each node says that it has 16 cores and 8 GPUs, which are terminals: enough for Slurm to count.
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from debian import NotHere, unpack
from door import SHELL

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
NODES = ("n1", "n2")
CORES, GPUS = 16, 8
# A controller that polls each second, and no wait before a job that was put back begins again (cred_expire).
CONF = """
ClusterName=tests
SlurmctldHost=head(10.77.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
{plugins}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0,bf_interval=1
GresTypes=gpu
KillWait=5
SlurmdTimeout=60
MinJobAge=3600
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
EnforcePartLimits=ALL
NodeName=n1 NodeHostname=n1 NodeAddr=10.77.0.11 CPUs={cores} RealMemory=64000 Gres=gpu:{gpus}
NodeName=n2 NodeHostname=n2 NodeAddr=10.77.0.12 CPUs={cores} RealMemory=64000 Gres=gpu:{gpus}
PartitionName=gpu Nodes=n1,n2 Default=YES MaxTime=1-0 PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n1,n2 MaxTime=1-0 PriorityTier=2
"""
# The first process: all others are below it. The nodes' namespaces hang at a bridge of its own.
START = r"""
set -eu
cd "$FOLDER"
hostname head
ip link set lo up
ip link add cluster type bridge
ip addr add 10.77.0.1/24 dev cluster
ip link set cluster up
setpriv --reuid=nobody --regid=nogroup --clear-groups munged --foreground --key-file=munge/key --socket=munge/socket \
    --pid-file=munge/pid --log-file=munge/log --seed-file=munge/seed > munge.out 2>&1 &
until [ -S munge/socket ]; do kill -0 $!; sleep 0.1; done
./slurmctld -D > slurmctld.out 2>&1 &
number=10
for node in n1 n2; do
    number=$((number + 1))
    unshare --net --uts --mount bash -euc 'hostname "$1"; mount -t tmpfs tmpfs /var/tmp
        until ip link show eth0 > /dev/null 2>&1; do sleep 0.1; done
        ip link set lo up; ip addr add "10.77.0.$2/24" dev eth0; ip link set eth0 up
        # This one stays: the namespaces of a node that is lost go with its last process.
        while :; do
            ./slurmd -D -N "$1" -d "$FOLDER/slurmstepd" || true
            while [ -e "lost-$1" ]; do sleep 0.2; done
        done' _ "$node" "$number" > "$node.out" 2>&1 &
    pid=$!
    # unshare becomes the program that it starts: once that has another network, it is the node's.
    while [ "$(readlink /proc/$pid/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done
    ip link add "$node" type veth peer name eth0 netns "$pid"
    ip link set "$node" master cluster
    ip link set "$node" up
done
wait
"""


class Cluster:
    """The daemons, and Slurm's commands as a person on the login node has them: `bin` belongs on PATH."""

    def __init__(self, folder: Path):
        self.folder, self.bin = folder, folder / "bin"
        if os.geteuid():
            raise NotHere("needs root: namespaces, and a Slurm of its own")
        if not shutil.which("apt-get"):
            raise NotHere("no apt-get: Slurm is taken from Debian's packages")
        root = Path("/") if shutil.which("slurmctld") and shutil.which("munged") else unpack(folder, PACKAGES)
        path = f"{root}/usr/bin:{root}/usr/sbin:{os.environ['PATH']}"
        # By their own names, as which Debian would have installed them: they ask what they are called.
        for name in ("slurmctld", "slurmd", "slurmstepd"):
            (folder / name).symlink_to(shutil.which(name, path=path) or shutil.which(f"{name}-wlm", path=path))
        [plugins] = [found.parent for found in root.glob("usr/lib/*/slurm*/auth_munge.so")]
        self.env = {"PATH": path, "LD_LIBRARY_PATH": f"{plugins.parent}:{plugins}", "SLURM_CONF": str(folder / "slurm.conf")}
        (folder / "slurm.conf").write_text(CONF.format(folder=folder, plugins=f"PluginDir={plugins}", cores=CORES, gpus=GPUS))
        (folder / "gres.conf").write_text("Name=gpu File=/dev/tty[0-7]\n")
        for name in ("state", "bin", "munge"):
            (folder / name).mkdir()
        # munged takes a folder that only its own user may write to, and others must reach its socket in it.
        (folder / "munge" / "key").write_bytes(os.urandom(128))
        for its in (folder / "munge", folder / "munge" / "key"):
            shutil.chown(its, "nobody", "nogroup")
        (folder / "munge" / "key").chmod(0o400)
        (folder / "munge").chmod(0o755)
        for above in (folder, *folder.parents):
            if above != Path("/") and not above.stat().st_mode & 0o001:
                above.chmod(above.stat().st_mode | 0o011)
        with open(folder / "start.out", "wb") as said:
            self.first = subprocess.Popen(
                ["setpriv", "--pdeathsig=KILL", "unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--net", "--uts",
                 "bash", "-c", START], env={**os.environ, **self.env, "FOLDER": str(folder)}, stdin=subprocess.DEVNULL,
                stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            self.wait_for(lambda: (folder / "munge" / "socket").exists(), "munged answers")
            [self.inside] = [inside] = Path(f"/proc/{self.first.pid}/task/{self.first.pid}/children").read_text().split()
            for name in ("sbatch", "srun", "scancel", "squeue", "sinfo", "scontrol", "salloc"):
                # On a node a command is called from where it is.
                (self.bin / name).write_text(
                    "#!/bin/sh\n" + "".join(f"export {key}='{value}'\n" for key, value in self.env.items() if key != "PATH")
                    + f'[ -n "$SLURM_JOB_ID" ] || enter="nsenter --net=/proc/{inside}/ns/net --uts=/proc/{inside}/ns/uts"\n'
                    + f'exec $enter {shutil.which(name, path=path)} "$@"\n')
                (self.bin / name).chmod(0o755)
            self.wait_for(lambda: self.run("sinfo", "-h", "-p", "gpu", "-t", "idle", "-o", "%D") == str(len(NODES)),
                          "the nodes are idle")
        except BaseException:
            self.end()
            raise

    def run(self, *command: str) -> str:
        """What one of Slurm's commands prints."""
        return subprocess.run([str(self.bin / command[0]), *command[1:]], capture_output=True, text=True,
                              check=False, timeout=60).stdout.strip()

    def daemon(self, node: str) -> psutil.Process:
        """A node's slurmd."""
        # Not of one that is about to end: of those the system says nothing.
        [daemon] = [process for process in psutil.Process(self.first.pid).children(recursive=True)
                    if process.name() == "slurmd" and process.cmdline()[:4] == ["./slurmd", "-D", "-N", node]]
        return daemon

    def link(self, node: str, state: str) -> None:
        """Plug a node's cable in (up) or out (down)."""
        subprocess.run(["nsenter", f"--net=/proc/{self.inside}/ns/net", "ip", "link", "set", node, state], check=True, timeout=60)

    def lose(self, node: str) -> None:
        """Let a node be without current: nobody hears of it any more, and all of its processes end at once."""
        network = os.readlink(f"/proc/{self.daemon(node).pid}/ns/net")
        (self.folder / f"lost-{node}").touch()
        self.link(node, "down")
        # But its first one, which START needs.
        for process in psutil.process_iter():
            with suppress(OSError, psutil.Error):
                if os.readlink(f"/proc/{process.pid}/ns/net") == network and "lost-$1" not in " ".join(process.cmdline()):
                    process.kill()

    def bring_back(self, node: str) -> None:
        """Let a node that was lost start again."""
        self.link(node, "up")
        (self.folder / f"lost-{node}").unlink()
        # A job that was put back may be on it at once.
        up = ("idle", "mixed", "allocated")
        self.wait_for(lambda: self.run("sinfo", "-h", "-n", node, "-p", "gpu", "-o", "%T") in up, f"{node} is back")

    def on(self, node: str, *command: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess:
        """Run a command on a node, as another program of it: with its network, folders and processes."""
        return subprocess.run(["nsenter", f"--target={self.daemon(node).pid}", "--net", "--uts", "--mount", "--pid", *command],
                              capture_output=True, text=True, check=False, timeout=60, env=env)

    def wait_for(self, condition: Callable[[], object], what: str, seconds: float = 300) -> None:
        """Returns once the condition holds; fails with what the daemons said where it does not."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.first.poll() is None and time.monotonic() < deadline, f"not seen: {what}\n{self.said()}"
            time.sleep(0.2)

    def said(self) -> str:
        """The ends of the daemons' logs."""
        logs = [*self.folder.glob("*.out"), *self.folder.glob("*.log"), *self.folder.glob("munge/log")]
        return "\n".join(f"== {log.name}\n{log.read_text()[-1500:]}" for log in logs)

    def job(self, job: str) -> dict[str, str]:
        """What Slurm says of a job: JobState, Restarts, Dependency, ..."""
        words = self.run("scontrol", "show", "job", "-dd", "-o", job).split(" ")
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, *states: str, seconds: float = 300) -> dict[str, str]:
        """Wait until a job is in one of the states; returns what Slurm says of it then."""
        self.wait_for(lambda: self.job(job).get("JobState") in states, f"job {job} is {' or '.join(states)}", seconds)
        return self.job(job)

    def end(self) -> None:
        """End the first process, and with it all others."""
        self.first.kill()
        self.first.wait()


class Site:
    """A checkout and a folder of results on the cluster, and make as a person there calls it."""

    def __init__(self, cluster: Cluster, folder: Path, checkout: Path):
        self.cluster, self.checkout, self.work_dir, self.env_file = cluster, checkout, folder / "work", folder / "settings.env"
        self.env_file.touch(0o600)
        self.env = {**SHELL, "PATH": f"{cluster.bin}:{os.environ['PATH']}", "WORK_DIR": str(self.work_dir),
                    "ENV_FILE": str(self.env_file), "ENGINE": "none"}

    def make(self, *arguments: str, timeout: float = 300, **env: str) -> subprocess.CompletedProcess:
        """make with these arguments, in the checkout."""
        return subprocess.run(["make", "--no-print-directory", *arguments], cwd=self.checkout, env={**self.env, **env},
                              capture_output=True, text=True, check=False, timeout=timeout)

    def submit(self, *arguments: str, **env: str) -> dict[str, str]:
        """make submit, which must not be refused; returns the job of each stage."""
        result = self.make("submit", *arguments, **env)
        assert result.returncode == 0, result.stderr
        return dict(re.findall(r"^bridge: (\S+) is job (\d+)\.", result.stdout, re.MULTILINE))

    def log(self, name: str) -> str:
        """A file of the jobs' logs."""
        return (self.work_dir / "jobs" / name).read_text()

    def empty(self) -> None:
        """No test leaves the next one a job."""
        self.cluster.run("scancel", "--user=root")
        self.cluster.wait_for(lambda: not self.cluster.run("squeue", "-h"), "no job is left")
