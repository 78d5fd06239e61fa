"""The two recipes of the image, Containerfile and apptainer.def: they must say the same, and hold no logic."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from spython.main.parse.parsers import DockerParser, SingularityParser
from spython.main.parse.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
OCI = (ROOT / "Containerfile").read_text()
SIF = (ROOT / "apptainer.def").read_text()
INSTALL = ROOT / "scripts/image/install.sh"


def parsed(recipe: str, folder: Path) -> Recipe:
    """One recipe as spython reads it, with the defaults of its arguments put in: it does not know {{ }}."""
    if recipe == "Containerfile":
        [parsed] = DockerParser(str(ROOT / recipe)).recipe.values()
        return parsed
    text = SIF
    for name, value in re.findall(r"^    ([A-Z]+)=(.*)$", SIF, re.MULTILINE):
        text = text.replace("{{ " + name + " }}", value)
    assert "{{" not in text
    (folder / recipe).write_text(text)
    [parsed] = SingularityParser(str(folder / recipe)).recipe.values()
    return parsed


@pytest.fixture
def recipes(tmp_path) -> tuple[Recipe, Recipe]:
    return parsed("Containerfile", tmp_path), parsed("apptainer.def", tmp_path)


def test_both_recipes_start_from_the_same_image_by_digest(recipes):
    oci, sif = recipes
    assert oci.fromHeader == sif.fromHeader
    assert re.fullmatch(r"debian:bookworm-slim@sha256:[0-9a-f]{64}", sif.fromHeader)


def test_both_recipes_run_the_same_install_steps(recipes):
    steps = [re.findall(r"install\.sh (\w+)", "\n".join(recipe.install)) for recipe in recipes]
    assert steps[0] == steps[1] == ["dependencies", "bridge", "manifest"]


def test_both_recipes_copy_the_same_files_to_the_same_places(recipes):
    oci, sif = recipes
    copied = {(source, target + Path(source).name if target.endswith("/") else target) for source, target in oci.files}
    assert copied == {tuple(line.split()) for line in sif.files}
    assert [source for source, _ in copied if not (ROOT / source).exists()] == []


def test_both_recipes_set_the_same_environment(recipes):
    oci, sif = recipes
    assert sorted(oci.environ) == sorted(word for line in sif.environ for word in line.split())
    assert any(word.startswith("PATH=/opt/venv/bin:") for word in oci.environ)


def test_both_recipes_enter_by_the_same_door(recipes):
    oci, sif = recipes
    assert sif.cmd == f'exec {oci.entrypoint[-1]} "$@"'
    assert oci.entrypoint[-1] == "bridge"


def test_both_recipes_have_the_same_labels(recipes):
    oci, sif = recipes
    labels = {tuple(label.replace('"', "").replace("${COMMIT}", "").split("=", 1)) for [label] in oci.labels}
    assert labels == {line.partition(" ")[::2] for line in sif.labels}
    assert len(labels) > 3


def test_what_is_copied_is_let_through_to_the_build_and_nothing_else():
    ignore = (ROOT / ".dockerignore").read_text().split("\n")
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    copied = {source for line in re.findall(r"^COPY (.*)$", OCI, re.MULTILINE) for source in line.split()[:-1]}
    assert ignore[1] == "*"
    assert allowed == (copied - {"scripts/image/install.sh"}) | {"scripts/image"}


@pytest.mark.parametrize("recipe", ["Containerfile", "apptainer.def"])
def test_recipes_are_short_and_without_logic(recipe):
    text = (ROOT / recipe).read_text()
    assert len(text.splitlines()) <= 40
    assert re.findall(r"\b(if|then|for|while|case|apt-get|pip)\b", re.sub(r"#.*", "", text)) == []


def test_install_refuses_an_unknown_part_and_says_which_there_are():
    result = subprocess.run([str(INSTALL), "everything"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "install.sh dependencies" in result.stderr


def test_flash_attention_is_pinned_by_url_and_hash():
    assert re.search(r"^flash_attn_sha256=[0-9a-f]{64}$", INSTALL.read_text(), re.MULTILINE)


@pytest.fixture
def build(tmp_path):
    """A copy of what a build needs, and a PATH without tools that build."""
    shutil.copytree(ROOT / "scripts/host", tmp_path / "scripts/host")
    (tmp_path / "scripts/image").mkdir()
    shutil.copy(ROOT / ".env.example", tmp_path)
    (tmp_path / "bin").mkdir()
    for tool in ("bash", "sed", "dirname", "realpath", "df", "du", "cut", "tail", "head", "find", "sort", "cp", "rm",
                 "mkdir", "mv", "git"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))

    def run(what: str, **env: str) -> subprocess.CompletedProcess:
        return subprocess.run([str(tmp_path / "scripts/host/build.sh"), what], capture_output=True, text=True, check=False,
                              env={"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path), **env}, timeout=60)

    run.folder = tmp_path
    return run


def tool(build, name: str, text: str) -> None:
    """Put a fake tool on the PATH of a build."""
    (build.folder / "bin" / name).unlink(missing_ok=True)
    (build.folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (build.folder / "bin" / name).chmod(0o755)


FAKE_APPTAINER = """
[[ $2 != --help ]] || { echo --mksquashfs-args; exit; }
printf '%s\\n' "$@" > "$HOME/argv"; ls "$HOME/scripts/image/inputs" > "$HOME/inputs"
[[ -z ${FAIL:-} ]] || exit 1
for image in "$@"; do [[ $image != *.partial ]] || echo image > "$image"; done
"""


def fake_apptainer(build) -> None:
    tool(build, "apptainer", FAKE_APPTAINER)
    (build.folder / "bin/ls").symlink_to(shutil.which("ls"))
    (build.folder / "bin/env").symlink_to(shutil.which("env"))


@pytest.mark.parametrize(("what", "word"), [("sif", "apptainer"), ("oci", "buildah, podman or docker"), ("zip", "sif or oci")])
def test_a_build_without_its_tool_names_the_cure(build, what, word):
    result = build(what)
    assert result.returncode == 2
    assert word in result.stderr


def test_a_build_without_space_is_refused_before_it_starts(build):
    fake_apptainer(build)
    tool(build, "df", "echo Avail; echo 1048576")
    result = build("sif")
    assert result.returncode == 2
    assert "1 GiB free" in result.stderr and "APPTAINER_TMPDIR" in result.stderr
    assert not (build.folder / "argv").exists()


def test_a_build_takes_certificates_and_wheel_from_the_host_and_leaves_none_behind(build):
    fake_apptainer(build)
    wheel, bundle = build.folder / "flash_attn-1.whl", build.folder / "own.crt"
    wheel.write_text("")
    bundle.write_text("certificates")
    tool(build, "df", "echo Avail; echo 104857600")
    result = build("sif", FLASH_ATTN_WHEEL=str(build.folder), SSL_CERT_FILE=str(bundle), BASE="other")
    assert result.returncode == 0, result.stderr
    assert (build.folder / "inputs").read_text().split() == ["certificates.crt", "flash_attn-1.whl"]
    assert "BASE=other" in (build.folder / "argv").read_text().split("\n")
    assert list((build.folder / "scripts/image").iterdir()) == []
    assert "bridge.sif" in result.stdout and " min " in result.stdout


def test_a_failed_build_leaves_the_old_image_and_nothing_else(build):
    fake_apptainer(build)
    tool(build, "df", "echo Avail; echo 104857600")
    (build.folder / "bridge.sif").write_text("old")
    assert build("sif", FAIL="1").returncode != 0
    assert (build.folder / "bridge.sif").read_text() == "old"
    assert not (build.folder / "bridge.sif.partial").exists()


def test_a_wheel_that_is_not_there_is_refused(build):
    fake_apptainer(build)
    tool(build, "df", "echo Avail; echo 104857600")
    result = build("sif", FLASH_ATTN_WHEEL="/nowhere")
    assert result.returncode == 2
    assert "FLASH_ATTN_WHEEL=/nowhere" in result.stderr


def test_two_builds_do_not_get_in_each_others_way(build):
    fake_apptainer(build)
    tool(build, "df", "echo Avail; echo 104857600")
    (build.folder / "scripts/image/inputs").mkdir()
    assert "another build" in build("sif").stderr
    assert (build.folder / "scripts/image/inputs").is_dir()
