"""The ppo stage: verl's PPO trainer on Ray. What is particular to it; the rest is in train.py."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bridge import hardware, model_folder
from bridge.compose import flatten
from bridge.runs.checkpoints import has_critic
from bridge.trainers.packed_settings import groups_rows

# Bytes that a path to a socket may have, less those of the run's own folder and Ray's longest name below it.
LONGEST_TMPDIR = 107 - len("/ray-12345678/ray/session_2026-01-01_00-00-00_123456_4194304/sockets/plasma_store")
# Columns of the data stage's that hold what is read, as in data.lengths.
TEXTS = ("prompt", "extra_info.answer")


def modules(_config: Mapping[str, Any]) -> list[str]:
    """Which trainer to run."""
    return ["bridge.trainers.stoppable", "verl.trainer.main_ppo"]


def environment(env: Mapping[str, str]) -> dict[str, str]:
    """Variables of the trainer's own."""
    # On a local disk, which Ray's sockets need. The run gets a folder of its own in it at the start.
    return {"RAY_TMPDIR": env.get("RAY_TMPDIR") or "/tmp", "RAY_USAGE_STATS_ENABLED": "0"}


def folder_problems(folder: str) -> list[str]:
    """Why Ray cannot work below RAY_TMPDIR."""
    if not os.path.isabs(folder) or not os.path.isdir(folder):
        wrong = "is no folder here, or not named from / on"
    elif not os.access(folder, os.W_OK | os.X_OK):
        wrong = "cannot be written to"
    elif len(os.fsencode(folder)) > LONGEST_TMPDIR:
        wrong = f"is too long for Ray's sockets: at most {LONGEST_TMPDIR} bytes go"
    else:
        return []
    return [f"RAY_TMPDIR={folder} {wrong}. Name another folder on a local disk, or leave it out (/tmp)."]


def cpus(config: Mapping[str, Any], gpus: int, cores: int) -> int:
    """What Ray is told of the cores: those that there are, but as many as verl reserves, or it would wait for ever.
    One for each GPU's worker, one for the trainer, one for rewards that are computed beside it."""
    return max(cores, gpus + 1 + bool(config["reward_model"]["launch_reward_fn_async"]))


def command(_ranks: int, modules: list[str], arguments: list[str], nodes: int = 1) -> list[str]:
    """One process; Ray starts the workers."""
    launcher = "bridge.trainers.loopback" if nodes == 1 else "bridge.trainers.nodes"
    return [sys.executable, "-u", "-m", launcher, *modules, *arguments]


def setting_problems(config: Mapping[str, Any], overrides: Sequence[str]) -> list[str]:
    """Limits below the longest row, no checkpoints by a slip, and overrides that would have no effect."""
    problems = length_problems(config)
    if (every := config["trainer"]["save_freq"]) != -1 and not (every or 0) > 0:
        problems.append(f"trainer.save_freq={every} saves no checkpoint, not even at the end. Use a number of steps, or -1 if "
                        "that is what you want.")
    if config["algorithm"]["adv_estimator"] == "grpo" and config["actor_rollout_ref"]["rollout"]["n"] < 2:
        problems.append("actor_rollout_ref.rollout.n=1: GRPO compares the answers to one prompt with each other. Use at least 2.")
    return problems + [
        f"{text}: no effect, since micro batches are counted in tokens here (use_dynamic_bsz). Use "
        f"{name}_max_token_len_per_gpu, or PROFILE=tutorial, which counts rows."
        for name, part in counted_in_tokens(config) if not (name.endswith(".ppo") and groups_rows(config, part))
        for text in overrides if text.lstrip("+").startswith(f"{name}_micro_batch_size")]


