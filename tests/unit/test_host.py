"""What runs on the host: Makefile, .env and its reader, and the call of the container engine.

The real scripts are driven with bash; only the engine is faked, by a program of that name on PATH that writes down its
arguments and its environment.
"""

import json
import os
import pwd
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONTAINER = ROOT / "scripts/host/container.sh"
READ = f"source {ROOT}/scripts/host/read_env.sh; read_settings; exec env -0"
RECORDER = f"""#!{sys.executable}
import json, os, sys
from pathlib import Path
if sys.argv[1:3] == ["image", "inspect"]:
    print("sha256:0123")
    sys.exit(int(os.environ.get("FAKE_NO_IMAGE", "0")))
if sys.argv[1:] == ["buildcfg"]:
    print("PREFIX=/usr", "LIBEXECDIR=" + os.environ.get("FAKE_LIBEXEC", "/nowhere"), sep="\\n")
    sys.exit()
if sys.argv[1:] == ["info"]:
    sys.exit(int(os.environ.get("FAKE_NO_DAEMON", "0")))
Path(os.environ["FAKE_RECORD"]).write_text(json.dumps({{
    "argv": sys.argv, "env": dict(os.environ),
    "work_dir_is_there": any(os.path.isdir(os.environ.get(f"{{prefix}}WORK_DIR", ""))
                             for prefix in ("", "APPTAINERENV_", "SINGULARITYENV_"))}}))
"""
TARGETS = ("help", "venv", "lock", "data", "model", "sft", "ppo", "merge", "upload", "check", "rehearse", "test", "lint",
           "image", "oci", "shell", "bench", "accept", "eval",
           "pull", "submit", "follow", "report")


class Host:
    """A home, a place to stand and a PATH of its own, with the engines that a test puts there."""

    def __init__(self, folder: Path):
        self.bin, self.home, self.cwd = folder / "bin", folder / "home", folder / "here"
        for made in (self.bin, self.home, self.cwd):
            made.mkdir()
        # What the scripts call, and no engine of this machine.
        for tool in ("bash", "sed", "env", "realpath", "id", "git", "mkdir", "dirname", "head", "make", "awk", "sha256sum",
                     "cat", "sh", "stat", "rmdir", "rm", "mktemp", "du", "timeout", "unshare", "true"):
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.record = folder / "record.json"
        self.image = folder / "bridge.sif"
        self.image.write_text("")
        self.env_file = folder / "settings.env"
        self.env_file.write_text("")

    def engine(self, name: str) -> None:
        """Put a fake engine on PATH."""
        (self.bin / name).write_text(RECORDER)
        (self.bin / name).chmod(0o755)

    def run(self, *command: str | Path, **env: str) -> subprocess.CompletedProcess:
        """Run a command as a person would, standing in cwd."""
        clean = {"PATH": str(self.bin), "HOME": str(self.home), "USER": "ada", "ENV_FILE": str(self.env_file),
                 "FAKE_RECORD": str(self.record), "LANG": "C.UTF-8"}
        return subprocess.run([*map(str, command)], env={**clean, **env}, cwd=self.cwd, capture_output=True, text=True,
                              check=False, timeout=60)

    def container(self, *arguments: str, **env: str) -> subprocess.CompletedProcess:
        """Run container.sh with the empty image of this host, unless IMAGE or ENGINE say otherwise."""
        if env.get("ENGINE", "apptainer") in ("apptainer", "singularity"):
            env = {"IMAGE": str(self.image), **env}
        return self.run(CONTAINER, *arguments, **env)

    def seen(self) -> dict:
        """What the fake engine was given: {"argv": [...], "env": {...}, "work_dir_is_there": ...}."""
        return json.loads(self.record.read_text())

    def mounts(self) -> dict[str, str]:
        """Destination -> source (with ",ro" if so) of the mounts in the engine's arguments."""
        import csv

        argv, found = self.seen()["argv"], {}
        for option, value in zip(argv, argv[1:], strict=False):
            if option == "--mount":
                [fields] = csv.reader([value])
                named = dict(field.split("=", 1) for field in fields if "=" in field)
                found[named["destination"]] = named["source"] + (",ro" if "ro" in fields else "")
        return found

    def settings(self, text: str | bytes, **env: str) -> dict[str, str]:
        """What the environment is after .env with this text was read."""
        self.env_file.write_bytes(text.encode() if isinstance(text, str) else text)
        result = self.run("bash", "-euo", "pipefail", "-c", READ, **env)
        assert result.returncode == 0, result.stderr
        return dict(entry.split("=", 1) for entry in result.stdout.split("\0") if entry)

    def refusal(self, text: str | bytes, **env: str) -> str:
        """What is said to a .env with this text, which must be refused with 2."""
        self.env_file.write_bytes(text.encode() if isinstance(text, str) else text)
        result = self.run("bash", "-euo", "pipefail", "-c", READ, **env)
        assert (result.returncode, result.stdout) == (2, "")
        return result.stderr


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.mark.parametrize(("line", "value"), [
    ("RUN=a", "a"),
    ("export RUN=a", "a"),
    ("  export   RUN=a", "a"),
    ('RUN="quoted"', "quoted"),
    ("RUN='quoted'", "quoted"),
    ('RUN="it\'s"', "it's"),
    ("RUN='say \"x\"'", 'say "x"'),
    ("RUN=  two  words  ", "two  words"),
    ('RUN="  kept  "', "  kept  "),
    ("RUN=a#b", "a#b"),
    ('RUN="a # b"', "a # b"),
    ("RUN=a=b=c", "a=b=c"),
    ("RUN=", ""),
    ('RUN=""', ""),
    ("RUN=back\\slash", "back\\slash"),
    ('RUN={"a": 1}', '{"a": 1}'),
    ("RUN=日本語", "日本語"),
    ("RUN=a\r\n", "a"),
    ("\ufeffRUN=a", "a"),
    ("\n# RUN=no\n   # no\n\t\nRUN=a\n\n", "a"),
    ("RUN=a\nRUN=a", "a"),
])
def test_env_file_takes_what_people_paste(host, line, value):
    assert host.settings(line)["RUN"] == value


