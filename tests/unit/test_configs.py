"""The configuration: equal to the tutorial where it must be, true to verl's tree, checked before the start."""

import functools
import itertools
import os
import re
import shlex
from pathlib import Path

import pytest
import yaml
from torch.utils.data import DistributedSampler

from bridge.compose import compose, compose_checked, flatten, verl_config_dir
from bridge.errors import UsageError
from bridge.hardware import Gpu
from bridge.runs import checkpoints
from bridge.settings import CONFIGS
from bridge.stages import ppo, sft, train
from bridge.stages.train import OWNED, memory_preset
from door import DOOR, asked

# The tutorial's own commands, from `-m MODULE` on, as typed there.
TUTORIAL = {
    "sft": """
        data.train_files=$HOME/data/gsm8k/train.parquet
        data.val_files=$HOME/data/gsm8k/test.parquet
        data.prompt_key=extra_info
        data.response_key=extra_info
        data.prompt_dict_keys=['question']
        +data.response_dict_keys=['answer']
        data.micro_batch_size_per_gpu=8
        model.partial_pretrain=$HOME/model/Llama-3.2-1B-Instruct
        trainer.project_name=gsm8k-sft
        trainer.experiment_name=$HOME/model/Llama-3.2-1B-Instruct
        trainer.total_epochs=2
        trainer.default_local_dir=$HOME/training/sft/checkpoints
        trainer.logger=['console','wandb']
        trainer.project_name=$WANDB_PROJECT_NAME
        trainer.experiment_name=$WANDB_RUN_NAME""",
    "ppo": """
        data.train_files=$HOME/data/gsm8k/train.parquet
        data.val_files=$HOME/data/gsm8k/test.parquet
        data.train_batch_size=256
        data.max_prompt_length=512
        data.max_response_length=256
        data.dataloader_num_workers=0
        actor_rollout_ref.model.path=$HOME/model/Llama-3.2-1B-Instruct
        actor_rollout_ref.actor.optim.lr=1e-6
        actor_rollout_ref.actor.ppo_mini_batch_size=64
        actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4
        actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8
        actor_rollout_ref.rollout.tensor_model_parallel_size=1
        actor_rollout_ref.rollout.gpu_memory_utilization=0.4
        actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=4
        critic.optim.lr=1e-5
        critic.model.path=$HOME/model/Llama-3.2-1B-Instruct
        critic.ppo_micro_batch_size_per_gpu=4
        algorithm.kl_ctrl.kl_coef=0.001
        trainer.logger=['console']
        trainer.val_before_train=False
        trainer.n_gpus_per_node=8
        trainer.nnodes=1
        trainer.save_freq=10
        trainer.test_freq=10
        trainer.default_local_dir=$HOME/training/ppo/checkpoints
        trainer.logger=['console','wandb']
        trainer.project_name=$WANDB_PROJECT_NAME
        trainer.experiment_name=$WANDB_RUN_NAME
        trainer.total_epochs=15""",
}
# PPO's Ray is kept to the node; the trainer is verl's.
TUTORIAL_MODULE = {"sft": "bridge.trainers.stoppable verl.trainer.fsdp_sft_trainer",
                   "ppo": "bridge.trainers.loopback bridge.trainers.stoppable verl.trainer.main_ppo"}
