"""compare.py: it finds what differs between two trees, and only that."""

import os
import shutil
import subprocess
import sys

import pytest

from door import ROOT, SHELL

COMPARE = ROOT / "tests/image/compare.py"


def compare(*images, **env) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(COMPARE), *map(str, images)], capture_output=True, text=True, check=False,
                          env={**SHELL, **env}, timeout=60)


@pytest.fixture
def trees(tmp_path):
    """Two equal trees."""
    a, b = tmp_path / "a", tmp_path / "b"
    (a / "opt/empty").mkdir(parents=True)
    (a / "opt/file").write_text("text")
    (a / "opt/link").symlink_to("file")
    for path in ("etc/hosts", ".singularity.d/labels.json"):
        (a / path).parent.mkdir(exist_ok=True)
        (a / path).write_text("an engine's")
    shutil.copytree(a, b, symlinks=True)
    return a, b


def test_equal_trees_have_no_difference_whatever_their_dates_and_the_engines_files(trees):
    a, b = trees
    os.utime(b / "opt/file", (0, 0))
    (b / "etc/hosts").write_text("another's")
    (b / ".singularity.d/more").write_text("")
    result = compare(a, b)
    assert (result.stdout, result.returncode) == (f"5 entries in {a}, 5 in {b}, 0 differences\n", 0)


def test_each_kind_of_difference_is_named(trees):
    a, b = trees
    (b / "opt/file").write_text("test")
    (b / "opt/link").unlink()
    (b / "opt/link").symlink_to("elsewhere")
    (b / "opt/empty").chmod(0o700)
    (b / "opt/more/below").mkdir(parents=True)
    (a / "etc/alone").write_text("")
    shutil.copy(a / "etc/alone", a / "opt/kind")
    (b / "opt/kind").mkdir()
    result = compare(a, b)
    assert result.returncode == 1
    assert [line.split(": ")[0] + ": " + line.split(": ")[1].split(" ")[0] for line in result.stdout.splitlines()[:-1]] == [
        "etc/alone: only", "opt/empty: mode", "opt/file: content", "opt/kind: type", "opt/link: content", "opt/more: only"]
    assert "opt/link: content file in A, elsewhere in B" in result.stdout


def test_an_image_is_read_by_the_python_inside_it(trees, tmp_path):
    # An engine that runs what it is given here, on a root of its own.
    a, _ = trees
    sif, engine = tmp_path / "bridge.sif", tmp_path / "bin/apptainer"
    sif.write_text("")
    engine.parent.mkdir()
    engine.write_text(f'#!/bin/sh\nwhile [ "$1" != "{sif}" ]; do shift; done; shift\n'
                      f'[ "$*" = "/usr/bin/python3.11 - --list" ] && sed "s|entries(\\"/\\")|entries(\\"{a}\\")|" |'
                      f' {sys.executable} - --list\n')
    engine.chmod(0o755)
    result = compare(sif, a, PATH=f"{engine.parent}:{SHELL['PATH']}")
    assert (result.stdout, result.returncode) == (f"5 entries in {sif}, 5 in {a}, 0 differences\n", 0), result.stderr


def test_an_image_that_cannot_be_read_is_no_difference(trees, tmp_path):
    a, _ = trees
    assert compare(a, tmp_path / "none", PATH="/nowhere").returncode == 2
    assert compare(a).returncode == 2
