"""The built images as tests see them: one fixture, `image`, which is the SIF and then the OCI image.

    make image oci && make test ARGS=tests/image
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
from spython.main import Client

from door import ROOT, SHELL

SIF, OCI = ROOT / "bridge.sif", "localhost/bridge:latest"
WARNING = re.compile(r"\bWARN(ING)?\b|\bERROR\b|\bCRITICAL\b|Warning:|Error:|Traceback|^W\d{4} ", re.MULTILINE)
# What may be warned of: by whom, and why it is no fault.
ALLOWED = (
    # vLLM's kernels, where there is no NVIDIA driver.
    "Failed to import from vllm._C with ImportError('libcuda.so.1: cannot open shared object file",
    # Apptainer's, of a user whom the machine does not know either.
    "WARNING: user: unknown userid", "WARNING: Skipping impossible home directory mount to '/'",
)


@dataclass(frozen=True)
class Result:
    """What a command in an image printed (stdout, then stderr) and its exit status."""

    output: str
    status: int

    def checked(self) -> str:
        """The output of a command that ended well and warned of nothing that is not ALLOWED."""
        assert self.status == 0, self.output
        assert self.warnings() == []
        return self.output

    def warnings(self) -> list[str]:
        """Lines that warn."""
        return [line for line in self.output.splitlines()
                if WARNING.search(line) and not any(text in line for text in ALLOWED)]


class Sif:
    """bridge.sif through spython, which calls the engine `singularity`."""

    name, read_only = "sif", True

    def __init__(self, bin_folder: Path):
        engine = shutil.which("apptainer") or shutil.which("singularity")
        if not SIF.is_file() or not engine:
            pytest.skip(f"{'apptainer is not on PATH' if not engine else f'{SIF} is not there: make image'}")
        (bin_folder / "singularity").symlink_to(engine)
        self.path = f"{bin_folder}:{SHELL['PATH']}"
        Client.quiet = True

    def _options(self, binds: Mapping[Path, str], env: Mapping[str, str], user: int | None, home: Path | None) -> list[str]:
        options = [] if home is None else ["--home", str(home)]
        for source, target in binds.items():
            options += ["--bind", f"{source}:{target}"]
        for name, value in env.items():
            options += ["--env", f"{name}={value}"]
        # The checkout, where the tests are, may be closed to another user.
        return options + ([] if user is None else ["--security", f"uid:{user}", "--pwd", "/"])

    def _call(self, call, command: list[str], host_env: Mapping[str, str], options: list[str]) -> Result:
        with mock.patch.dict(os.environ, {**SHELL, "PATH": self.path, **host_env}, clear=True):
            found = call(str(SIF), command, options=options, return_result=True, quiet=True)
        message = found["message"]
        return Result("".join(message) if isinstance(message, list) else message, found["return_code"])

    def run(self, *arguments: str, binds=None, env=None, host_env=None, user=None, home=None) -> Result:
        """Go in by the door, as `apptainer run` does."""
        return self._call(Client.run, list(arguments), host_env or {}, self._options(binds or {}, env or {}, user, home))

    def execute(self, *command: str, binds=None, env=None, host_env=None, user=None, home=None) -> Result:
        """Run any command in the image."""
        return self._call(Client.execute, list(command), host_env or {}, self._options(binds or {}, env or {}, user, home))

    def alone(self, *command: str) -> Result:
        """Run any command where nothing of the host is let in, neither its environment nor its folders."""
        return self._call(Client.execute, list(command), {}, ["--cleanenv", "--pwd", "/", "--no-mount",
                                                                 "home,cwd,tmp,hostfs,bind-paths"])

    def labels(self) -> dict[str, str]:
        """The image's labels."""
        with mock.patch.dict(os.environ, {**SHELL, "PATH": self.path}, clear=True):
            return Client.inspect(str(SIF))["attributes"]["labels"]


class Oci:
    """localhost/bridge:latest through buildah, which needs no engine; its containers live as long as one command."""

    name, read_only = "oci", False

    def __init__(self):
        if not shutil.which("buildah"):
            pytest.skip("buildah is not on PATH")
        self.config = json.loads(self._buildah("inspect", "--type", "image", OCI).stdout or "{}").get("OCIv1", {}).get("config")
        if not self.config:
            pytest.skip(f"there is no image {OCI}: make oci")

    def _buildah(self, *arguments: str, **env: str) -> subprocess.CompletedProcess:
        env = {**SHELL, **{name: value for name, value in os.environ.items() if name.startswith("BUILDAH_")}, **env}
        while True:
            found = subprocess.run(["buildah", *arguments], capture_output=True, text=True, check=False, timeout=600, env=env)
            # Buildah starts as a sealed copy of itself, which now and then fails while another one does; nothing has run then.
            if "sealing memfd copy: Device or resource busy" not in found.stderr:
                return found

    def run(self, *arguments: str, **options) -> Result:
        """Go in by the door: ENTRYPOINT with arguments, which `buildah run` does not add by itself."""
        return self.execute(*self.config["Entrypoint"], *arguments, **options)

    def execute(self, *command: str, binds=None, env=None, host_env=None, user=None, home=None) -> Result:
        """Run any command in a new container."""
        container = self._buildah("from", "--pull-never", OCI).stdout.strip()
        options = [] if home is None else ["--volume", f"{home}:{home}", "--env", f"HOME={home}"]
        for source, target in (binds or {}).items():
            options += ["--volume", f"{source}:{target}"]
        for name, value in (env or {}).items():
            options += ["--env", f"{name}={value}"]
        options += [] if user is None else ["--user", f"{user}:{user}"]
        try:
            found = self._buildah("run", *options, container, "--", *command, **(host_env or {}))
        finally:
            self._buildah("rm", container)
        # chroot isolation tells of the command's exit status in lines of its own.
        told = re.compile(r"^(subprocess exited with status|[Ee]rror: |error running|exit status).*\n?", re.MULTILINE)
        return Result(found.stdout + told.sub("", found.stderr), found.returncode)

    def alone(self, *command: str) -> Result:
        """Run any command where nothing of the host is let in, neither its environment nor its folders."""
        return self.execute(*command)

    def labels(self) -> dict[str, str]:
        """The image's labels."""
        return self.config["Labels"]

    def stored(self) -> float:
        """Bytes of all its layers together, to three digits."""
        number, unit = self._buildah("images", "--format", "{{.Size}}", OCI).stdout.split()
        return float(number) * {"MB": 1e6, "GB": 1e9}[unit]


@pytest.fixture(scope="session", params=["sif", "oci"])
def image(request, tmp_path_factory) -> Iterator[Sif | Oci]:
    yield Sif(tmp_path_factory.mktemp("bin")) if request.param == "sif" else Oci()


@pytest.fixture(scope="session")
def sif(tmp_path_factory) -> Sif:
    """The SIF alone, for what only Apptainer has."""
    return Sif(tmp_path_factory.mktemp("bin"))


@pytest.fixture(scope="session")
def oci() -> Oci:
    """The OCI image alone, for what only layers have."""
    return Oci()