# All that may differ: where things lie, what they are called, resuming, retention, and what depends on the machine.
MAY_DIFFER = {
    "sft": {"data.train_files", "data.val_files", "model.partial_pretrain", "trainer.default_local_dir",
            "trainer.experiment_name", "trainer.resume_mode",
            # Ours, and null here: the module that the door starts is compared below.
            "bridge.packed_tokens_per_gpu"},
    "ppo": {"data.train_files", "data.val_files", "actor_rollout_ref.model.path", "critic.model.path",
            "critic.model.tokenizer_path", "reward_model.model.input_tokenizer", "trainer.default_local_dir",
            "trainer.experiment_name", "trainer.resume_mode", "ray_init.num_cpus", "trainer.validation_data_dir"},
}
VERL_NAME = {"sft": "sft_trainer", "ppo": "ppo_trainer"}
NAMES = {"WORK_DIR": "/w", "BRIDGE_MODEL_DIR": "/m", "BRIDGE_STAGE_DIR": "/s", "BRIDGE_RUN_NAME": "r", "WANDB_PROJECT": "p"}
# Keys that verl reads though its own YAML does not list them: the tutorial's "+" (utils/dataset/sft_dataset.py), and what
# goes to vLLM's SamplingParams and LLM (workers/rollout/vllm_rollout/vllm_rollout_spmd.py); and the one of our own.
NOT_IN_VERLS_YAML = {"data.response_dict_keys", "bridge.packed_tokens_per_gpu", "actor_rollout_ref.rollout.logprobs",
                     "actor_rollout_ref.rollout.engine_kwargs.vllm.num_scheduler_steps",
                     "actor_rollout_ref.rollout.engine_kwargs.vllm.multi_step_stream_outputs",
                     "actor_rollout_ref.rollout.engine_kwargs.vllm.compilation_config.cudagraph_capture_sizes"}


@functools.cache
def composed(name: str, arguments: tuple[str, ...], env: tuple[tuple[str, str], ...]) -> dict:
    """Composed once for all tests that ask for the same. Not to be changed."""
    script = Path(__file__).with_name("compose_as_verl_does.py")
    result = DOOR.run(str(script), str(verl_config_dir()), name, "--cfg", "job", "--resolve", *arguments,
                      env={**os.environ, **dict(env)})
    assert result.returncode == 0, result.stderr
    return flatten(yaml.load(result.stdout, yaml.CSafeLoader))


def compose_as_verl_does(name: str, arguments: list[str], env: dict[str, str]) -> dict:
    return composed(name, tuple(arguments), tuple(env.items()))


def launched(stage: str, dry_run: str) -> tuple[list[str], dict[str, str]]:
    """The trainer's arguments and environment out of the door's printed command."""
    words = shlex.split(dry_run.removeprefix("+ env "))
    arguments = words[words.index("--config-dir"):]
    return arguments, dict(word.split("=", 1) for word in words if "=" in word and word.split("=", 1)[0].isupper())


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_the_tutorial_profile_launches_the_tutorials_configuration_key_by_key(stage, env):
    shell = {"HOME": "/home/student", "WANDB_PROJECT_NAME": "competition_verl_test", "WANDB_RUN_NAME": "llama3.2_test"}
    typed = shlex.split(TUTORIAL[stage])
    for name, value in shell.items():
        typed = [word.replace(f"${name}", value) for word in typed]
    wanted = compose_as_verl_does(VERL_NAME[stage], typed, {})
    result = asked(stage, "--dry-run", **{**env, "PROFILE": "tutorial", "GPUS": "8"})
    assert result.returncode == 0, result.stderr
    assert f"-m {TUTORIAL_MODULE[stage]} --config-dir " in result.stdout
    arguments, variables = launched(stage, result.stdout)
    found = compose_as_verl_does(VERL_NAME[stage], arguments, variables)
    different = {key for key in wanted.keys() | found.keys() if wanted.get(key, "absent") != found.get(key, "absent")}
    assert different == MAY_DIFFER[stage]


@pytest.mark.parametrize("stage", ["sft", "ppo"])
@pytest.mark.parametrize("groups", [["profile/{}=tutorial"], ["profile/{}=tuned"], ["profile/{}=rehearsal"],
                                    ["profile/{}=tiny", "device/{}=cpu"], ["profile/{}=eight", "device/{}=cpu"]], ids=" ".join)
def test_what_the_door_checks_is_what_the_trainer_composes(stage, groups):
    overrides = [group.format(stage) for group in groups]
    ours = flatten(compose(stage, overrides, NAMES))
    theirs = compose_as_verl_does(VERL_NAME[stage], ["--config-dir", str(CONFIGS), "--config-name", stage, *overrides], NAMES)
    assert ours == theirs


# Cases, templates, tables of names: no configuration of verl.
NOT_VERLS = {CONFIGS / name for name in ("bench.yaml", "environment.yaml", "owned.yaml", "settings.yaml", "stages.yaml",
                                         "tiny.yaml", "word_problems.yaml")}


