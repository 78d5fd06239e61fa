"""The image as a product: each test runs in the SIF and in the OCI image."""

import json
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

import pytest

from bridge.door import TOOLS
from bridge.errors import sha256
from bridge.stages.table import STAGES
from door import ROOT

# What the environment inside may hold besides what the recipes set and what Apptainer and a shell set themselves.
NAMES_INSIDE = {"APPTAINER_APPNAME", "APPTAINER_BIND", "APPTAINER_COMMAND", "APPTAINER_CONTAINER", "APPTAINER_ENVIRONMENT",
                "APPTAINER_NAME", "SINGULARITY_BIND", "SINGULARITY_COMMAND", "SINGULARITY_CONTAINER",
                "SINGULARITY_ENVIRONMENT", "SINGULARITY_NAME", "HOME", "HOSTNAME", "LD_LIBRARY_PATH", "LANG", "PATH",
                "PROMPT_COMMAND", "PS1", "PWD", "PYTHONDONTWRITEBYTECODE", "PYTHONHOME", "PYTHONNOUSERSITE", "PYTHONPATH",
                "SHLVL", "TERM", "USER",
                "USER_PATH", "_"}
# .ci/run builds the images with these in the environment.
PLANTED = {"HF_TOKEN": "hf_plantedForTheImageTests", "WANDB_API_KEY": "plantedForTheImageTestsToo"}
STRANGER = 4242


def report(image, work_dir, **options) -> dict:
    """What `bridge check --json` reports: the results by their names."""
    found = image.run("check", "--json", binds={work_dir: work_dir}, env={"WORK_DIR": str(work_dir), **options.pop("env", {})},
                      **options)
    parsed = json.loads(found.output[found.output.index("{\n"):found.output.rindex("\n}") + 2])
    assert found.warnings() == []
    return {result["check"]: result for result in parsed["results"]}


def failures(results: dict) -> list[str]:
    return [f"{check}: {result['seen']}" for check, result in results.items() if result["status"] == "FAIL"]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> tuple[dict[str, str], str]:
    """What a person's environment may hold: a broken torch in two places, conda, libraries. And that person's home."""
    home = tmp_path_factory.mktemp("home")
    for folder in (home / "modules", home / ".local/lib/python3.11/site-packages", home / "lib"):
        folder.mkdir(parents=True)
        (folder / "torch.py").write_text("raise SystemExit('a torch from outside the image')\n")
        (folder / "libnccl.so.2").write_text("no library")
    env = {"PYTHONPATH": str(home / "modules"), "PYTHONHOME": str(home), "LD_LIBRARY_PATH": str(home / "lib"),
           "CONDA_PREFIX": str(home), "CONDA_DEFAULT_ENV": "base", "VIRTUAL_ENV": str(home),
           "PYTHONUSERBASE": str(home / ".local")}
    return env, home


def test_check_passes_whatever_the_hosts_environment_holds(image, hostile, tmp_path):
    host_env, home = hostile
    host_env = {**host_env, "PATH": f"{home}:{image.path if image.name == 'sif' else os.environ['PATH']}"}
    results = report(image, tmp_path, host_env=host_env, home=home)
    assert failures(results) == []
    assert results["nccl of torch"]["seen"].startswith("2.22.3 (/opt/venv/")
    assert results["modules from outside"]["seen"].startswith("none of ")
    assert results["InfiniBand libraries"]["status"] == results["flash-attn"]["status"] == results["image"]["status"] == "ok"


def test_a_user_whom_the_image_does_not_know_passes_the_check(image):
    if image.name == "sif" and os.getuid() != 0:
        pytest.skip("only root can start Apptainer as another user; whoever else calls it is one that the image does not know")
    # pytest's own folders are closed to others.
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        home = Path(folder) / "home"
        home.mkdir()
        for path in (home, home.parent):
            path.chmod(0o777)
        results = report(image, home.parent, user=STRANGER, home=home, env={"USER": str(STRANGER)})
    assert failures(results) == []
    assert "user" not in results, "it ran as root"


def test_arguments_arrive_whole(image):
    arguments = ["a b", "c'd", 'e"f', "g=[1,2]", "h={i: $HOME}", "*", "j\nk", "\\l", "Zürich 東京"]
    printed = image.execute("/opt/venv/bin/python", "-c", "import json, sys; print(json.dumps(sys.argv[1:]))", *arguments)
    assert json.loads(printed.checked()) == arguments


