"""The two recipes of the image, Containerfile and apptainer.def: they must say the same, and hold no logic."""

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
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
    for name, value in re.findall(r"^    ([A-Z_]+)=(.*)$", SIF, re.MULTILINE):
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
    assert steps[0] == steps[1] == ["torch", "dependencies", "bridge", "manifest"]


def test_both_recipes_hand_the_steps_the_same_arguments():
    # Of the base its name where build.sh gives one, else what FROM and From: say, which ends in a digest.
    handed = [re.findall(r'install\.sh (\w+)((?: "\S+")*)$', text.replace("${base:-{{ BASE }}}", "${BASE_NAME}").replace(
        "{{ ", "${").replace(" }}", "}"), re.MULTILINE) for text in (OCI, SIF)]
    assert handed[0] == handed[1] == [("torch", ""), ("dependencies", ' "${FLASH_ATTN_WHEEL}"'), ("bridge", ""),
                                      ("manifest", ' "${COMMIT}" "${BASE_NAME}" "${FLASH_ATTN_WHEEL}"')]
    assert "ARG BASE_NAME=${BASE}\n" in OCI and '    base="{{ BASE_NAME }}"\n' in SIF


def test_a_new_commit_or_an_edit_of_the_program_leaves_the_slow_layers_alone():
    slow = OCI.index("install.sh dependencies")
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", OCI[:slow], re.MULTILINE) for word in line.split()]
    assert copied == ["requirements.lock", "requirements-uv.lock", "scripts/image/install.sh"]
    assert re.findall(r"^ARG (\w+)", OCI[:slow], re.MULTILINE) == ["BASE", "FLASH_ATTN_WHEEL"]
    assert OCI.index("install.sh torch") < OCI.index("ARG FLASH_ATTN_WHEEL")
    assert OCI.index("ARG COMMIT") > OCI.index("install.sh bridge")


@pytest.mark.parametrize(("mktemp", "bridge", "status"), [
    ("mktemp", "exit 0", 0), ("mktemp", "exit 3", 3), ("false", "exit 0", 1)])