def test_env_file_may_end_without_a_newline_and_have_many_lines(host):
    env = host.settings("RUN=a\r\nGPUS=8\r\nNCCL_DEBUG=INFO")
    assert (env["RUN"], env["GPUS"], env["NCCL_DEBUG"]) == ("a", "8", "INFO")


@pytest.mark.parametrize("line", ["WORK_DIR=~/work", 'WORK_DIR="~/work"', "WORK_DIR='~/work'"])
def test_a_leading_tilde_is_the_home_folder(host, line):
    assert host.settings(line)["WORK_DIR"] == f"{host.home}/work"


@pytest.mark.parametrize(("line", "word"), [
    ("RUN=$HOME", "$"),
    ("RUN='$HOME'", "$"),
    ("RUN=`id`", "backquote"),
    ('RUN="a', "quotes"),
    ("RUN=a'", "quotes"),
    ("RUN=it's", "quotes"),
    ("RUN='", "quotes"),
    ('RUN="a" "b"', "quotes"),
    ('RUN="a" # why', "quotes"),
    ("RUN='a\"", "quotes"),
    ("WANDB_ENTITY=YOU_TEAM", "placeholder"),
    ('export WANDB_ENTITY="YOU_TEAM_ENTITY_NAME"', "placeholder"),
    ("HF_REPO=YOU_HF_TEAM/YOU_HF_PROJECT_NAME", "placeholder"),
    ("RUN =a", "NAME=value"),
    ("RUN", "NAME=value"),
    ("8RUN=a", "NAME=value"),
    ("unset ROCR_VISIBLE_DEVICES", "NAME=value"),
    ("GPU=8", "GPUS"),
    ("work_dir=/data", "WORK_DIR"),
    ("PATH=/bin", "PATH"),
    ("LD_PRELOAD=/x.so", "LD_PRELOAD"),
    ("WANDB_PROJECT_NAME=x", "WANDB_PROJECT?"),
    ("WANDB_RUN_NAME=x", "RUN?"),
    ("RUN=a\nRUN=b", "another value"),
    ("RUN=a\rGPUS=8\r", "control character"),
    ("# a comment\rRUN=a", "control character"),
    ("RUN=a\x1b[0m", "control character"),
    ("RUN=a\0b", "NUL byte"),
    ("RUN=a\n\0", "NUL byte"),
])
def test_env_file_mistakes_are_refused_with_their_line(host, line, word):
    said = host.refusal("# first line\n" + line)
    assert word in said
    assert f"line {2 + line.count(chr(10))}" in said


def test_all_mistakes_of_an_env_file_are_named_at_once(host):
    said = host.refusal("GPU=8\nRUN=$X\nHF_REPO=YOU_HF_TEAM/x\nrun\n", MAKE_NAMES="TPS")
    assert [word for word in ("line 1", "line 2", "line 3", "line 4", "TPS") if word not in said] == []


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "VLLM_API_KEY", "HF_PASSWORD"])
def test_a_secret_on_makes_command_line_is_refused_without_its_value(host, name):
    result = host.run("make", "-C", ROOT, "ppo", f"{name}=hf_Abc123", f"ENV_FILE={host.env_file}")
    assert result.returncode != 0 and f"make: {name} is a secret, which ps shows to all. Put it into .env." in result.stderr
    assert "hf_Abc123" not in result.stdout + result.stderr


def test_no_value_of_an_env_file_is_printed(host):
    said = host.refusal("HF_TOKEN=$hf_Abc123\nWANDB_API_KEY='hf_Abc123\nhf_Abc123\nHF_TOKEN hf_Abc123\n")
    assert "hf_Abc123" not in said
    assert "hf_Abc123" not in host.refusal("HF_TOKEN=one_hf_Abc123\nHF_TOKEN=two_hf_Abc123")


@pytest.mark.parametrize(("mode", "name", "warned"), [
    (0o600, "HF_TOKEN", False), (0o400, "HF_TOKEN", False), (0o644, "HF_TOKEN", True), (0o640, "WANDB_API_KEY", True),
    (0o604, "HF_TOKEN", True), (0o644, "RUN", False), (0o644, "#HF_TOKEN", False)])
def test_a_token_that_others_can_read_is_warned_of_without_being_shown(host, mode, name, warned):
    host.env_file.write_text(f"{name}=hf_Abc123\n")
    host.env_file.chmod(mode)
    result = host.run("bash", "-euo", "pipefail", "-c", READ)
    assert result.returncode == 0
    assert (f"others can read it. Keep it to yourself: chmod 600 {host.env_file}" in result.stderr) == warned
    assert "hf_Abc123" not in result.stderr


def test_an_empty_token_is_no_secret(host):
    host.env_file.write_text("HF_TOKEN=\n")
    assert host.run("bash", "-euo", "pipefail", "-c", READ).stderr == ""


