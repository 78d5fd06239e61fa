"""make pull from a real registry (Debian's docker-registry) on the loopback address, with small images in place of ours."""

import hashlib
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MISSING = [tool for tool in ("docker-registry", "apptainer", "buildah") if shutil.which(tool) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not on PATH: {', '.join(MISSING)}")
MANIFEST = "application/vnd.oci.image.manifest.v1+json"


def command(*words: str | Path, **options) -> subprocess.CompletedProcess:
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=120, **options)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a checkout in it, whose bridge.sif may be overwritten."""
    folder = tmp_path_factory.mktemp("pull")
    (folder / "checkout").mkdir()
    for name in ("Makefile", ".env.example"):
        shutil.copy(ROOT / name, folder / "checkout")
    shutil.copytree(ROOT / "scripts", folder / "checkout" / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "hello").write_text("hello\n")
    return folder


@pytest.fixture(scope="module")
def registry(place) -> Iterator[str]:
    """Host and port of a registry that lives as long as the tests."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    (place / "registry.yml").write_text(
        f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {place}/registry}}}}\nhttp: {{addr: {address}}}\n")
    with (place / "registry.log").open("w") as log:
        server = subprocess.Popen(["docker-registry", "serve", place / "registry.yml"], stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(f"http://{address}/v2/", timeout=5)
                break
            except urllib.error.URLError:
                assert server.poll() is None and time.monotonic() < deadline, (place / "registry.log").read_text()
                time.sleep(0.1)
        yield address
    finally:
        server.terminate()
        server.wait(timeout=30)


@pytest.fixture(scope="module")
def env(place, registry) -> dict[str, str]:
    """Tells both engines that this registry speaks http, and buildah to keep its images here, away from the real ones."""
    (place / "registries.conf").write_text(f'[[registry]]\nlocation = "{registry}"\ninsecure = true\n')
    (place / "storage.conf").write_text(
        f'[storage]\ndriver = "vfs"\ngraphroot = "{place}/images"\nrunroot = "{place}/images-run"\n')
    return {**os.environ, "APPTAINER_NOHTTPS": "true", "CONTAINERS_REGISTRIES_CONF": str(place / "registries.conf"),
            "CONTAINERS_STORAGE_CONF": str(place / "storage.conf")}


def pull(place: Path, env: dict[str, str], engine: str, image: str) -> subprocess.CompletedProcess:
    return subprocess.run(["make", "pull"], cwd=place / "checkout", check=False, capture_output=True, text=True, timeout=120,
                          env={**env, "ENGINE": engine, "IMAGE": image})


@pytest.fixture(scope="module")
def oci(place, registry, env) -> str:
    """An OCI image in the registry, named by the digest that the push was told."""
    container = command("buildah", "from", "scratch", env=env).stdout.strip()
    command("buildah", "copy", container, place / "hello", "/hello", env=env)
    command("buildah", "commit", container, "localhost/small", env=env)
    command("buildah", "push", "--digestfile", place / "digest", "localhost/small", f"docker://{registry}/team/oci:1", env=env)
    return f"docker://{registry}/team/oci@{(place / 'digest').read_text()}"


def test_a_sif_comes_by_its_digest_as_it_was_pushed(place, registry, env):
    (place / "small.def").write_text(f"Bootstrap: scratch\n%files\n    {place}/hello /hello\n")
    command("apptainer", "build", place / "small.sif", place / "small.def", env=env)
    command("apptainer", "push", "--allow-unsigned", place / "small.sif", f"oras://{registry}/team/bridge:1", env=env)
    request = urllib.request.Request(f"http://{registry}/v2/team/bridge/manifests/1", headers={"Accept": MANIFEST})
    with urllib.request.urlopen(request, timeout=30) as answer:
        digest = f"sha256:{hashlib.sha256(answer.read()).hexdigest()}"
    result = pull(place, env, "apptainer", f"oras://{registry}/team/bridge@{digest}")
    assert result.returncode == 0, result.stderr
    assert (place / "checkout" / "bridge.sif").read_bytes() == (place / "small.sif").read_bytes()


def test_a_digest_that_the_registry_does_not_have_leaves_the_image_that_is_there(place, registry, env):
    there = place / "checkout" / "bridge.sif"
    there.write_text("the image of before")
    result = pull(place, env, "apptainer", f"oras://{registry}/team/bridge@sha256:{'0' * 64}")
    assert result.returncode != 0 and "manifest unknown" in result.stderr
    assert there.read_text() == "the image of before" and not list(there.parent.glob("*.partial"))


def test_an_oci_image_comes_by_its_digest_under_the_name_that_the_scripts_use(place, env, oci):
    result = pull(place, env, "buildah", oci)
    assert result.returncode == 0, result.stderr
    # An image's id is the sum of its configuration, layers included.
    pushed, pulled = (command("buildah", "images", "--no-trunc", "--format", "{{.ID}}", name, env=env).stdout
                      for name in ("localhost/small", "localhost/bridge:latest"))
    assert pushed == pulled != ""


def test_apptainer_makes_a_sif_of_an_oci_image(place, env, oci):
    result = pull(place, env, "apptainer", oci)
    assert result.returncode == 0, result.stderr
    listed = command("apptainer", "sif", "list", place / "checkout" / "bridge.sif", env=env)
    assert "Squashfs" in listed.stdout