def test_the_self_test_of_the_sif_ends_where_it_gets_no_folder(tmp_path, mktemp, bridge, status):
    [section] = re.findall(r"^%test\n(.*?)^%", SIF, re.MULTILINE | re.DOTALL)
    for name, text in (("bridge", f'[ -d "$WORK_DIR" ] && echo "$@ $WORK_DIR" > {tmp_path}/called; {bridge}'),
                       ("mktemp", f"{shutil.which(mktemp)} -d -p {tmp_path}")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    found = subprocess.run(["sh", "-c", section], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=False, timeout=60)
    assert found.returncode == status
    called = tmp_path / "called"
    assert called.exists() == (mktemp == "mktemp")
    if called.exists():
        check, folder = called.read_text().split()
        assert check == "check" and not Path(folder).exists()


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
    assert re.search(r"^flash_attn_wheel\+=@sha256:[0-9a-f]{64}$", INSTALL.read_text(), re.MULTILINE)


@pytest.fixture
def build(tmp_path):
    """A copy of what a build needs, and a PATH without tools that build."""
    shutil.copytree(ROOT / "scripts/host", tmp_path / "scripts/host")
    (tmp_path / "scripts/image").mkdir()
    shutil.copy(ROOT / ".env.example", tmp_path)
    (tmp_path / "bin").mkdir()
    for tool in ("bash", "sed", "dirname", "realpath", "df", "du", "cut", "tail", "head", "find", "sort", "cp", "rm",
                 "mkdir", "mv", "git", "sha256sum", "basename"):
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


EMPTY = f"sha256:{hashlib.sha256(b'').hexdigest()}"


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


def test_an_oci_build_without_space_in_the_store_is_refused(build):
    tool(build, "buildah", 'echo "$HOME"')
    tool(build, "df", "echo Avail; echo 1048576")
    result = build("oci")
    assert result.returncode == 2
    assert f"{build.folder} has 1 GiB free" in result.stderr and "buildah images --all" in result.stderr


def test_a_build_takes_certificates_and_wheel_from_the_host_and_leaves_none_behind(build):
    fake_apptainer(build)
    wheel, bundle = build.folder / "flash_attn-1.whl", build.folder / "own.crt"
    wheel.write_text("")
    bundle.write_text("certificates")
    tool(build, "df", "echo Avail; echo 104857600")
    result = build("sif", FLASH_ATTN_WHEEL=str(build.folder), SSL_CERT_FILE=str(bundle), BASE="other")
    assert result.returncode == 0, result.stderr
    assert (build.folder / "inputs").read_text().split() == ["certificates.crt", "flash_attn-1.whl"]
    argv = (build.folder / "argv").read_text().split("\n")
    assert {"BASE=other", "BASE_NAME=other", f"FLASH_ATTN_WHEEL=flash_attn-1.whl@{EMPTY}"} <= set(argv)
    assert list((build.folder / "scripts/image").iterdir()) == []
    assert "bridge.sif" in result.stdout and " min " in result.stdout


FAKE_BUILDAH = """
case $1 in
info) echo "$HOME" ;;
images) [[ $* != *localhost/base* ]] || echo sha256:0a0b ;;
build) printf '%s\\n' "$@" > "$HOME/argv"; ls "$HOME/scripts/image/inputs" > "$HOME/inputs" ;;
esac
"""


@pytest.mark.parametrize(("base", "named", "sif_too"), [
    ("{folder}/base.oci.tar", f"base.oci.tar@{EMPTY}", True),
    ("debian@sha256:0c", "debian@sha256:0c", True),
    ("debian:bookworm", "debian:bookworm", True),
    ("localhost/base:1", "localhost/base:1@sha256:0a0b", False),
])
def test_the_manifest_is_told_what_a_base_without_a_digest_was(build, base, named, sif_too):
    fake_apptainer(build)
    tool(build, "buildah", FAKE_BUILDAH)
    tool(build, "df", "echo Avail; echo 104857600")
    (build.folder / "base.oci.tar").write_text("")
    base = base.format(folder=build.folder)
    for what in ("oci", "sif")[:1 + sif_too]:
        result = build(what, BASE=base)
        assert result.returncode == 0, result.stderr
        # Buildah takes an archive by its transport, Apptainer by BOOTSTRAP.
        taken = f"oci-archive:{base}" if what == "oci" and base.endswith(".tar") else base
        assert {f"BASE={taken}", f"BASE_NAME={named}"} <= set((build.folder / "argv").read_text().split("\n"))


def test_an_oci_build_keeps_its_layers_and_no_layer_depends_on_the_hosts_certificates(build):
    fake_apptainer(build)
    tool(build, "buildah", FAKE_BUILDAH)
    tool(build, "df", "echo Avail; echo 104857600")
    (build.folder / "flash_attn-1.whl").write_text("")
    (build.folder / "own.crt").write_text("certificates")
    result = build("oci", FLASH_ATTN_WHEEL=str(build.folder), SSL_CERT_FILE=str(build.folder / "own.crt"))
    assert result.returncode == 0, result.stderr
    assert {"--layers", f"id=certificates.crt,src={build.folder}/own.crt",
            f"FLASH_ATTN_WHEEL=flash_attn-1.whl@{EMPTY}"} <= set((build.folder / "argv").read_text().split("\n"))
    assert (build.folder / "inputs").read_text().split() == ["flash_attn-1.whl"]


# Not the engine: it notes how it is called, a line a call.
FAKE_ENGINE = """
printf '%s ' "$(basename "$0")" "$@" >> "$HOME/calls"; echo >> "$HOME/calls"
case $1 in
info) echo "$HOME" ;;
images) [[ $* != *localhost/base* ]] || echo sha256:0a0b; [[ $* != *Size* ]] || echo '9 GB' ;;
esac
"""


@pytest.mark.parametrize(("engine", "layers", "saved"), [
    ("podman", True, "podman save --format oci-archive --output {image} localhost/bridge:latest"),
    ("docker", False, "docker save --output {image} localhost/bridge:latest")])
def test_podman_and_docker_build_the_same_recipe_and_store_it_where_asked(build, engine, layers, saved):
    tool(build, engine, FAKE_ENGINE)
    tool(build, "df", "echo Avail; echo 104857600")
    image = build.folder / "bridge.oci.tar"
    (build.folder / "own.crt").write_text("certificates")
    result = build("oci", IMAGE=str(image), BASE="localhost/base:1", SSL_CERT_FILE=str(build.folder / "own.crt"))
    assert result.returncode == 0, result.stderr
    calls = [call.split() for call in (build.folder / "calls").read_text().splitlines()]
    [made] = [call for call in calls if call[1] == "build"]
    assert made[:6] == [engine, "build", "--file", "Containerfile", "--tag", "localhost/bridge:latest"] and made[-1] == "."
    assert {"BASE=localhost/base:1", "BASE_NAME=localhost/base:1@sha256:0a0b",
            f"id=certificates.crt,src={build.folder}/own.crt"} <= set(made)
    # Docker keeps layers by itself and does not know the option.
    assert ("--layers" in made) == layers
    assert calls[-1] == saved.format(image=image).split()
    assert f"built {image}: 9 GB" in result.stdout


def test_podmans_store_is_asked_for_room_and_dockers_which_may_be_elsewhere_is_not(build):
    tool(build, "df", "echo Avail; echo 1048576")
    tool(build, "docker", FAKE_ENGINE)
    assert build("oci").returncode == 0
    tool(build, "podman", FAKE_ENGINE)
    result = build("oci")
    assert result.returncode == 2 and "podman images --all" in result.stderr


def test_an_image_that_is_neither_the_builds_name_nor_an_archive_is_refused(build):
    tool(build, "docker", FAKE_ENGINE)
    result = build("oci", IMAGE="registry.example/bridge:1")
    assert result.returncode == 2 and "IMAGE=FILE.tar stores it too" in result.stderr


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


def test_on_a_login_node_a_build_is_warned_of_and_in_a_job_it_is_not(build):
    fake_apptainer(build)
    tool(build, "df", "echo Avail; echo 104857600")
    tool(build, "sbatch", "")
    assert "login node" in build("sif").stderr
    assert "login node" not in build("sif", SLURM_JOB_ID="1").stderr


DIGEST = "sha256:" + "0a" * 32


@pytest.fixture
def pull(build):
    """make pull, where Apptainer and podman are fakes that note how they are called."""
    tool(build, "apptainer", 'printf "%s\\n" "$@" > "$HOME/argv"; [[ -z ${FAIL:-} ]] || exit 1; echo new > "$3"')
    (build.folder / "bin/env").symlink_to(shutil.which("env"))

    def run(image: str, **env: str) -> subprocess.CompletedProcess:
        return subprocess.run([str(build.folder / "scripts/host/pull.sh")], capture_output=True, text=True, check=False,
                              env={"PATH": str(build.folder / "bin"), "HOME": str(build.folder), "IMAGE": image, **env},
                              timeout=60)

    run.folder = build.folder
    return run


@pytest.mark.parametrize(("image", "word"), [
    ("", "is no image in a registry"),
    ("bridge.sif", "is no image in a registry"),
    ("oras://registry.example/bridge:1.0", "names no digest"),
    ("docker://registry.example/bridge", "names no digest"),
    ("docker://registry.example/bridge@sha256:0a", "names no digest"),
    (f"docker://registry.example:5000/bridge:1.0@{DIGEST}", "take the :1.0 out"),
])
def test_only_an_image_with_a_digest_is_pulled_and_the_cure_is_named(pull, image, word):
    result = pull(image)
    assert result.returncode == 2
    assert word in result.stderr and ("sha256:" in result.stderr)
    assert not (pull.folder / "argv").exists()


def test_a_pulled_image_is_where_a_built_one_would_be(pull):
    source = f"oras://registry.example:5000/team/bridge@{DIGEST}"
    result = pull(source)
    assert result.returncode == 0, result.stderr
    assert (pull.folder / "bridge.sif").read_text() == "new\n"
    assert (pull.folder / "argv").read_text().split("\n")[3] == source


def test_a_pull_that_fails_leaves_the_old_image_alone(pull):
    (pull.folder / "bridge.sif").write_text("old")
    assert pull(f"oras://registry.example/bridge@{DIGEST}", FAIL="1").returncode != 0
    assert (pull.folder / "bridge.sif").read_text() == "old"
    assert not (pull.folder / "bridge.sif.partial").exists()


def test_podman_pulls_an_oci_image_and_refuses_a_sif(pull, build):
    tool(build, "podman", 'printf "%s\\n" "$@" >> "$HOME/argv"')
    assert "only Apptainer runs" in pull(f"oras://registry.example/bridge@{DIGEST}", ENGINE="podman").stderr
    assert pull(f"docker://registry.example/bridge@{DIGEST}", ENGINE="podman").returncode == 0
    name = f"registry.example/bridge@{DIGEST}"
    assert (pull.folder / "argv").read_text().split() == ["pull", name, "tag", name, "localhost/bridge:latest"]


JOBS = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]