@pytest.mark.parametrize("file", sorted(set(CONFIGS.rglob("*.yaml")) - NOT_VERLS),
                         ids=lambda file: str(file.relative_to(CONFIGS)))
def test_every_key_of_ours_is_a_key_of_verls(file):
    # Hydra refuses a mistyped key on the command line but takes it in silence from a YAML file.
    stage = next(name for name in (file.parent.name, file.stem, "ppo") if name in VERL_NAME)
    verl = compose_as_verl_does(VERL_NAME[stage], [], {})
    nodes = {key.rsplit(".", i)[0] for key in verl for i in range(key.count(".") + 1)}
    ours = yaml.safe_load(file.read_text())
    for section in ("defaults", "hydra"):
        ours.pop(section, None)
    assert not ours or set(flatten(ours)) - nodes <= NOT_IN_VERLS_YAML


PRESETS = [(stage, groups) for stage in ("sft", "ppo")
           for groups in ([], *([f"memory/{stage}={file.stem}"] for file in sorted(CONFIGS.glob(f"memory/{stage}/*.yaml"))))]
# All that the tuned profile and the memory presets may set: where and when something is computed, never what.
EACH_PART = {  # in the actor's section and in the critic's
    "model.external_lib", "model.enable_gradient_checkpointing", "model.use_remove_padding"}
MACHINERY = {
    "sft": {"model.external_lib", "model.enable_gradient_checkpointing", "bridge.packed_tokens_per_gpu"},
    "ppo": {*(f"{part}.{key}" for part in ("actor_rollout_ref", "critic") for key in EACH_PART),
            *(f"{part}.use_dynamic_bsz" for part in ("actor_rollout_ref.actor", "critic", "reward_model")),
            *(f"actor_rollout_ref.{part}.log_prob_{key}" for part in ("ref", "rollout")
              for key in ("use_dynamic_bsz", "max_token_len_per_gpu")),
            *(f"{part}_max_token_len_per_gpu" for part in (
                "actor_rollout_ref.actor.ppo", "critic.ppo", "critic.forward", "reward_model.forward")),
            *(f"{part}.fsdp_config.{what}_offload" for part in ("actor_rollout_ref.actor", "critic.model")
              for what in ("param", "optimizer")),
            *(f"actor_rollout_ref.rollout.{key}" for key in (
                "enforce_eager", "free_cache_engine", "gpu_memory_utilization", "enable_chunked_prefill", "logprobs")),
            *(f"actor_rollout_ref.rollout.engine_kwargs.vllm.{key}" for key in (
                "num_scheduler_steps", "multi_step_stream_outputs", "compilation_config.cudagraph_capture_sizes")),
            # No reward model is made: it follows the critic's.
            "reward_model.model.external_lib"},
}


@pytest.mark.parametrize(("stage", "groups"), PRESETS, ids=lambda value: " ".join(value) if isinstance(value, list) else value)
def test_the_tuned_profile_changes_machinery_and_no_mathematics(stage, groups):
    tutorial = flatten(compose(stage, [f"profile/{stage}=tutorial"], NAMES))
    tuned = flatten(compose(stage, [f"profile/{stage}=tuned", *groups], NAMES))
    # trainer.seed: the order of SFT's rows, which verl's trainer takes from 0 whatever its configuration says.
    assert stage == "ppo" or tuned.pop("trainer.seed") == 0 != tutorial.pop("trainer.seed")
    different = {key for key in tutorial.keys() | tuned.keys() if tutorial.get(key, "absent") != tuned.get(key, "absent")}
    assert different
    assert different - MACHINERY[stage] == set()


@pytest.mark.parametrize(("memory", "preset"), [(16, "24gb"), (25.8, "24gb"), (42.4, "40gb"), (85.5, "80gb"), (150.7, "141gb")])
def test_the_memory_preset_is_the_largest_that_the_smallest_gpu_holds(memory, preset):
    gpus = [Gpu(str(i), "a GPU", int(size * 10**9), 0) for i, size in enumerate((200, memory))]
    notes = []
    assert memory_preset("ppo", gpus, notes) == preset
    assert f"memory/ppo={preset}" in notes[0] and f"{memory:.0f} GB" in notes[0]