def test_a_hash_inside_a_value_is_kept_and_said(host):
    host.env_file.write_text("RUN=a # b\n")
    result = host.run("bash", "-euo", "pipefail", "-c", READ)
    assert "RUN=a # b" in result.stdout.split("\0")
    assert "line 1" in result.stderr


def test_the_real_environment_wins_over_the_env_file_even_when_empty(host):
    env = host.settings("RUN=file\nGPUS=8\nTP=2", RUN="real", GPUS="")
    assert (env["RUN"], env["GPUS"], env["TP"]) == ("real", "", "2")


def test_an_env_file_that_was_named_must_be_there(host):
    result = host.container("sft", ENV_FILE="/nowhere/x.env", ENGINE="none")
    assert result.returncode == 2
    assert "/nowhere/x.env" in result.stderr


@pytest.mark.parametrize(("typo", "meant"), [("GPU=8", "GPUS"), ("WORKDIR=x", "WORK_DIR"), ("workdir=x", "WORK_DIR")])
def test_make_refuses_a_mistyped_setting(host, typo, meant):
    result = host.run("make", "-C", ROOT, "ppo", typo)
    assert result.returncode != 0
    assert f"{typo.split('=')[0]} is not a setting. Did you mean {meant}?" in result.stderr
    assert ".env.example" in result.stderr


def test_make_hands_settings_and_arguments_to_the_container(host):
    host.engine("apptainer")
    result = host.run("make", "-C", ROOT, "ppo", "GPUS=8", f"WORK_DIR={host.home}/work", f"IMAGE={host.image}",
                      f"ENV_FILE={host.env_file}", "ARGS=trainer.total_epochs=1 data.x=[\\'a\\'] '+y=\"b c\"'")
    assert result.returncode == 0, result.stderr
    assert host.seen()["argv"][-4:] == ["ppo", "trainer.total_epochs=1", "data.x=['a']", '+y="b c"']
    assert host.seen()["env"]["APPTAINERENV_GPUS"] == "8"


@pytest.mark.parametrize("target", TARGETS)
def test_every_make_target_is_one_command(host, target):
    # venv is what test and lint need first.
    result = host.run("make", "-n", "-C", ROOT, "--no-print-directory", target)
    assert result.returncode == 0, result.stderr
    commands = [line for line in result.stdout.splitlines() if line and line != "scripts/host/venv.sh"]
    assert len(commands) == (0 if target == "venv" else 1)


def test_make_help_lists_every_target_and_is_what_make_alone_prints(host):
    shown = host.run("make", "-C", ROOT, "--no-print-directory").stdout
    assert shown == host.run("make", "-C", ROOT, "--no-print-directory", "help").stdout
    assert set(re.findall(r"^  make (\w+) +\w", shown, re.MULTILINE)) == set(TARGETS)


@pytest.mark.parametrize("arguments", [
    ["data.prompt_dict_keys=['question']", "+data.response_dict_keys=['answer']"],
    ['+a="two words"', "b={c: 1, d: [2, 3]}", "", "$HOME", "*", "~x"],
    ["--dry-run", "x='日本 語'"],
])
@pytest.mark.parametrize("engine", ["apptainer", "singularity", "podman", "docker"])
def test_arguments_arrive_whole(host, engine, arguments):
    host.engine(engine)
    result = host.container("ppo", *arguments, ENGINE=engine)
    assert result.returncode == 0, result.stderr
    argv = host.seen()["argv"]
    assert argv[-len(arguments) - 1:] == ["ppo", *arguments]


def test_the_command_is_shown_and_can_be_pasted(host):
    host.engine("apptainer")
    result = host.container("ppo", "a=['b c']")
    [shown] = [line for line in result.stderr.splitlines() if line.startswith("+ ")]
    words = host.run("bash", "-c", f"printf '%s\\0' {shown[2:]}").stdout.split("\0")[:-1]
    assert words[1:] == host.seen()["argv"][1:]


@pytest.mark.parametrize("engine", ["apptainer", "singularity", "podman", "docker"])
def test_secrets_are_in_the_environment_and_nowhere_else(host, engine):
    host.engine(engine)
    host.env_file.write_text("HF_TOKEN=hf_Abc123\n")
    result = host.container("upload", ENGINE=engine, WANDB_API_KEY="wb_Abc123")
    seen = host.seen()
    prefix = {"apptainer": "APPTAINERENV_", "singularity": "SINGULARITYENV_"}.get(engine, "")
    assert (seen["env"][prefix + "HF_TOKEN"], seen["env"][prefix + "WANDB_API_KEY"]) == ("hf_Abc123", "wb_Abc123")
    assert "Abc123" not in " ".join(seen["argv"]) + result.stdout + result.stderr
    if not prefix:
        assert [seen["argv"][i + 1] for i, word in enumerate(seen["argv"]) if word == "--env"].count("HF_TOKEN") == 1


@pytest.mark.parametrize("engine", ["apptainer", "podman"])
def test_only_known_names_go_into_the_container(host, engine):
    host.engine(engine)
    host.container("ppo", ENGINE=engine, NCCL_DEBUG="INFO", SLURM_JOB_ID="7", PYTHONPATH="/host", LD_LIBRARY_PATH="/host",
                   ROCR_VISIBLE_DEVICES="0", AWS_SECRET="x", WANDB_PROJECT_NAME="x")
    seen = host.seen()
    if engine == "apptainer":
        assert "--cleanenv" in seen["argv"]
        passed = {name.removeprefix("APPTAINERENV_") for name in seen["env"] if name.startswith("APPTAINERENV_")}
    else:
        passed = {seen["argv"][i + 1].split("=")[0] for i, word in enumerate(seen["argv"]) if word == "--env"}
    assert {"NCCL_DEBUG", "SLURM_JOB_ID", "WORK_DIR", "USER"} <= passed
    assert passed.isdisjoint({"PYTHONPATH", "LD_LIBRARY_PATH", "ROCR_VISIBLE_DEVICES", "AWS_SECRET", "PATH",
                              "WANDB_PROJECT_NAME", "LANG"})


