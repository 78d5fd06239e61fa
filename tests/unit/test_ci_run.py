""".ci/run with a `make` that only says what it was asked for: which rings run, and what ends the run."""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from door import ROOT, left_running

# The ring named FAILS fails, and waits before that for the one named HANGS to begin, which does not end.
STAND_IN = """#!/usr/bin/env bash
said="${0##*/} $*${HF_TOKEN:+ planted}"
echo "$said"
if [[ -n ${FAILS:-} && $said == *"$FAILS"* ]]; then
    until [[ -z ${HANGS:-} || -e $0.hangs ]]; do sleep 0.05; done
    exit 3
fi
if [[ -n ${HANGS:-} && $said == *"$HANGS"* ]]; then
    touch "$0.hangs"
    sleep 600
fi
"""


@pytest.fixture
def clone(tmp_path) -> Path:
    for name in ("clone/tests/image/compare.py", "bin/make", "bin/docker-registry"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)
    shutil.copytree(ROOT / ".ci", tmp_path / "clone/.ci")
    (tmp_path / "tmp").mkdir()
    return tmp_path / "clone"


def run(clone: Path, **env: str) -> tuple[int, str]:
    """Its exit status and what it said."""
    env = {"PATH": f"{clone.parent}/bin:{os.environ['PATH']}", "SITE_TOOLS": str(clone / "none"),
           "TMPDIR": f"{clone.parent}/tmp", **env}
    found = subprocess.run([clone / ".ci/run"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
                           timeout=60, env=env)
    assert list((clone.parent / "tmp").iterdir()) == []
    return found.returncode, found.stdout


def test_every_ring_runs_once_and_is_named_at_the_end(clone):
    status, said = run(clone)
    assert status == 0
    names = re.findall(r'^ *ring "(.+?)" ', (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert sorted(re.findall(r"^=== (.+)$", said, re.MULTILINE)) == sorted([*names, "rings that ran: "])
    assert sorted(re.findall(r"^    (.+) \(\d+ s\)$", said, re.MULTILINE)) == sorted(names)
    # In the images' builds, and in nothing else.
    assert re.findall(r"^make (\w+) .*planted$", said, re.MULTILINE) == ["image", "oci"]


@pytest.mark.parametrize("ring", ["lint", "-m long", "make image", "make oci", "compare.py", "make rehearse", "tests/image"])
def test_a_ring_that_fails_fails_the_run(clone, ring):
    status, said = run(clone, FAILS=ring)
    assert status != 0 and ring in said and "rings that ran" not in said


def test_what_runs_beside_a_ring_that_fails_is_ended(clone):
    started = clone / "none"
    status, said = run(clone, FAILS="-m long", HANGS="make image")
    assert status != 0 and "tests/eight" not in said
    deadline = time.monotonic() + 30
    while left_running(started) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left_running(started) == []