def test_the_memory_preset_is_said_and_can_be_chosen(env):
    tuned = {**env, "PROFILE": "tuned", "GPUS": "8"}
    arguments = "data.train_batch_size=64", "--dry-run"
    said = asked("ppo", *arguments, **tuned)
    assert "memory/ppo=80gb" in said.stdout and "no GPU visible; 80 GB assumed" in said.stderr
    chosen = asked("ppo", *arguments, "memory/ppo=24gb", **tuned)
    assert chosen.returncode == 0 and "memory/ppo=24gb" in chosen.stdout and "80gb" not in chosen.stdout
    wrong = asked("ppo", *arguments, "memory/ppo=25gb", **tuned)
    assert wrong.returncode == 2 and "memory/ppo" in wrong.stderr


VERLS_OWN = "actor_rollout_ref.model.external_lib=null"
OTHER_LOSS = "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean"


@pytest.mark.parametrize(("also", "override", "cure"), [
    ([VERLS_OWN], "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8", "actor_rollout_ref.actor.ppo_max_token_len_per_gpu"),
    ([OTHER_LOSS], "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
     "actor_rollout_ref.actor.ppo_max_token_len_per_gpu"),
    ([], "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8",
     "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu"),
    ([], "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=8", "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu"),
    ([VERLS_OWN], "critic.ppo_micro_batch_size_per_gpu=8", "critic.ppo_max_token_len_per_gpu"),
    ([], "critic.forward_micro_batch_size_per_gpu=8", "critic.forward_max_token_len_per_gpu"),
])
def test_rows_are_refused_where_tokens_are_counted_and_rows_mean_nothing(also, override, cure):
    refused = (f"{override}: no effect, since micro batches are counted in tokens here (use_dynamic_bsz). Use {cure}, or "
               "PROFILE=tutorial, which counts rows.")
    for profile, wanted in (("tuned", [refused]), ("tutorial", [])):
        own = [f"profile/ppo={profile}"]
        config = compose_checked("ppo", own, [override, *also], NAMES, OWNED)
        assert ppo.setting_problems(config, [override]) == wanted


@pytest.mark.parametrize(("stage", "override"), [
    (ppo, "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8"), (ppo, "critic.ppo_micro_batch_size_per_gpu=8"),
    (sft, "data.micro_batch_size_per_gpu=4")])
def test_rows_of_the_losss_groups_are_taken(stage, override):
    name = stage.__name__.split(".")[-1]
    for profile in ("tuned", "tutorial"):
        memory = [f"memory/{name}=80gb"] if profile == "tuned" else []
        config = compose_checked(name, [f"profile/{name}={profile}", *memory], [override], NAMES, OWNED)
        assert stage.setting_problems(config, [override]) == []


# All that ALGO=grpo changes, whatever the profile says of the rest.
GRPO = {"algorithm.adv_estimator": "grpo", "actor_rollout_ref.rollout.n": 5, "actor_rollout_ref.actor.use_kl_loss": True}


@pytest.mark.parametrize("profile", sorted({file.stem for file in CONFIGS.glob("profile/*/*.yaml")}))
def test_grpo_goes_over_every_profile_and_changes_its_own_keys_alone(profile):
    own = [f"profile/ppo={profile}", *(["memory/ppo=80gb"] if profile == "tuned" else [])]
    before, after = flatten(compose("ppo", own, NAMES)), compose("ppo", [*own, "algo=grpo"], NAMES)
    different = {key: value for key, value in flatten(after).items() if before[key] != value}
    # What follows from rollout.n.
    followed = {"actor_rollout_ref.actor.rollout_n", "actor_rollout_ref.ref.rollout_n", "critic.rollout_n"}
    assert {key: value for key, value in different.items() if key not in followed} == GRPO
    assert ppo.setting_problems(after, []) == []
    assert checkpoints.contents("ppo", after) == {"actor": checkpoints.ALL}
    assert not ppo.divisibility(after, 1 if profile in ("tiny", "rehearsal") else 8, heads=32)


