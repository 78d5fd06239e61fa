"""Debian's packages for tests that need a program of them: unpacked, not installed."""

import fcntl
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path


class NotHere(Exception):
    """Why a program cannot be had on this machine."""


def unpack(folder: Path, packages: Sequence[str]) -> Path:
    """These packages and what they need, unpacked below the folder: installed, they would be services of this machine."""
    archives, root = folder / "archives", folder / "root"
    (archives / "partial").mkdir(parents=True)
    # apt-get refuses where another one reads the lists, as when two tests do this at once.
    alone = open(Path(tempfile.gettempdir()) / "bridge-tests-apt-get", "w")  # noqa: SIM115 - held till the end of this function
    fcntl.flock(alone, fcntl.LOCK_EX)
    options = ["-qq", "-y", "--no-install-recommends", "--download-only", "-o", f"Dir::Cache::archives={archives}"]
    for command in (["update"], ["install", *packages]):
        fetched = subprocess.run(["apt-get", *options, *command], capture_output=True, text=True, check=False)
        if fetched.returncode:
            raise NotHere(f"apt-get {' '.join(command)}: {fetched.stderr[-300:]}")
    for archive in archives.glob("*.deb"):
        subprocess.run(["dpkg", "-x", archive, root], check=True)
    return root