@pytest.mark.parametrize("engine", ["apptainer", "singularity", "podman", "docker"])
@pytest.mark.parametrize("name", ["plain", "two words", "a,b", "a:b", 'a"b', "日本語 데이터"])
def test_work_dir_is_at_the_same_path_inside(host, engine, name):
    host.engine(engine)
    result = host.container("check", ENGINE=engine, WORK_DIR=f"{host.home}/{name}")
    assert result.returncode == 0, result.stderr
    assert host.mounts()[f"{host.home}/{name}"] == f"{host.home}/{name}"
    assert host.mounts()["/opt/bridge/configs"] == f"{ROOT}/configs,ro"
    # While the engine runs; it wrote nothing, so nothing is left.
    assert host.seen()["work_dir_is_there"] and list(host.home.iterdir()) == []


def test_work_dir_is_work_below_where_the_user_stands_unless_given(host):
    host.engine("apptainer")
    host.container("check")
    assert host.seen()["env"]["APPTAINERENV_WORK_DIR"] == f"{host.cwd}/work"
    assert 'given("WORK_DIR", "work")' in (ROOT / "scripts/bridge/settings.py").read_text()


def test_relative_paths_are_meant_from_where_the_user_stands(host):
    host.engine("apptainer")
    for name in ("model", "gsm8k", "step", "certificates"):
        (host.cwd / name).mkdir()
    host.container("check", MODEL="./model", DATA_SOURCE="gsm8k", CKPT="../here/step", WORK_DIR="w",
                   REQUESTS_CA_BUNDLE="certificates")
    env, mounts = host.seen()["env"], host.mounts()
    for name, path in (("MODEL", "model"), ("DATA_SOURCE", "gsm8k"), ("CKPT", "step"), ("REQUESTS_CA_BUNDLE", "certificates")):
        assert env[f"APPTAINERENV_{name}"] == f"{host.cwd}/{path}"
        assert mounts[f"{host.cwd}/{path}"] == f"{host.cwd}/{path},ro"
    assert env["APPTAINERENV_WORK_DIR"] == f"{host.cwd}/w"


def test_a_file_of_data_and_the_file_of_a_reward_are_shown_in_the_container(host):
    host.engine("apptainer")
    for name in ("mine.csv", "judge.py"):
        (host.cwd / name).touch()
    host.container("ppo", DATA_SOURCE="mine.csv", REWARD="judge.py:digits", QUESTION="ask", ANSWER="say")
    env, mounts = host.seen()["env"], host.mounts()
    assert env["APPTAINERENV_DATA_SOURCE"] == f"{host.cwd}/mine.csv"
    assert env["APPTAINERENV_REWARD"] == f"{host.cwd}/judge.py:digits"
    assert (env["APPTAINERENV_QUESTION"], env["APPTAINERENV_ANSWER"]) == ("ask", "say")
    for name in ("mine.csv", "judge.py"):
        assert mounts[f"{host.cwd}/{name}"] == f"{host.cwd}/{name},ro"


def test_a_name_on_the_hub_is_left_alone_even_beside_a_folder_of_that_name(host):
    host.engine("apptainer")
    for name in ("smollm2", "hub"):
        (host.cwd / name).mkdir()
    host.container("check", MODEL="smollm2", DATA_SOURCE="hub")
    env = host.seen()["env"]
    assert (env["APPTAINERENV_MODEL"], env["APPTAINERENV_DATA_SOURCE"]) == ("smollm2", "hub")
    assert set(host.mounts()) == {f"{host.cwd}/work", "/opt/bridge/configs"}


def test_a_path_that_is_named_twice_is_mounted_once(host):
    host.engine("apptainer")
    bundle = host.home / "own.crt"
    bundle.write_text("")
    host.container("data", SSL_CERT_FILE=str(bundle), REQUESTS_CA_BUNDLE=str(bundle))
    assert " ".join(host.seen()["argv"]).count(f"destination={bundle}") == 1


def test_what_is_inside_work_dir_gets_no_mount_of_its_own(host):
    host.engine("apptainer")
    (host.cwd / "work/runs/a").mkdir(parents=True)
    host.container("merge", CKPT="work/runs/a")
    assert set(host.mounts()) == {f"{host.cwd}/work", "/opt/bridge/configs"}


@pytest.mark.parametrize("engine", ["apptainer", "docker"])
def test_existing_logins_are_found_inside(host, engine):
    host.engine(engine)
    token, netrc = host.home / ".cache/huggingface/token", host.home / ".netrc"
    token.parent.mkdir(parents=True)
    token.write_text("hf_Abc123")
    netrc.write_text("machine x password y")
    host.container("upload", ENGINE=engine)
    prefix = "APPTAINERENV_" if engine == "apptainer" else ""
    assert host.seen()["env"][prefix + "HF_TOKEN_PATH"] == str(token)
    assert host.seen()["env"][prefix + "NETRC"] == str(netrc)
    assert {host.mounts()[str(path)] for path in (token, netrc)} == {f"{token},ro", f"{netrc},ro"}


