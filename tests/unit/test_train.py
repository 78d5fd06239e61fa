"""What is looked at before a training starts, in the door's own process: nothing is started, and nothing written."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest

from bridge import settings
from bridge.compose import compose
from bridge.errors import UsageError
from bridge.plan import Plan
from bridge.runs import record, tracking
from bridge.stages import ppo, sft, train
from door import SHELL, bridge

NAMES = {"WORK_DIR": "/w", "BRIDGE_MODEL_DIR": "/m", "BRIDGE_STAGE_DIR": "/s", "BRIDGE_RUN_NAME": "r", "WANDB_PROJECT": "p"}


def planned(env: dict[str, str], stage: str, *overrides: str, dry_run: bool = True) -> Plan:
    return train.plan(stage, settings.read(env), env, list(overrides), dry_run)


def problems(env: dict[str, str], stage: str, *overrides: str) -> list[str]:
    """What the door refuses to start with; nothing if it would start."""
    try:
        planned(env, stage, *overrides)
    except UsageError as error:
        return error.problems
    return []


# ---- settings that verl takes, and then does something else


@pytest.mark.parametrize(("stage", "overrides"), [
    # All at once: an override and what is said of it.
    ("sft", {"model.lora_rank=8": "verl's merger drops LoRA's adapters",
             "trainer.save_freq=0": "verl divides by it", "trainer.test_freq=0": "verl divides by it",
             "trainer.logger=['wandb']": "progress are read from what verl prints",
             # 512 rows in batches of 16.
             "trainer.total_training_steps=65": "more than the 64 steps of trainer.total_epochs=2: verl would end there"}),
    ("ppo", {"actor_rollout_ref.model.lora_rank=8": "verl's merger drops LoRA's adapters",
             "critic.model.lora_rank=8": "Use critic.model.lora_rank=0.",
             "trainer.save_freq=0": "saves no checkpoint",
             "trainer.total_training_steps=961": "more than the 960 steps of trainer.total_epochs=15"}),
    *((stage, {f"{key}={value}": "cannot be null" if value == "null" else "has to be a whole number of at least 1"
               for key, value in values})
      for stage in ("sft", "ppo") for values in (
          (("trainer.total_epochs", 0), ("trainer.total_training_steps", 0), ("data.train_batch_size", 0)),
          (("trainer.total_epochs", 1.5), ("trainer.total_training_steps", -1), ("data.train_batch_size", "null")))),
])
def test_what_would_train_or_save_something_else_is_refused(env, stage, overrides):
    said = problems(env, stage, *overrides)
    assert len(said) == len(overrides)
    for override, message in overrides.items():
        assert [line for line in said if line.startswith((override, repr(override))) and message in line], said


@pytest.mark.parametrize(("stage", "overrides"), [
    ("sft", ["model.lora_rank=0", "trainer.total_training_steps=64", "trainer.save_freq=-1"]),
    ("sft", ["trainer.total_training_steps=null", "trainer.test_freq=-1"]),
    ("ppo", ["trainer.save_freq=-1", "trainer.total_training_steps=960"]),
])
def test_what_trains_as_it_says_is_taken(env, stage, overrides):
    assert problems(env, stage, *overrides) == []


# ---- lengths: verl stops on them after the first rollout, or while vLLM is opened


ON_GPU = {"PROFILE": "tuned", "GPUS": "1"}


# The longest row of the profile has 512 + 256 tokens.
LIMITS = ("actor_rollout_ref.actor.ppo_max_token_len_per_gpu", "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu",
          "critic.ppo_max_token_len_per_gpu", "critic.forward_max_token_len_per_gpu", "actor_rollout_ref.rollout.max_model_len",
          "actor_rollout_ref.rollout.max_num_batched_tokens")


def test_a_limit_below_the_longest_row_is_refused(env):
    said = problems({**env, **ON_GPU}, "ppo", *(f"{key}=767" for key in LIMITS))
    assert [line.partition(", ")[0] for line in said] == [f"{key}=767 is less than 768 tokens" for key in LIMITS]
    assert problems({**env, **ON_GPU}, "ppo", *(f"{key}=768" for key in LIMITS)) == []


def test_a_limit_counts_only_where_it_is_used(env):
    low = "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=767"
    assert problems({**env, **ON_GPU}, "ppo", low) == []
    # With a KL term there is a reference model.
    assert len(problems({**env, **ON_GPU}, "ppo", low, "actor_rollout_ref.actor.use_kl_loss=True")) == 1
    # Rows are counted, not tokens; and without a GPU there is no vLLM.
    assert problems({**env, **ON_GPU, "PROFILE": "tutorial"}, "ppo", low, "critic.forward_max_token_len_per_gpu=767") == []
    assert problems(env, "ppo", "actor_rollout_ref.rollout.max_num_batched_tokens=100") == []
    # No critic is trained.
    assert problems({**env, **ON_GPU, "ALGO": "grpo"}, "ppo", "critic.ppo_max_token_len_per_gpu=767") == []


@pytest.mark.parametrize(("scaling", "enough"), [
    (None, False), ({"rope_type": "linear", "factor": 2.0}, True), ({"type": "dynamic", "factor": 2.0}, True),
    # vLLM: yarn multiplies the length the model was made with, and llama3's is in max_position_embeddings already.
    ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 300}, False),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 300}, True),
    ({"rope_type": "llama3", "factor": 32.0}, False),
])
def test_rows_longer_than_the_model_can_look_at_are_refused(env, tmp_path, scaling, enough):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (Path(env["WORK_DIR"]) / "models" / "tiny").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 700, "rope_scaling": scaling}))
    said = problems({**env, "MODEL": str(folder)}, "ppo", "data.max_prompt_length=512", "data.max_response_length=256")
    assert said == [] if enough else ["that the model can look at" in problem for problem in said] == [True]


# ---- what divides: as verl's workers reckon it


@pytest.mark.parametrize(("gpus", "overrides", "message"), [
    (8, [], None),
    (12, [], "data.train_batch_size=256 does not divide by 12 GPUs"),
    (32, [], "2 rows a GPU (actor_rollout_ref.actor.ppo_mini_batch_size=64 / 32) do not divide by ppo_micro_batch_size_per_gpu"),
    # GRPO with four answers to a prompt: four times the rows.
    (32, ["actor_rollout_ref.rollout.n=4"], None),
    (8, ["actor_rollout_ref.rollout.n=4", "actor_rollout_ref.actor.ppo_mini_batch_size=2",
         "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1", "critic.ppo_micro_batch_size_per_gpu=1"], None),
    (8, ["actor_rollout_ref.rollout.n=4", "actor_rollout_ref.actor.ppo_mini_batch_size=4"],
     "2 rows a GPU (actor_rollout_ref.actor.ppo_mini_batch_size=4 x 4 (actor_rollout_ref.rollout.n) / 8) do not divide"),
    (3, ["actor_rollout_ref.rollout.n=3"], None),
    (7, ["actor_rollout_ref.rollout.n=3"], "batch_size=256 x 3 (actor_rollout_ref.rollout.n) does not divide by 7 GPUs"),
    # GPUs that share the rows count as one.
    (32, ["actor_rollout_ref.actor.ulysses_sequence_parallel_size=2", "critic.ulysses_sequence_parallel_size=2"], None),
    (8, ["actor_rollout_ref.actor.ulysses_sequence_parallel_size=3"], "ulysses_sequence_parallel_size=3 does not divide 8 GPUs"),
    (8, ["actor_rollout_ref.rollout.tensor_model_parallel_size=3"], "TP=3 does not divide 8 GPUs"),
    (8, ["actor_rollout_ref.rollout.tensor_model_parallel_size=8"], "TP=8 does not divide the model's 4 attention heads"),
    (8, ["critic.ppo_micro_batch_size_per_gpu=3"], "critic.ppo_mini_batch_size=64 / 8) do not divide by ppo_micro_batch_size"),
    # No critic is made.
    (8, ["critic.ppo_micro_batch_size_per_gpu=3", "algorithm.adv_estimator=grpo"], None),
])
def test_batches_divide_as_verls_workers_divide_them(gpus, overrides, message):
    faults = ppo.divisibility(compose("ppo", ["profile/ppo=tutorial", *overrides], NAMES), gpus, 4)
    assert faults == [] if message is None else any(message in fault for fault in faults), faults


# ---- Ray


def test_ray_is_told_of_the_cores_that_there_are_and_of_as_many_as_verl_reserves(monkeypatch, env):
    for cores, told in ((64, 64), (9, 9), (1, 9)):
        monkeypatch.setattr(train.hardware, "cpu_count", lambda cores=cores: cores)
        assert f"ray_init.num_cpus={told}" in planned({**env, "PROFILE": "tutorial", "GPUS": "8"}, "ppo").command
    plan = planned({**env, "PROFILE": "tutorial", "GPUS": "8"}, "ppo", "reward_model.launch_reward_fn_async=True")
    assert "ray_init.num_cpus=10" in plan.command


def test_too_few_cores_for_the_gpus_are_named_before_the_start(monkeypatch, env):
    gpus = [train.hardware.Gpu(str(i), "a GPU", 80 * 10**9, 0) for i in range(8)]
    monkeypatch.setattr(train.hardware, "visible_gpus", lambda env: gpus)
    monkeypatch.setattr(train.hardware, "cpu_count", lambda: 1)
    for stage in ("sft", "ppo"):
        [said] = [note for note in planned({**env, "PROFILE": "tutorial", "GPUS": "8"}, stage).notes if "CPU core" in note]
        assert said.startswith("warning: 1 CPU core for 8 GPUs") and "--cpus-per-task" in said


@pytest.mark.parametrize(("name", "wrong"), [
    ("no such", "is no folder here"), ("x" * 60, "is too long for Ray's sockets"), ("ok", None)])
def test_rays_folder_is_the_users_where_that_is_possible(env, tmp_path_factory, name, wrong):
    # Short, whatever pytest's own is.
    folder = Path("/dev/shm") / f"{tmp_path_factory.mktemp('x').name}{name}"
    if name != "no such":
        folder.mkdir()
    try:
        env = {**env, "RAY_TMPDIR": str(folder)}
        if wrong:
            [said] = problems(env, "ppo")
            assert wrong in said
        else:
            assert planned(env, "ppo").env["RAY_TMPDIR"] == str(folder)
            assert list(folder.iterdir()) == []
    finally:
        if folder.is_dir():
            folder.rmdir()


RUN = """
import os, sys, pathlib
from bridge import door
from bridge.plan import Plan
base = pathlib.Path(sys.argv[1])
look = "import os, stat; print('SEEN', os.environ['RAY_TMPDIR'], oct(os.stat(os.environ['RAY_TMPDIR']).st_mode)[-3:])"
plan = Plan([sys.executable, "-c", look], {"RAY_TMPDIR": sys.argv[1]}, base / "record", keep_log=False)
sys.exit(door.run_plan("ppo", plan, dict(os.environ)))
"""


HOLD = """
import os, sys, time
from bridge.runs import record
os.mkdir(sys.argv[1])
record.keep_ray_folder(sys.argv[1])
print("held", flush=True)
time.sleep(1000)
"""


def test_a_run_works_in_a_folder_that_is_its_own_and_leaves_all_others_alone(tmp_path):
    # A leftover of a run that was killed, and what another user might have made to be taken for the run's.
    for name in ("ray-leftover", "bridge-0-12345678"):
        (tmp_path / name).mkdir()
    result = subprocess.run([sys.executable, "-c", RUN, str(tmp_path)], env=SHELL, capture_output=True, text=True, check=True)
    [line] = [line for line in result.stdout.splitlines() if line.startswith("SEEN")]
    _, folder, mode = line.split()
    assert Path(folder).parent == tmp_path and Path(folder).name.startswith("ray-") and mode == "700"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bridge-0-12345678", "ray-leftover"]


def test_rays_folder_of_a_run_that_was_killed_goes_with_the_next_run_and_no_other_does(tmp_path):
    asleep = RUN.replace("print('SEEN'", "import time; time.sleep(1000); print('SEEN'")

    def folder_of(door: subprocess.Popen) -> Path:
        """What the run's child is given."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for child in psutil.Process(door.pid).children():
                with suppress(psutil.Error):
                    given = Path(child.environ().get("RAY_TMPDIR", ""))
                    # Before the child becomes its program it has the door's environment.
                    if given.parent == tmp_path:
                        return given
            time.sleep(0.05)
        raise AssertionError("no child")

    doors = [subprocess.Popen([sys.executable, "-c", asleep, str(tmp_path)], env=SHELL, stderr=subprocess.DEVNULL)
             for _ in range(2)]
    # One that has started nothing yet.
    doors.append(subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "ray-held")], env=SHELL, stdout=subprocess.PIPE))
    try:
        killed, living = map(folder_of, doors[:2])
        assert doors[2].stdout.readline() == b"held\n"
        children = psutil.Process(doors[0].pid).children()
        doors[0].kill()
        psutil.wait_procs(children, timeout=30)
        # As the killed run's, but another host's, another user's, one that a process works in, and what is no folder.
        for name in ("host", "user", "used"):
            shutil.copytree(killed, tmp_path / f"ray-{name}")
        (tmp_path / "ray-host" / record.RAY_LOCK).write_text("elsewhere")
        if not os.geteuid():
            os.chown(tmp_path / "ray-user", 65534, 65534)
        (tmp_path / "ray-link").symlink_to(killed)
        (tmp_path / "ray-mine").mkdir()
        (tmp_path / "ray-mine" / "kept").touch()
        user = subprocess.Popen(["sleep", "1000"], env={"RAY_TMPDIR": str(tmp_path / "ray-used")})
        try:
            subprocess.run([sys.executable, "-c", RUN, str(tmp_path)], env=SHELL, check=True)
        finally:
            user.kill()
            user.wait()
        stay = {living.name, "ray-held", "ray-host", "ray-used", "ray-link", "ray-mine", *([] if os.geteuid() else ["ray-user"])}
        assert {path.name for path in tmp_path.iterdir()} == stay
    finally:
        for door in doors:
            door.kill()
            door.wait()