def test_what_the_user_says_goes_over_grpo_and_one_answer_to_a_prompt_is_refused():
    own = ["profile/ppo=tuned", "memory/ppo=80gb", "algo=grpo"]
    overrides = ["actor_rollout_ref.rollout.n=8", "actor_rollout_ref.actor.use_kl_loss=False"]
    config = compose_checked("ppo", own, overrides, NAMES, OWNED)
    assert config["actor_rollout_ref"]["rollout"]["n"] == 8 and not config["actor_rollout_ref"]["actor"]["use_kl_loss"]
    [problem] = ppo.setting_problems(compose_checked("ppo", own, ["actor_rollout_ref.rollout.n=1"], NAMES, OWNED), [])
    assert "rollout.n=1: GRPO compares the answers to one prompt" in problem
    with pytest.raises(UsageError, match="algo is set by the bridge. Use ALGO= instead"):
        compose_checked("ppo", ["profile/ppo=tuned"], ["algo=grpo"], NAMES, OWNED)


def test_algo_is_for_ppo_alone_and_an_unknown_one_is_refused(env):
    said = asked("ppo", "--dry-run", **env, ALGO="grpo")
    assert said.returncode == 0 and " algo=grpo " in said.stdout and "grpo: 2 ranks on CPU" in said.stderr, said.stderr
    assert "BRIDGE_RUN_NAME=default_grpo " in said.stdout
    sft = asked("sft", "--dry-run", **env, ALGO="grpo")
    assert sft.returncode == 0 and "algo=" not in sft.stdout
    assert "ALGO='dpo' is unknown. Use one of: ppo, grpo." in asked("ppo", "--dry-run", **env, ALGO="dpo").stderr


def test_the_seed_goes_where_verl_reads_one_and_without_it_nothing_changes(env):
    for stage, keys in train.SEEDS.items():
        said = asked(stage, "--dry-run", **env, SEED="7")
        assert said.returncode == 0 and "BRIDGE_SEED=7 " in said.stdout, said.stderr
        arguments, variables = launched(stage, said.stdout)
        found = compose_as_verl_does(VERL_NAME[stage], arguments, variables)
        assert [found[key] for key in keys] == [7] * len(keys)
        assert "seed=" not in asked(stage, "--dry-run", **env).stdout.lower()


def test_rows_mean_something_as_well_where_the_speedups_come_with_the_critic():
    own = ["profile/ppo=tuned", "memory/ppo=80gb"]
    also = ["actor_rollout_ref.model.external_lib=shared_gpu", "critic.model.external_lib=bridge.trainers.speedups"]
    override = "++critic.ppo_micro_batch_size_per_gpu=8"
    config = compose_checked("ppo", own, [override, *also], NAMES, OWNED)
    assert ppo.setting_problems(config, [override]) == []


def test_groups_of_rows_have_to_divide_a_gpus_part_of_a_mini_batch_in_every_profile():
    # verl's workers refuse it, too, after everything is loaded.
    for profile in ("tutorial", "tuned"):
        config = compose("ppo", [f"profile/ppo={profile}"], NAMES)
        assert not ppo.divisibility(config, 16, heads=32)
        assert [fault.split(" do not")[0] for fault in ppo.divisibility(config, 32, heads=32)] == [
            f"2 rows a GPU ({part}.ppo_mini_batch_size=64 / 32)" for part in ("actor_rollout_ref.actor", "critic")]


@pytest.mark.parametrize(("parameters", "tp", "problem"), [
    (1_235_814_400, 1, None), (8_030_000_000, 2, None),
    (8_030_000_000, 1, "12.8 GB (actor_rollout_ref.rollout.gpu_memory_utilization=0.15), does not hold the model's weights, 16"),
])
def test_vllm_has_to_hold_the_weights_in_its_share(monkeypatch, tmp_path, parameters, tp, problem):
    monkeypatch.setattr(ppo.model_folder, "longest_sequence", lambda _folder: None)
    monkeypatch.setattr(ppo.model_folder, "parameter_count", lambda _folder: parameters)
    settings = [f"actor_rollout_ref.rollout.tensor_model_parallel_size={tp}"]
    config = compose("ppo", ["profile/ppo=tuned", "memory/ppo=80gb", *settings], NAMES)
    found = ppo.model_problems(config, tmp_path, [Gpu("0", "a GPU", 85_520_809_984, 0)])
    assert problem in found[0] if problem else found == []