@pytest.mark.parametrize("engine", ["apptainer", "none"])
def test_a_work_dir_whose_parent_is_missing_is_refused_and_nothing_written(host, engine):
    host.engine("apptainer")
    result = host.container("check", ENGINE=engine, WORK_DIR=f"{host.home}/missing/work")
    assert result.returncode == 2
    assert "WORK_DIR" in result.stderr and f"{host.home}/missing" in result.stderr
    assert list(host.home.iterdir()) == []


@pytest.mark.parametrize("engine", ["apptainer", "none"])
def test_a_work_dir_that_is_a_dangling_link_is_refused(host, engine):
    host.engine("apptainer")
    (host.home / "link").symlink_to(host.home / "gone")
    result = host.container("data", ENGINE=engine, WORK_DIR=f"{host.home}/link")
    assert result.returncode == 2 and "symbolic link to what is not there" in result.stderr
    assert not host.record.exists() and not (host.home / "gone").exists()


@pytest.mark.parametrize("engine", ["apptainer", "singularity", "podman", "docker"])
def test_a_refused_command_leaves_no_work_dir_behind_and_one_with_something_in_it_stays(host, engine):
    work = host.home / "two words"
    fake = ('#!/bin/sh\n[ "$1 $2" != "image inspect" ] || exit 0\n'
            'WORK_DIR=${APPTAINERENV_WORK_DIR:-${SINGULARITYENV_WORK_DIR:-$WORK_DIR}}\n')
    wait, remove = f"{shutil.which('sleep')} 0.3", shutil.which("rm")
    # The third finds the folder there: empty or not, it is not this call's to remove.
    for script, status, left in ((f'{wait}; test -d "$WORK_DIR" && exit 2', 2, False), (': > "$WORK_DIR/x"; exit 2', 2, True),
                                 (f'{remove} "$WORK_DIR/x"', 0, True)):
        (host.bin / engine).write_text(fake + script + "\n")
        (host.bin / engine).chmod(0o755)
        result = host.container("data", ENGINE=engine, WORK_DIR=str(work))
        assert (result.returncode, work.exists()) == (status, left), result.stderr


def test_without_home_the_systems_word_for_it_counts(host):
    host.env_file.write_text("WORK_DIR=~/no-such-folder/x\n")
    result = host.run("env", "-u", "HOME", CONTAINER, "data", ENGINE="none")
    assert result.returncode == 2 and f"WORK_DIR={Path(pwd.getpwuid(os.getuid()).pw_dir)}/no-such-folder/x" in result.stderr


def test_a_work_dir_that_is_a_file_is_refused(host):
    (host.home / "file").write_text("")
    assert "not a folder" in host.container("check", ENGINE="none", WORK_DIR=f"{host.home}/file").stderr


@pytest.mark.parametrize(("engine", "target"), [("apptainer", "make image"), ("podman", "make oci"), ("docker", "make oci")])
def test_a_missing_image_names_the_cure(host, engine, target):
    host.engine(engine)
    result = host.container("ppo", ENGINE=engine, IMAGE=f"{host.home}/none.sif", FAKE_NO_IMAGE="1")
    assert result.returncode == 2
    assert f"{host.home}/none.sif" in result.stderr and target in result.stderr and "ENGINE=none" in result.stderr
    assert not host.record.exists() and not (host.cwd / "work").exists()


def test_an_engine_without_its_daemon_is_named_as_such(host):
    host.engine("docker")
    result = host.container("ppo", FAKE_NO_IMAGE="1", FAKE_NO_DAEMON="1")
    assert result.returncode == 2 and "docker is on PATH but does not answer" in result.stderr
    # On a cluster it is not docker that one wants.
    assert result.stderr.index("module load apptainer") < result.stderr.index("docker info")


@pytest.mark.parametrize(("engine", "word"), [("apptainer", "not on PATH"), ("dokcer", "none of apptainer"),
                                              ("", "no apptainer, singularity, podman or docker")])
def test_a_missing_engine_names_the_cure(host, engine, word):
    result = host.container("ppo", ENGINE=engine)
    assert result.returncode == 2
    assert word in result.stderr


def test_the_first_engine_on_path_is_taken(host):
    for engine in ("docker", "podman", "singularity"):
        host.engine(engine)
    host.container("ppo")
    assert host.seen()["argv"][0].endswith("/singularity")


@pytest.mark.parametrize(("engine", "flag"), [("apptainer", "--nv"), ("docker", "--gpus"), ("podman", "nvidia.com/gpu=all")])
def test_the_gpu_flag_is_given_only_where_there_is_a_gpu(host, engine, flag):
    host.engine(engine)
    if not (Path("/dev/nvidiactl").exists() or Path("/proc/driver/nvidia").exists()):
        host.container("ppo", ENGINE=engine)
        assert flag not in host.seen()["argv"]
    host.engine("nvidia-smi")
    host.container("ppo", ENGINE=engine)
    assert flag in host.seen()["argv"]


@pytest.mark.parametrize("engine", ["podman", "docker"])
def test_oci_engines_run_as_the_user_and_share_network_and_memory(host, engine):
    host.engine(engine)
    host.container("ppo", ENGINE=engine)
    argv = " ".join(host.seen()["argv"])
    assert all(words in argv for words in (f"--user {os.getuid()}:{os.getgid()}", "--network host", "--ipc host", "--rm",
                                           f"--env HOME={host.cwd}/work/cache/home"))


