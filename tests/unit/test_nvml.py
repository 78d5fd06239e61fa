"""A GPU node, as far as NVML goes: pynvml is the real one, the library of the driver behind it is fake_nvml.c."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from door import SHELL

SOURCE = Path(__file__).with_name("fake_nvml.c")
LOOK = """
import json, os, sys
from bridge import hardware
for visible in json.loads(sys.argv[1]):
    gpus = hardware.visible_gpus({**os.environ, **visible})
    print(json.dumps([hardware.driver_version(), [[gpu.device, gpu.name, gpu.memory, gpu.memory_used] for gpu in gpus]]))
"""
GPUS = [[device, "a fake GPU", 80 << 30, 1 << 30] for device in ("0", "1")]


def node_with(folder: Path, *options: str) -> dict[str, str]:
    """The environment of a node with two GPUs; -D options of the compiler make it another (fake_nvml.c)."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        pytest.skip("the fake of NVML has to be compiled: no cc or gcc on PATH")
    subprocess.run([compiler, "-shared", "-fPIC", *options, "-o", folder / "libnvidia-ml.so.1", SOURCE], check=True)
    return {**{name: value for name, value in SHELL.items() if name != "CUDA_VISIBLE_DEVICES"}, "LD_LIBRARY_PATH": str(folder)}


@pytest.fixture(scope="module")
def node(tmp_path_factory) -> dict[str, str]:
    return node_with(tmp_path_factory.mktemp("fake-nvml"))


def looks(env: dict[str, str], *visible: dict[str, str]) -> list[list]:
    """The driver and the GPUs, with each of these settings: of one new Python, since the library's place is read at its start."""
    found = subprocess.run([sys.executable, "-c", LOOK, json.dumps(visible)], env=env, capture_output=True, text=True,
                           check=False)
    assert found.returncode == 0, found.stderr
    return [json.loads(line) for line in found.stdout.splitlines()]


def look(env: dict[str, str]) -> list:
    [found] = looks(env, {})
    return found


VISIBLE = [(None, GPUS), ("1", GPUS[1:]), ("GPU-fake-1,0", GPUS[::-1]), ("-1", []), ("2,0", [])]


@pytest.fixture(scope="module")
def looked(node) -> dict[str | None, list]:
    """What is seen by each value of CUDA_VISIBLE_DEVICES."""
    values = [value for value, _ in VISIBLE]
    return dict(zip(values, looks(node, *({"CUDA_VISIBLE_DEVICES": value} if value else {} for value in values)), strict=True))


@pytest.mark.parametrize(("visible", "gpus"), VISIBLE)
def test_nvml_is_asked_for_the_gpus_and_the_driver(looked, visible, gpus):
    assert looked[visible] == ["570.00.fake", gpus]


SITE = """
import json, os, sys
from bridge import settings
from bridge.tools import check
rows = [[row.check, row.status, row.seen] for row in check.site(settings.read(os.environ), os.environ)]
print(json.dumps([rows, "torch" in sys.modules]))
"""


def site(env: dict[str, str]) -> dict[str, tuple[str, str]]:
    """What `bridge check` says of the site, by its names; the servers are not asked."""
    quiet = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    found = subprocess.run([sys.executable, "-c", SITE], env={**env, **quiet}, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    rows, torch = json.loads(found.stdout)
    assert not torch, "it takes seconds"
    return {check: (status, seen) for check, status, seen in rows}


@pytest.mark.parametrize(("driver", "status"), [
    ("525.60.13", "ok"), ("525.60.11", "FAIL"), ("470.223.02", "FAIL"), ("570.00", "ok")])
def test_a_driver_too_old_for_cuda_12_fails_with_the_oldest_that_goes(tmp_path, driver, status):
    (tmp_path / "work").mkdir()
    found, seen = site({**node_with(tmp_path, f'-DDRIVER="{driver}"'), "WORK_DIR": str(tmp_path / "work")})["NVIDIA driver"]
    assert found == status and (seen == driver if status == "ok" else f"driver {driver}" in seen and "525.60.13 or newer" in seen)


@pytest.mark.parametrize(("gib", "share", "status"), [(1, "0", "ok"), (40, "0", "FAIL"), (40, "1", "ok")])
def test_a_gpu_that_others_use_fails_unless_it_may_be_shared(tmp_path, gib, share, status):
    (tmp_path / "work").mkdir()
    env = {**node_with(tmp_path, f"-DUSED={gib}ull"), "WORK_DIR": str(tmp_path / "work"), "SHARE_GPU": share, "GPUS": "1"}
    found, seen = site(env)["GPUs"]
    assert found == status and seen.startswith("free, or" if status == "ok" else "GPU 0 is in use (40 of 80 GiB). Name free ones")


def test_without_the_drivers_library_there_is_no_gpu(node):
    if look({**node, "LD_LIBRARY_PATH": ""})[0] is not None:
        pytest.skip("this machine has the driver's library")
    assert look({**node, "LD_LIBRARY_PATH": ""}) == [None, []]


def test_the_tests_themselves_see_no_gpu_where_there_are_some(node):
    # What a test hands to the door, and what it has itself.
    for env in (SHELL, os.environ):
        assert look({**env, "LD_LIBRARY_PATH": node["LD_LIBRARY_PATH"]}) == ["570.00.fake", []]


@pytest.mark.parametrize(("asked", "collected"), [([], False), (["tests/gpu"], True)])
def test_pytest_alone_starts_nothing_of_what_needs_a_gpu(asked, collected):
    # All other folders are left out only because collecting them takes seconds.
    others = [f"--ignore=tests/{folder}" for folder in ("unit", "rehearsal")]
    found = subprocess.run([sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0", "-m", "", *others, *asked],
                           capture_output=True, text=True, check=False, cwd=SOURCE.parents[2], env=dict(os.environ))
    assert ("tests/gpu/test_" in found.stdout) == collected, found.stdout + found.stderr
    assert found.returncode == (pytest.ExitCode.OK if collected else pytest.ExitCode.NO_TESTS_COLLECTED)
