"""What several unit tests need: a small model and data to point the door at."""

import fcntl
import os
from pathlib import Path

import pytest

from door import bridge


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """A WORK_DIR with the built-in data and the tiny model, made by the door itself. Not to be written to."""
    folder = tmp_path_factory.getbasetemp()
    # One for all of xdist's processes: their folders are beside each other.
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    work_dir, made = folder / "prepared", folder / "prepared.made"
    with open(folder / "prepared.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            work_dir.mkdir(exist_ok=True)
            for stage in ("data", "model"):
                result = bridge(stage, WORK_DIR=str(work_dir), DATA_SOURCE="builtin", MODEL="tiny")
                assert result.returncode == 0, result.stderr
            made.touch()
    return work_dir


@pytest.fixture
def env(prepared: Path, tmp_path: Path) -> dict[str, str]:
    """Settings of a rehearsal run in a WORK_DIR of its own, with that data and model."""
    for name in ("data", "models"):
        (tmp_path / name).symlink_to(prepared / name)
    return {"WORK_DIR": str(tmp_path), "MODEL": "tiny", "PROFILE": "tiny", "GPUS": "2"}