# A namespace in which /dev has the folder of InfiniBand's cards, and little else.
WITH_CARDS = """mount -t tmpfs none /dev && mkdir /dev/infiniband /dev/shm && ln -s /proc/self/fd /dev/fd && exec "$@" """


def in_a_namespace(*options: str) -> list[str]:
    """The start of a command that runs the rest of it in a namespace of its own; skips where that is forbidden."""
    unshare = [shutil.which("unshare"), *options]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip(f"unshare {' '.join(options)} is forbidden here")
    return unshare


@pytest.mark.parametrize("engine", ["podman", "docker"])
def test_oci_engines_get_infinibands_cards_where_there_are_any(host, engine):
    host.engine(engine)
    for tool in ("mount", "ln"):
        (host.bin / tool).symlink_to(shutil.which(tool))
    wanted = ["--device", "/dev/infiniband", "--ulimit", "memlock=-1"]
    options = ["--mount"] if os.geteuid() == 0 else ["--user", "--map-root-user", "--mount"]
    result = host.run(*in_a_namespace(*options), "sh", "-c", WITH_CARDS, "sh", CONTAINER, "ppo", ENGINE=engine)
    assert result.returncode == 0, result.stderr
    assert [word for word in host.seen()["argv"] if word in wanted] == wanted
    if not Path("/dev/infiniband").exists():
        host.container("ppo", ENGINE=engine)
        assert not set(wanted) & set(host.seen()["argv"])


# ---- what a container does not show of its host


A_USER = ("--user", "--map-user=1000", "--map-group=1000")


def host_checks(host: Host, *start: str, **env: str) -> tuple[dict[str, tuple[str, str]], subprocess.CompletedProcess]:
    """What `check` hands to the container, by its names, and how it ended. `start` starts it as somebody else."""
    result = host.run(*start, CONTAINER, "check", **{"IMAGE": str(host.image), "ENGINE": "apptainer", **env})
    assert result.returncode == 0 and result.stdout == "", result.stderr
    lines = host.seen()["env"]["APPTAINERENV_BRIDGE_HOST_CHECKS"].splitlines()
    return {name: (status, seen) for status, name, seen in (line.split("\t") for line in lines)}, result


def test_where_there_are_no_user_namespaces_it_is_said_before_the_engine_starts(host):
    host.engine("apptainer")
    # In a namespace in which the user is nobody, no other can be made.
    found, result = host_checks(host, *in_a_namespace("--user"))
    status, seen = found["user namespaces"]
    assert status == "warn" and "max_user_namespaces" in seen and "apptainer-suid" in seen
    assert f"bridge: warning: user namespaces: {seen}" in result.stderr
    assert result.stderr.index("warning: user") < result.stderr.index("\n+ ")


def test_a_good_host_has_nothing_to_say(host):
    host.engine("apptainer")
    found, result = host_checks(host, *in_a_namespace(*A_USER), IMAGE=str(host.home))
    assert found == {"user namespaces": ("ok", "there"), "home": ("ok", f"{host.home} takes files; no large cache")}
    assert "warning" not in result.stderr and list(host.home.iterdir()) == []


def test_a_setuid_apptainer_needs_no_namespaces_and_no_squashfuse(host):
    host.engine("apptainer")
    starter = host.home / "apptainer/bin/starter-suid"
    starter.parent.mkdir(parents=True)
    starter.touch()
    for mode, setuid in ((0o755, False), (0o4755, True)):
        starter.chmod(mode)
        found, result = host_checks(host, *in_a_namespace("--user"), FAKE_LIBEXEC=str(host.home))
        assert (found["user namespaces"] == ("ok", f"not needed: {starter}")) == setuid
        assert ("image mount" not in found) == ("warning" not in result.stderr) == setuid


def test_an_image_that_squashfuse_mounts_is_a_warning_with_a_folder_as_the_cure(host):
    host.engine("apptainer")
    found, _ = host_checks(host, *in_a_namespace(*A_USER))
    assert found["image mount"][0] == "warn" and f"build --sandbox /local/bridge {host.image}" in found["image mount"][1]
    # The cure works: a folder is an image.
    (host.home / "unpacked").mkdir()
    found, _ = host_checks(host, *in_a_namespace(*A_USER), IMAGE=f"{host.home}/unpacked")
    assert "image mount" not in found and f"{host.home}/unpacked" in host.seen()["argv"]


@pytest.mark.parametrize(("kib", "status"), [(5 << 20, "warn"), ((5 << 20) - 1, "ok")])
def test_a_large_cache_in_the_home_is_a_warning_with_the_cure(host, kib, status):
    host.engine("apptainer")
    (host.bin / "du").unlink()
    (host.bin / "du").write_text(f"#!/bin/sh\n[ \"$1\" = -sk ] && printf '{kib}\\t%s\\n' \"$2\"\nexit 1\n")
    (host.bin / "du").chmod(0o755)
    found, _ = host_checks(host)
    assert found["home"][0] == status
    for said in (f"{host.home}/.apptainer holds 5 GiB", "export APPTAINER_CACHEDIR="):
        assert (said in found["home"][1]) == (status == "warn")


def test_caches_that_take_too_long_to_count_are_not_called_small(host):
    host.engine("apptainer")
    (host.bin / "timeout").unlink()
    (host.bin / "timeout").write_text("#!/bin/sh\nexit 124\n")
    (host.bin / "timeout").chmod(0o755)
    assert host_checks(host)[0]["home"] == ("ok", f"{host.home} takes files; caches not counted")