def test_arguments_arrive_whole_through_the_door(image, tmp_path):
    # The door names what it does not know, as it came.
    words = ["x=[1, 'a b']", 'y="$HOME *"']
    found = image.run("data", *words, binds={tmp_path: tmp_path}, env={"WORK_DIR": str(tmp_path)})
    assert found.status == 2
    assert f"got {' '.join(words)}." in found.output


def test_the_door_without_a_word_shows_the_stages(image):
    shown = image.run().output if image.name == "sif" else image.run(*image.config["Cmd"]).output
    assert [stage for stage in (*STAGES, *TOOLS) if not re.search(rf"^  {stage} ", shown, re.MULTILINE)] == []


def test_stages_write_nothing_into_the_image(image, tmp_path):
    # Apptainer's root is read-only; in the other, nothing may be younger than the file that is made first.
    first, written = tmp_path / "first", "touch /opt/bridge/written"
    if not image.read_only:
        written += f"; find / -xdev -newer {first} -type f ! -path '/proc/*' ! -path '/sys/*' ! -path '/tmp/*'"
    found = image.execute("sh", "-c", f"date > {first} && sleep 1 && (bridge data && bridge model) > /dev/null && {written}",
                          binds={tmp_path: tmp_path},
                          env={"WORK_DIR": str(tmp_path), "MODEL": "tiny", "DATA_SOURCE": "builtin"})
    if image.read_only:
        assert "/opt/bridge/written': Read-only file system" in found.output
    else:
        assert [line for line in found.output.splitlines() if line.startswith("/")] == ["/opt/bridge/written"]
    assert (tmp_path / "data/gsm8k/train.parquet").is_file() and (tmp_path / "models/tiny/config.json").is_file()


def test_an_edited_configuration_of_the_checkout_takes_effect(image, tmp_path):
    work_dir, configs = tmp_path / "work", tmp_path / "configs"
    work_dir.mkdir()
    shutil.copytree(ROOT / "configs", configs)
    for stage in ("sft", "ppo"):
        shutil.copy(configs / f"profile/{stage}/tiny.yaml", configs / f"profile/{stage}/mine.yaml")
    profile = configs / "profile/sft/mine.yaml"
    env = {"WORK_DIR": str(work_dir), "MODEL": "tiny", "DATA_SOURCE": "builtin", "PROFILE": "mine", "GPUS": "2"}
    prepare = {"binds": {work_dir: work_dir}, "env": {**env, "PROFILE": "tiny"}}
    image.run("data", **prepare).checked()
    image.run("model", **prepare).checked()

    def dry_run(binds) -> tuple[int, str]:
        found = image.run("sft", "--dry-run", binds={work_dir: work_dir, **binds}, env=env)
        return found.status, found.output

    status, output = dry_run({})
    assert status == 2 and "PROFILE='mine' is unknown" in output
    status, output = dry_run({configs: "/opt/bridge/configs"})
    assert status == 0 and "profile/sft=mine" in output
    profile.write_text(profile.read_text().replace("train_batch_size: 16", "train_batch_size: 12"))
    assert "train_batch_size=12 / 2) do not divide" in dry_run({configs: "/opt/bridge/configs"})[1]


def test_no_secret_and_nothing_else_of_the_host_is_in_the_image(image):
    inside = image.alone("env").checked()
    names = {line.split("=")[0] for line in inside.splitlines() if re.match(r"[A-Za-z_]+=", line)}
    assert names - NAMES_INSIDE == set()
    secrets = [*PLANTED.values(), *(value for name, value in os.environ.items()
                                    if re.search("TOKEN|SECRET|PASSWORD|API_KEY", name) and len(value) > 7)]
    patterns = [word for secret in secrets for word in ("-e", secret)]
    found = image.alone("grep", "-rlF", *patterns, "/etc", "/home", "/opt/bridge", "/root", "/scif", "/usr/local", "/var")
    assert (found.status, found.output) == (1, "")
    # Of /opt/venv what an install writes: records, scripts, paths, byte code. Its 8 GB of libraries come from the lock's hashes.
    found = image.alone("grep", "-rlF", *patterns, "--exclude=*.so", "--exclude=*.so.*", "--exclude=*.a", "/opt/venv")
    assert (found.status, found.output) == (1, "")
    # What the build was lent, and what it leaves lying: certificates, a wheel, caches, lists, the checkout.
    left = image.alone("find", "/opt/bridge/scripts/image", "/mnt", "/root", "/home", "/opt/uv", "/opt/home", "/var/log",
                       "/var/lib/apt/lists", "/var/cache/apt/archives", "/opt/bridge/.env", "/opt/bridge/.git", "-type", "f")
    found = {line for line in left.output.splitlines() if line.startswith("/") and not line.endswith("No such file or directory")}
    assert found <= {
        "/opt/bridge/scripts/image/install.sh", "/root/.bashrc", "/root/.profile", "/var/cache/apt/archives/lock"}