def test_the_tuned_sft_packs_in_the_order_of_the_tutorial():
    config = compose("sft", ["profile/sft=tuned", "memory/sft=80gb"], NAMES)
    assert sft.modules(config) == ["bridge.trainers.packed_sft"] and sft.setting_problems(config) == []
    # verl's sampler is made without a seed.
    assert config["trainer"]["seed"] == DistributedSampler([], num_replicas=1, rank=0).seed


def test_a_wrong_budget_and_what_packing_cannot_are_refused_at_once(env):
    result = asked("sft", "--dry-run", "bridge.packed_tokens_per_gpu=255", "data.balance_dp_token=True", "model.strategy=fsdp",
                    "use_remove_padding=True", "ulysses_sequence_parallel_size=2", **env)
    assert result.returncode == 2
    assert "bridge.packed_tokens_per_gpu=255 is less than the 256 tokens that a row may have" in result.stderr
    for problem in ("data.balance_dp_token=True", "model.strategy=fsdp", "use_remove_padding=True",
                    "ulysses_sequence_parallel_size=2"):
        assert f"{problem} does not go with packing." in result.stderr
    said = asked("sft", "--dry-run", "bridge.packed_tokens_per_gpu=many", **env).stderr
    assert "has to be a whole number of at least 1" in said


def test_the_budget_on_the_command_line_chooses_the_packed_trainer(env):
    result = asked("sft", "--dry-run", "bridge.packed_tokens_per_gpu=256", **env)
    assert result.returncode == 0, result.stderr
    assert "-m bridge.trainers.on_cpu bridge.trainers.packed_sft --config-dir " in result.stdout


def test_no_file_of_ours_has_the_name_of_one_of_verls():
    # Hydra would ignore ours in silence.
    theirs = {file.relative_to(verl_config_dir()) for file in verl_config_dir().rglob("*.yaml")}
    assert not theirs & {file.relative_to(CONFIGS) for file in CONFIGS.rglob("*.yaml")}


def unexplained(text: str) -> list[str]:
    """The settings that no comment explains: above the key, above one right before it, above its section, or the same elsewhere.

    An empty line ends what a comment speaks for, and so does the end of its section. The file's header explains no key.
    """
    header = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    missing, explained_names = [], set()
    # (indent, whether explained) of the sections that a line is in, and last of the key before it.
    above, comment = [], False
    for line in text.splitlines()[len(list(header)):]:
        key = re.match(r"( *)(?:- )?([\w/]+):(.*)", line)
        if key:
            above = [entry for entry in above if entry[0] <= len(key[1])]
            enclosing = [explained for indent, explained in above if indent < len(key[1])]
            before = above[-1][1] if above and above[-1][0] == len(key[1]) else False
            explained = comment or before or enclosing[-1:] == [True]
            above = [entry for entry in above if entry[0] < len(key[1])] + [(len(key[1]), explained)]
            if explained:
                explained_names.add(key[2])
            elif key[3]:
                missing.append(key[2])
        elif not line.strip():
            above = []
        comment = line.lstrip().startswith("#")
    return [name for name in missing if name not in explained_names]


@pytest.mark.parametrize(("text", "missing"), [
    ("# What this is.\na: 1\n", ["a"]),
    ("# What this is.\nx:\n  # Why.\n  a: 1\n  b: 2\n\ny:\n  c: 3\n", ["c"]),
    ("# What this is.\nx:\n  # Why.\n  a:\n    b: 1\n  c: 2\ny:\n  b: 2\n  d: 3\n", ["d"]),
    ("# What this is.\nx:\n  a:\n    # Why.\n    b: 1\n  c: 2\n", ["c"]),
])
def test_a_key_without_its_why_would_be_noticed(text, missing):
    assert unexplained(text) == missing


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda file: str(file.relative_to(CONFIGS)))
def test_every_configuration_says_what_it_is_and_every_key_why(file):
    lines = [line for line in file.read_text().splitlines() if line != "# @package _global_"]
    assert lines[0].startswith("# ") and len(lines[0]) > 30
    if file not in NOT_VERLS:
        assert unexplained(file.read_text()) == []