def test_a_full_home_is_a_warning_and_nothing_is_left_in_it(host):
    host.engine("apptainer")
    (host.bin / "mount").symlink_to(shutil.which("mount"))
    options = ["--mount"] if os.geteuid() == 0 else ["--user", "--map-root-user", "--mount"]
    script = 'mount -t tmpfs -o size=512k none "$HOME" && "$@" && ! compgen -G "$HOME/.bridge*" >&2'
    result = host.run(*in_a_namespace(*options), "bash", "-c", script, "bash", CONTAINER, "check", IMAGE=str(host.image),
                      ENGINE="apptainer")
    assert result.returncode == 0, result.stderr
    [line] = host.seen()["env"]["APPTAINERENV_BRIDGE_HOST_CHECKS"].splitlines()[-1:]
    assert line.startswith(f"warn\thome\t{host.home} does not take 1 MiB")


@pytest.mark.parametrize(("stage", "looked"), [("check", True), ("accept", True), ("shell", True), ("ppo", False)])
def test_the_host_is_looked_at_only_for_a_report(host, stage, looked):
    host.engine("apptainer")
    assert host.container(stage).returncode == 0
    assert ("APPTAINERENV_BRIDGE_HOST_CHECKS" in host.seen()["env"]) == looked


def test_a_user_keeps_the_own_id_in_podman_and_root_does_not_ask_for_it(host):
    host.engine("podman")
    seen = {}
    for name, start in (("user", [] if os.geteuid() else in_a_namespace("--user")),
                        ("root", in_a_namespace("--user", "--map-root-user") if os.geteuid() else [])):
        result = host.run(*start, CONTAINER, "ppo", ENGINE="podman")
        assert result.returncode == 0, result.stderr
        seen[name] = host.seen()["argv"]
    assert seen["user"][seen["user"].index("--userns") + 1] == "keep-id" and "--userns" not in seen["root"]
    assert all("label=disable" in argv for argv in seen.values())
    host.engine("docker")
    host.container("ppo", ENGINE="docker")
    assert not {"--userns", "label=disable"} & set(host.seen()["argv"])


@pytest.mark.parametrize("engine", ["podman", "docker"])
def test_a_shell_without_a_terminal_gets_its_commands_from_standard_input_and_a_stage_does_not(host, engine):
    host.engine(engine)
    given = {}
    for stage in ("shell", "data"):
        host.container(stage, ENGINE=engine)
        given[stage] = [option for option in ("--interactive", "--tty") if option in host.seen()["argv"]]
    assert given == {"shell": ["--interactive"], "data": []}


@pytest.mark.parametrize(("engine", "end"), [("apptainer", ["bash", "-c", "id"]),
                                             ("docker", ["localhost/bridge:latest", "-c", "id"])])
def test_shell_opens_bash_instead_of_bridge(host, engine, end):
    host.engine(engine)
    host.container("shell", "-c", "id", ENGINE=engine)
    argv = host.seen()["argv"]
    assert argv[-3:] == end
    assert "exec" in argv if engine == "apptainer" else argv[argv.index("--entrypoint") + 1] == "bash"


def checkout_with_recording_bridge(host: Host) -> Path:
    """A copy of the host's scripts with a .venv whose bridge writes down what it is given."""
    copy = host.cwd / "checkout"
    shutil.copytree(ROOT / "scripts/host", copy / "scripts/host")
    shutil.copy(ROOT / ".env.example", copy)
    (copy / ".venv/bin").mkdir(parents=True)
    (copy / ".venv/bin/bridge").write_text(RECORDER)
    (copy / ".venv/bin/bridge").chmod(0o755)
    return copy


def test_without_a_container_the_hosts_python_packages_stay_out(host):
    copy = checkout_with_recording_bridge(host)
    result = host.run(copy / "scripts/host/container.sh", "ppo", "a='b c'", ENGINE="none", PYTHONPATH="/host", PYTHONHOME="/host")
    assert result.returncode == 0, result.stderr
    seen = host.seen()
    assert seen["argv"] == [f"{copy}/.venv/bin/bridge", "ppo", "a='b c'"]
    assert seen["env"].keys().isdisjoint({"PYTHONPATH", "PYTHONHOME"})
    assert seen["env"]["PYTHONNOUSERSITE"] == "1"
    assert seen["env"]["WORK_DIR"] == f"{host.cwd}/work"


def test_the_env_file_of_the_checkout_is_read_from_wherever_the_user_stands(host):
    copy = checkout_with_recording_bridge(host)
    (copy / ".env").write_text("GPUS=3\n")
    host.run("env", "-u", "ENV_FILE", copy / "scripts/host/container.sh", "ppo", ENGINE="none")
    assert host.seen()["env"]["GPUS"] == "3"


def test_without_a_container_a_missing_venv_names_the_cure(host):
    copy = checkout_with_recording_bridge(host)
    shutil.rmtree(copy / ".venv")
    result = host.run(copy / "scripts/host/container.sh", "ppo", ENGINE="none")
    assert result.returncode == 2
    assert "make venv" in result.stderr


@pytest.mark.parametrize("engine", [None, "apptainer"])
def test_the_rehearsal_makes_its_venv_where_there_is_no_image(host, engine):
    copy = checkout_with_recording_bridge(host)
    (copy / "scripts/host/venv.sh").write_text("#!/usr/bin/env bash\necho made .venv >&2\n")
    if engine:
        host.engine(engine)
    result = host.run(copy / "scripts/host/container.sh", "rehearse")
    assert result.returncode == 0, result.stderr
    assert "made .venv" in result.stderr
    assert host.seen()["argv"] == [f"{copy}/.venv/bin/bridge", "rehearse"]
    assert host.seen()["env"]["CUDA_VISIBLE_DEVICES"] == "", "a GPU would need flash-attn"