def called(line: str) -> set[tuple[str, ...]]:
    """The make targets that a line of shell calls, each with what of ARGS says which tests."""
    return {(target, *(re.findall(r"tests/\w+|-m long", arguments) if target == "test" else ()))
            for target, arguments in re.findall(r"\bmake (\w+)([^&\n]*)", line)}


def test_the_workflow_calls_the_targets_that_the_ci_of_this_repository_calls_and_they_exist():
    steps = {call for job in JOBS.values() for step in job["steps"] for call in called(step.get("run", "").split("echo")[0])}
    lines = re.findall(r"^ *ring .*", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    rings = {call for line in lines for call in called(line.split('"', 2)[2])}
    # A check of the environment is the image's own %test as well.
    assert steps == rings - {("check",)} and len(rings) > 6
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {target for target, *_ in rings} <= targets
    assert all((ROOT / folder).is_dir() for _, *tests in rings for folder in tests if folder.startswith("tests/"))


def test_only_the_job_that_publishes_may_write_packages_and_it_runs_on_a_tag_after_all_others():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert workflow["permissions"] == {"contents": "read"}
    assert {name: job["permissions"] for name, job in JOBS.items() if "permissions" in job} == {"publish": {"packages": "write"}}
    assert sorted(JOBS["publish"]["needs"]) == sorted(JOBS.keys() - {"publish"}) == ["images", "test"]
    assert JOBS["publish"]["if"] == "startsWith(github.ref, 'refs/tags/v')"
    assert [name for name, job in JOBS.items() if "secrets." in str(job)] == ["publish"]
    assert "checkout" not in str(JOBS["publish"]), "it would build what was not tested"


def test_what_is_published_is_the_file_that_was_tested():
    kept, fetched = ([step for step in JOBS[job]["steps"] if f"{action}-artifact@" in step.get("uses", "")]
                     for job, action in (("images", "upload"), ("publish", "download")))
    assert kept[0]["with"]["name"] == fetched[0]["with"]["name"] and len(kept) == len(fetched) == 1
    steps = [step.get("run", "") for step in JOBS["images"]["steps"]]
    stored = next(number for number, run in enumerate(steps) if f"oci-archive:{kept[0]['with']['path']}" in run)
    assert stored > max(number for number, run in enumerate(steps) if run.startswith("make "))
    assert f"oci-archive:{kept[0]['with']['path']}" in JOBS["publish"]["steps"][-1]["run"]


def test_every_action_is_pinned_by_its_commit():
    uses = re.findall(r"uses: (\S+)(.*)", (ROOT / ".github/workflows/ci.yml").read_text())
    assert len(uses) > 4
    assert [action for action, version in uses if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action)
            or not re.fullmatch(r"  # v\d+\.\d+\.\d+", version)] == []


@pytest.mark.parametrize(("option", "status"), [([], 0), (["--none-skipped"], 1)])
def test_a_ring_of_tests_that_were_all_skipped_has_not_passed(option, status):
    found = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/image/test_pull.py", *option],
                           cwd=ROOT, env={"PATH": ""}, capture_output=True, text=True, check=False, timeout=60)
    assert (found.returncode, "4 skipped" in found.stdout) == (status, True), found.stdout
    # GSM8K is lent to a machine, not in the repository: without it the first two cannot be complete.
    rings = re.findall(r'^ring .* make test(.*)$', (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert len(rings) == 7 and all(ring.endswith(('--none-skipped"', '$complete"')) for ring in rings)
    assert "complete=${GSM8K_DIR:+--none-skipped}" in (ROOT / ".ci/run").read_text()
