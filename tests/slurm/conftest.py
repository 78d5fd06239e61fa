"""The cluster of this ring (cluster.py), and how its tests use it.   make test ARGS=tests/slurm"""

import shutil
from collections.abc import Iterator

import pytest
from cluster import Cluster, NotHere, Site

from door import ROOT

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


@pytest.fixture
def site(cluster, tmp_path) -> Iterator[Site]:
    """This checkout."""
    made = Site(cluster, tmp_path, ROOT)
    yield made
    made.empty()


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
    made.empty()