def test_the_rehearsal_and_the_benchmark_take_nothing_of_the_real_run_from_the_env_file(host):
    copy = checkout_with_recording_bridge(host)
    host.env_file.write_text(f"GPUS=8\nMODEL=meta-llama/Llama-3.2-1B-Instruct\nHF_TOKEN=hf_x\nWORK_DIR={host.home}/here\n")
    for stage, taken in (("rehearse", False), ("bench", False), ("sft", True)):
        result = host.run(copy / "scripts/host/container.sh", stage, ENGINE="none")
        assert result.returncode == 0, result.stderr
        seen = host.seen()["env"]
        assert seen["WORK_DIR"] == f"{host.home}/here"
        assert all((name in seen) == taken for name in ("GPUS", "MODEL", "HF_TOKEN"))


def test_no_other_stage_leaves_the_container_by_itself(host):
    copy = checkout_with_recording_bridge(host)
    host.engine("apptainer")
    assert host.run(copy / "scripts/host/container.sh", "sft").returncode == 2
    assert host.run(copy / "scripts/host/container.sh", "rehearse", ENGINE="apptainer").returncode == 2


def checkout_with_fake_uv(host: Host) -> Path:
    """A copy of the host's scripts with locks, a .venv that seems whole, and a uv that writes down its calls."""
    copy = checkout_with_recording_bridge(host)
    for name in ("requirements.lock", "requirements-dev.lock", "pyproject.toml"):
        (copy / name).write_text(name)
    (host.bin / "grep").symlink_to(shutil.which("grep"))
    uv = f"echo $* >> {host.record}; [[ $1 != $FAKE_UV_FAILS ]]"
    for file, text in ((host.bin / "uv", uv), (copy / ".venv/bin/python", ":")):
        file.write_text(f"#!/usr/bin/env bash\n{text}\n")
        file.chmod(0o755)
    (copy / ".venv/bin/activate").write_text(f"VIRTUAL_ENV='{copy}/.venv'")
    return copy


def test_a_venv_is_installed_again_after_an_interruption_or_new_locks_and_else_left_alone(host):
    copy = checkout_with_fake_uv(host)

    def calls(fails: str = "") -> list[str]:
        host.record.write_text("")
        assert (host.run(copy / "scripts/host/venv.sh", FAKE_UV_FAILS=fails).returncode == 0) is (not fails)
        return host.record.read_text().splitlines()

    assert len(calls(fails="pip")) == 1
    [locks, ours] = calls()
    assert "--no-deps --require-hashes" in locks and locks.endswith("-r requirements.lock -r requirements-dev.lock")
    assert "--no-build-isolation --editable ." in ours
    assert calls() == []
    (copy / "requirements.lock").write_text("newer")
    assert len(calls()) == 2


def test_a_missing_python_names_the_cure(host):
    copy = checkout_with_fake_uv(host)
    (copy / ".venv/bin/python").unlink()
    result = host.run(copy / "scripts/host/venv.sh", FAKE_UV_FAILS="venv")
    assert result.returncode == 2
    assert "uv python install 3.11" in result.stderr


def names_of_env_example() -> set[str]:
    return set(re.findall(r"^#?([A-Za-z_]\w*\*?)=", (ROOT / ".env.example").read_text(), re.MULTILINE))


def test_env_example_has_every_setting_that_the_program_reads():
    program = (ROOT / "scripts/bridge/settings.py").read_text()
    read = set(re.findall(r'\b(?:given|choice|number)\("([A-Z_]+)"', program))
    assert len(read) > 10
    assert read - names_of_env_example() == set()


def test_every_name_of_env_example_is_used_or_belongs_to_a_library():
    sources = "\n".join(file.read_text() for folder in ("bridge", "host") for file in (ROOT / "scripts" / folder).iterdir()
                        if file.is_file()) + (ROOT / "configs" / "settings.yaml").read_text()
    # Read by no script of ours: the hub's library, W&B's, NCCL, TransformerEngine, every program that uses the network.
    libraries = re.compile(r"(HF|WANDB|NCCL|NVTE)_\w+|https?_proxy|no_proxy|HTTPS?_PROXY|NO_PROXY|\w+\*")
    unused = {name for name in names_of_env_example() if not libraries.fullmatch(name) and not re.search(rf"\b{name}\b", sources)}
    assert unused == set()


def test_every_setting_of_env_example_is_explained_above_it():
    lines = (ROOT / ".env.example").read_text().splitlines()
    bare = [line for above, line in zip(lines, lines[1:], strict=False)
            if re.match(r"#?[A-Za-z_]\w*=", line) and not above.startswith("# ") and not re.match(r"#?[A-Za-z_]\w*=", above)]
    assert bare == []


def test_env_example_copied_as_it_is_changes_nothing(host):
    assert set(host.settings((ROOT / ".env.example").read_text())) <= set(host.settings(""))


def test_every_host_script_says_where_it_runs_and_is_short():
    for script in (ROOT / "scripts/host").glob("*.sh"):
        text = script.read_text()
        assert "Runs: host" in "\n".join(text.splitlines()[:4]), script
        assert len(text.splitlines()) <= 100, script