@pytest.mark.parametrize(("override", "message"), [
    ("trainer.totl_epochs=1", "Did you mean trainer.total_epochs?"),
    ("total_epochs=1", "is not a setting of verl's ppo trainer"),
    ("trainer.total_epochs=many", "trainer.total_epochs has to be a whole number of at least 1"),
    ("trainer.val_before_train=3", "trainer.val_before_train is True or False"),
    ("trainer.n_gpus_per_node=4", "GPUS="),
    ("profile/ppo=tiny", "PROFILE="),
    ("--gpus", "is no option of a stage"),
    ("no equals", "is not of the form key=value"),
    ("", "is not of the form key=value"),
    ("data.train_batch_size=0", "data.train_batch_size has to be a whole number of at least 1"),
    ("data.train_batch_size=-8", "of at least 1"),
    ("data.train_batch_size=1.5", "has to be a whole number of at least 1"),
    ("data.train_batch_size=null", "data.train_batch_size cannot be null"),
    ("++data.train_batch_size=null", "data.train_batch_size cannot be null"),
    ("actor_rollout_ref.rollout.n=0", "actor_rollout_ref.rollout.n has to be a whole number of at least 1"),
    ("trainer.nnodes=2", "trainer.nnodes is set by the bridge. Use NODES="),
    ("actor_rollout_ref.actor.optim.lr=nan", "actor_rollout_ref.actor.optim.lr is a number"),
    ("actor_rollout_ref.actor.optim={lr: null}", "actor_rollout_ref.actor.optim.lr cannot be null"),
    ("~actor_rollout_ref.actor.optim.lr", "actor_rollout_ref.actor.optim.lr would be gone"),
    ("~critic.optim", "critic.optim.* would be gone"),
    ("critic.optim=null", "critic.optim.* would be gone"),
    ("critic.optim=3", "critic.optim.* would be gone"),
    ("data=null", "do not compose"),
    ("trainer={n_gpus_per_node: 3}", "trainer.n_gpus_per_node is set by the bridge. Use GPUS="),
    ("data.train_files=null", "data.train_files cannot be null"),
    ("data.train_files=3", "data.train_files is a text"),
    ("data.train_files=[a,3]", "data.train_files is a text"),
    ("data.train_files={a: b}", "data.train_files is a text"),
])
def test_a_wrong_override_is_refused_with_the_cure(override, message):
    with pytest.raises(UsageError, match="(?s)" + message.replace("?", "[?]").replace("+", "[+]")):
        compose_checked("ppo", [], [override], NAMES, OWNED)


def test_unusual_overrides_that_verl_takes_pass():
    # Composed once for all: what is refused is named.
    compose_checked("ppo", [], [
        # verl's own default is null.
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=null", "data.val_batch_size=null",
        "trainer.total_training_steps=5", "trainer.save_freq=-1", "trainer.critic_warmup=0",
        "actor_rollout_ref.rollout.top_k=-1", "actor_rollout_ref.actor.grad_clip=1",
        "actor_rollout_ref.actor.optim={lr: 1e-5}", "+actor_rollout_ref.model.override_config.x=1", "trainer.logger=console",
        "data.train_batch_size=${data.max_prompt_length}", "trainer.project_name='2024'"], NAMES, OWNED)


def test_all_wrong_overrides_are_named_at_once():
    with pytest.raises(UsageError) as error:
        compose_checked("ppo", [], ["trainer.totl_epochs=1", "critic.lr=2"], NAMES, OWNED)
    assert len(error.value.problems) == 2


def test_new_keys_and_lists_and_strings_pass_as_hydra_has_them():
    config = compose_checked("ppo", [], ["+data.seed=3", "data.train_files=[a,b]", "trainer.project_name='x y'"], NAMES, OWNED)
    assert config["data"]["seed"] == 3
    assert config["data"]["train_files"] == ["a", "b"]
    assert config["trainer"]["project_name"] == "x y"