def test_a_stage_without_ray_leaves_the_users_folder_for_it_alone(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "kept").touch()
    result = bridge("data", WORK_DIR=str(tmp_path / "work"), DATA_SOURCE="builtin", RAY_TMPDIR=str(folder))
    assert result.returncode == 0, result.stderr
    assert (folder / "kept").exists()


RANK = """
import os
import torch.distributed as dist
dist.init_process_group("gloo")
# In one piece: both write to the same pipe.
os.write(1, f"rank {dist.get_rank()} of {dist.get_world_size()} at {os.environ['MASTER_ADDR']}\\n".encode())
dist.destroy_process_group()
"""


@pytest.mark.skipif(os.getuid() != 0, reason="another host name needs root")
def test_the_ranks_of_sft_find_each_other_where_the_nodes_name_does_not_resolve(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    command = shlex.join(sft.command(2, ["rank"], []))
    script = f"hostname name-of-no-node.invalid && exec timeout 100 {command}"
    result = subprocess.run(["unshare", "--uts", "bash", "-c", script], capture_output=True, text=True, check=False,
                            env={**SHELL, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.split("\n"))[1:] == [f"rank {rank} of 2 at 127.0.0.1" for rank in range(2)]


def test_the_longest_folder_that_is_taken_leaves_room_for_rays_sockets():
    # As ray/_private/node.py and utils.py make it, with the largest process id that Linux has.
    socket_name = "/ray-abcdefgh/ray/session_2026-11-28_06-59-27_123456_4194304/sockets/plasma_store"
    with closing(socket.socket(socket.AF_UNIX)) as there:
        with pytest.raises(FileNotFoundError):
            there.bind("/" + "x" * (ppo.LONGEST_TMPDIR - 1) + socket_name)
        with pytest.raises(OSError, match="too long"):
            there.bind("/" + "x" * ppo.LONGEST_TMPDIR + socket_name)


# ---- W&B


def nobody() -> str:
    """An address at which nobody listens."""
    with closing(socket.create_server(("127.0.0.1", 0))) as was:
        return f"http://127.0.0.1:{was.getsockname()[1]}"


@pytest.mark.parametrize("status", [200, 404, 500])
def test_any_answer_of_the_server_counts(no_proxy, server, status):
    assert tracking.connection_problem(server(status)) is None


def test_a_server_that_is_not_there_or_never_answers_is_silent(no_proxy, server):
    assert tracking.connection_problem(nobody()) == "ConnectionError"
    assert tracking.connection_problem(server(None), 0.5) in ("ReadTimeout", "nothing within 0.5 s")
    assert tracking.connection_problem("foo") == "MissingSchema"


def test_the_proxy_is_asked_for_the_server_and_no_proxy_is_heeded(no_proxy, monkeypatch, server):
    answering = server(200)
    monkeypatch.setenv("http_proxy", nobody())
    assert tracking.connection_problem(answering + "/through") == "ProxyError"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert tracking.connection_problem(answering + "/directly") is None
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("http_proxy", answering)
    assert tracking.connection_problem("http://wandb.invalid") is None


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_wandb_goes_offline_aloud_where_its_server_does_not_answer(no_proxy, env, server, stage):
    env = {**env, "WANDB_API_KEY": "k" * 40, "WANDB_BASE_URL": nobody()}
    plan = planned(env, stage, dry_run=False)
    assert plan.env["WANDB_MODE"] == "offline"
    [said] = [note for note in plan.notes if "W&B" in note]
    assert f"{env['WANDB_BASE_URL']} does not answer (ConnectionError)" in said and "`wandb sync " in said
    plan = planned({**env, "WANDB_BASE_URL": server(404)}, stage, dry_run=False)
    assert "WANDB_MODE" not in plan.env and not [note for note in plan.notes if "W&B" in note]


def test_wandbs_server_is_asked_only_where_something_would_be_sent(env, monkeypatch):
    asked = []
    monkeypatch.setattr(tracking, "connection_problem", lambda url: asked.append(url) or "asked")
    env = {**env, "NETRC": "/dev/null", "WANDB_API_KEY": "k" * 40}
    for mode in ("offline", "disabled"):
        planned({**env, "WANDB_MODE": mode}, "sft", dry_run=False)
    planned(env, "sft", "trainer.logger=[console]", dry_run=False)
    planned({**env, "WANDB_API_KEY": ""}, "sft", dry_run=False)
    [said] = [note for note in planned(env, "sft").notes if "W&B" in note]
    assert "https://api.wandb.ai is asked at the start" in said
    assert asked == []
    assert planned({**env, "WANDB_MODE": "online"}, "sft", dry_run=False).env["WANDB_MODE"] == "offline"
    assert asked == ["https://api.wandb.ai"]


# ---- names


@pytest.fixture
def merged(env) -> Path:
    """This run's merged SFT model, which is a copy of the base model here."""
    folder = Path(env["WORK_DIR"]) / "runs" / "default" / "sft" / "merged"
    folder.parent.mkdir(parents=True)
    folder.symlink_to(Path(env["WORK_DIR"]) / "models" / "tiny")
    return folder


def test_a_run_is_called_in_wandb_by_its_name_and_stage(env, merged):
    def name(stage: str, **changes: str) -> str:
        return planned({**env, **changes}, stage).config["trainer"]["experiment_name"]

    assert name("sft", RUN="llama3.2") == "llama3.2_sft"
    assert name("ppo", RUN="llama3.2") == "llama3.2_ppo"
    assert name("ppo", INIT="sft") == "default_ppo_from_sft"
    assert name("sft", INIT="sft") == "default_sft"


def test_ppo_says_which_model_it_starts_from(env, merged):
    assert "the SFT model of this run" in planned({**env, "INIT": "sft"}, "ppo").notes[0]
    assert "model tiny" in planned(env, "ppo").notes[0]


def test_a_run_with_another_init_or_number_of_gpus_is_refused_by_the_settings_name(env, merged):
    plan = planned(env, "ppo")
    plan.record_dir.mkdir(parents=True)
    record.write_json(plan.record_dir / "run.json", {**record.begin(plan, env), "status": "finished", "last_step": 0}, [])
    [said] = problems({**env, "INIT": "sft"}, "ppo")
    assert "actor_rollout_ref.model.path: " in said and f"-> {merged} (MODEL= and INIT=)" in said
    [said] = problems({**env, "GPUS": "1"}, "ppo")
    assert "trainer.n_gpus_per_node: 2 -> 1 (GPUS=)" in said


@pytest.mark.parametrize(("model", "message"), [
    ("smolm2", "is none of: a name on the hub (OWNER/NAME)"), ("models/tiny/", "is none of"),
    ("random:llama-3.2-1", "no such shape"), ("meta-lama/tiny", "holds tiny, not MODEL=meta-lama/tiny"),
    ("meta-lama/other", "Run `make model` first (MODEL=meta-lama/other)"),
])
def test_a_wrong_name_of_a_model_is_told_by_the_training_too(env, model, message):
    for stage in ("sft", "ppo"):
        [said] = problems({**env, "MODEL": model}, stage)
        assert message in said