def test_the_manifest_says_what_is_in_the_image(image):
    made = json.loads(image.execute("cat", "/opt/bridge/manifest.json").checked())
    assert made["requirements_lock_sha256"] == sha256(ROOT / "requirements.lock")
    assert made["python"]["torch"] == "2.6.0" and made["python"]["flash-attn"] == "2.7.4.post1"
    installed = image.execute("dpkg-query", "--show", "--showformat", "${Package} ${Version}\n").checked()
    assert made["debian"] == dict(line.split() for line in installed.splitlines())
    # What the lock does not pin.
    assert re.fullmatch(r"[^/@]+(/[^@]+)?@sha256:[0-9a-f]{64}", made["base"])
    assert re.fullmatch(r"flash_attn-2\.7\.4\.post1\S*\.whl@sha256:[0-9a-f]{64}", made["flash_attn_wheel"])
    assert image.labels()["org.opencontainers.image.revision"] == (made["recipe_commit"] or "")


def test_every_file_below_opt_can_be_read_by_any_user(image):
    found = image.execute("find", "/opt", "(", "-type", "f", "!", "-perm", "-o=r", "-o", "-type", "d", "!", "-perm", "-o=rx", ")")
    assert found.checked() == ""


def test_no_file_is_stored_in_two_layers(oci):
    # Whoever touches a file of a layer below stores it again: a chmod of all doubles the image.
    sizes = oci.alone("find", "/", "-xdev", "-type", "f", "!", "-path", "/proc/*", "!", "-path", "/sys/*", "-printf", "%s\\n")
    assert oci.stored() < 1.03 * sum(map(int, sizes.checked().split()))


SHARD = """
import torch
from pathlib import Path
from bridge.runs import checkpoints
file = Path("shard.pt")
torch.save({"small": torch.zeros(3), "large": torch.zeros(80_000_000)}, file)
whole = checkpoints.is_whole(file)
with open(file, "r+b") as stream:
    stream.truncate(file.stat().st_size - 1)
print(whole, checkpoints.is_whole(file))
"""


def test_a_shard_is_judged_right_by_the_images_own_python(image, tmp_path):
    # Debian's zipfile has checks of its own: twice it took large shards (above 64 MB, then above 256 MB) for cut short, since
    # their end alone was read.
    (tmp_path / "shard.py").write_text(SHARD)
    found = image.execute("sh", "-c", f"cd {tmp_path} && /opt/venv/bin/python shard.py", binds={tmp_path: tmp_path})
    assert found.checked().strip().splitlines()[-1] == "True False"


def test_what_was_made_smaller_still_works(image, tmp_path):
    # Triton compiles a kernel for Hopper without a GPU; llvmlite compiles one for this machine.
    (tmp_path / "kernel.py").write_text(
        "import triton, triton.language as tl, numba\n"
        "from triton.backends.compiler import GPUTarget\n"
        "@triton.jit\n"
        "def add(x, y, n, SIZE: tl.constexpr):\n"
        "    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)\n"
        "    tl.store(y + at, tl.load(x + at, mask=at < n) + 1, mask=at < n)\n"
        "source = triton.compiler.ASTSource(add, {'x': '*fp32', 'y': '*fp32', 'n': 'i32'}, {'SIZE': 128})\n"
        "print(sorted(triton.compile(source, target=GPUTarget('cuda', 90, 32)).asm))\n"
        "print(numba.njit(lambda x: x + 1)(41))\n")
    found = image.execute("/opt/venv/bin/python", str(tmp_path / "kernel.py"), binds={tmp_path: tmp_path},
                          env={"TRITON_CACHE_DIR": str(tmp_path / "cache"), "NUMBA_CACHE_DIR": str(tmp_path / "cache")})
    assert "'cubin'" in found.checked() and "\n42" in found.output


def test_a_container_starts_at_once(sif):
    # A stage of the tutorial runs for minutes at least: 3 s are 3 % of 100 s.
    started = time.monotonic()
    sif.execute("true").checked()
    assert time.monotonic() - started < 3


def test_apptainer_has_an_app_for_every_stage(sif):
    apps = sif.execute("ls", "/scif/apps").checked().split()
    assert sorted(apps) == sorted([*STAGES, *TOOLS])