def counted_in_tokens(config: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """What splits its rows by tokens: how the names of its settings begin, and whose network computes it."""
    actor, ref, rollout = (config["actor_rollout_ref"][part] for part in ("actor", "ref", "rollout"))
    critic = config["critic"]
    return [(name, part) for name, part, by_tokens in (
        ("actor_rollout_ref.actor.ppo", actor, actor["use_dynamic_bsz"]),
        ("actor_rollout_ref.rollout.log_prob", actor, rollout["log_prob_use_dynamic_bsz"]),
        ("actor_rollout_ref.ref.log_prob", ref, ref["log_prob_use_dynamic_bsz"]),
        ("critic.ppo", critic, critic["use_dynamic_bsz"]),
        ("critic.forward", critic, critic["use_dynamic_bsz"])) if by_tokens]


def longest_row(config: Mapping[str, Any]) -> int:
    """Tokens of a prompt and its answer, as verl pads them."""
    return config["data"]["max_prompt_length"] + config["data"]["max_response_length"]


def length_problems(config: Mapping[str, Any]) -> list[str]:
    """Budgets of tokens and limits of vLLM that are below the longest row: verl stops on them, mostly after a whole rollout."""
    actor, rollout = config["actor_rollout_ref"]["actor"], config["actor_rollout_ref"]["rollout"]
    used = {"ref": config["algorithm"]["use_kl_in_reward"] or actor["use_kl_loss"], "critic": has_critic(config)}
    flat, longest = flatten(config), longest_row(config)
    # A row is spread over the GPUs of a sequence parallel group.
    limits = [(f"{name}_max_token_len_per_gpu", part["ulysses_sequence_parallel_size"])
              for name, part in counted_in_tokens(config) if used.get(name.split(".")[-2], True)]
    if rollout["name"] == "vllm":
        limits += [(f"actor_rollout_ref.rollout.{key}", 1) for key in ("max_model_len", "max_num_batched_tokens")
                   # Without a limit vLLM is given the longest row.
                   if key != "max_model_len" or rollout[key]]
    return [f"{key}={flat[key]} is less than {longest} tokens, the longest row (data.max_prompt_length + "
            f"data.max_response_length). Use {key}={-(-longest // times)} or more."
            for key, times in limits if (flat[key] or 0) * times < longest]


def model_problems(config: Mapping[str, Any], model_dir: Path, gpus: list[hardware.Gpu]) -> list[str]:
    """Whether the model can look at the longest row, and vLLM hold its part of the weights in its share of a GPU."""
    problems, rollout, longest = [], config["actor_rollout_ref"]["rollout"], model_folder.longest_sequence(model_dir)
    if longest is not None and longest_row(config) > longest:
        problems.append(f"data.max_prompt_length={config['data']['max_prompt_length']} + data.max_response_length="
                        f"{config['data']['max_response_length']} are more than the {longest} tokens that the model can look at "
                        "(its config.json). Make one of them smaller.")
    # 2 bytes each.
    weights = 2 * model_folder.parameter_count(model_dir) / rollout["tensor_model_parallel_size"]
    share = rollout["gpu_memory_utilization"] * min((gpu.memory for gpu in gpus), default=float("inf"))
    if rollout["name"] == "vllm" and weights >= share:
        problems.append(f"vLLM's share of a GPU, {share / 1e9:.3g} GB (actor_rollout_ref.rollout.gpu_memory_utilization="
                        f"{rollout['gpu_memory_utilization']}), does not hold the model's weights, {weights / 1e9:.3g} GB a GPU. "
                        "Raise it, or spread the model over more GPUs (TP=).")
    return problems


def columns(config: Mapping[str, Any]) -> list[str]:
    """Columns that the trainer reads."""
    return [config["data"]["prompt_key"], config["data"]["reward_fn_key"], "reward_model.ground_truth"]


def divisibility(config: Mapping[str, Any], world: int, heads: int | None) -> list[str]:
    """Which numbers do not divide at this number of GPUs (verl floors some in silence). heads: None if they are not known."""
    actor, critic, rollout = config["actor_rollout_ref"]["actor"], config["critic"], config["actor_rollout_ref"]["rollout"]
    batch, tp, answers = config["data"]["train_batch_size"], rollout["tensor_model_parallel_size"], rollout["n"]
    # verl counts both batches in prompts, and multiplies them by the answers to each before it divides.
    times = f" x {answers} (actor_rollout_ref.rollout.n)" if answers > 1 else ""
    faults = []
    if batch * answers % world:
        faults.append(f"data.train_batch_size={batch}{times} does not divide by {world} GPUs")
    for name, part in (("actor_rollout_ref.actor", actor), *([("critic", critic)] if has_critic(config) else [])):
        mini, micro, together = (part[key] for key in ("ppo_mini_batch_size", "ppo_micro_batch_size_per_gpu",
                                                       "ulysses_sequence_parallel_size"))
        if world % together:
            faults.append(f"{name}.ulysses_sequence_parallel_size={together} does not divide {world} GPUs")
            continue
        groups, said = world // together, f"{name}.ppo_mini_batch_size={mini}{times}"
        if mini * answers % groups:
            faults.append(f"{said} does not divide by {groups} {'GPUs' if together == 1 else 'groups of GPUs'}")
        elif micro and mini * answers // groups % micro:
            faults.append(f"{mini * answers // groups} rows a GPU ({said} / {groups}) do not divide by "
                          f"ppo_micro_batch_size_per_gpu={micro}")
        if mini > batch:
            faults.append(f"{name}.ppo_mini_batch_size={mini} is more than data.train_batch_size={batch}")
    if world % tp:
        faults.append(f"TP={tp} does not divide {world} GPUs")
    if heads and heads % tp:
        faults.append(f"TP={tp} does not divide the model's {heads} attention heads")
    return faults


def validation_problems(config: Mapping[str, Any], world: int, rows: int) -> list[str]:
    """Too few validation rows."""
    return ["there are no validation rows. Use more data."] if rows < 1 else []
