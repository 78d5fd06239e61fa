"""The cluster of this ring (cluster.py), and how its tests use it.   make test ARGS=tests/slurm"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, NotHere

from door import ROOT, SHELL

# What a stage is here: it shows its environment, and goes on until it is asked to stop, told to end, or ended.
STAGE = r"""#!/usr/bin/env bash
[[ " $* " != *" --dry-run "* ]] || { echo "would run $*"; exit "${WOULD_FAIL:-0}"; }
folder=$WORK_DIR/runs/${RUN:-default}/$1
mkdir -p "$folder"
rm -f "$folder/stop-requested"
env -0 > "$folder/environment"
echo "$1 on $(hostname) with ${*:2}"
until [[ -e $WORK_DIR/end-$1 || $1 == check ]]; do
    [[ ! -e $folder/stop-requested ]] || exit 75
    sleep 0.2
done
[[ $1 == check ]] || exit "$(< "$WORK_DIR/end-$1")"
"""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    try:
        made = Cluster(tmp_path_factory.mktemp("slurm"))
    except NotHere as why:
        pytest.skip(str(why))
    yield made
    made.end()


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


@pytest.fixture
def site(cluster, tmp_path) -> Iterator[Site]:
    """This checkout."""
    made = Site(cluster, tmp_path, ROOT)
    yield made
    empty(cluster)


@pytest.fixture
def standin(cluster, tmp_path) -> Iterator[Site]:
    """A copy of what runs on the host, with stages that only wait."""
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "scripts" / "host", checkout / "scripts" / "host")
    for name in ("Makefile", ".env.example"):
        shutil.copy(ROOT / name, checkout)
    (checkout / "scripts" / "host" / "container.sh").write_text(STAGE)
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "bin" / "bridge").touch(0o755)
    made = Site(cluster, tmp_path, checkout)
    yield made
    empty(cluster)


def empty(cluster: Cluster) -> None:
    """No test leaves the next one a job."""
    cluster.run("scancel", "--user=root")
    cluster.wait_for(lambda: not cluster.run("squeue", "-h"), "no job is left")
