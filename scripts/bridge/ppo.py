"""The ppo stage: verl's PPO trainer on Ray. What is particular to it; the rest is in train.py."""

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bridge.settings import Settings


def module(_config: Mapping[str, Any]) -> str:
    """Which trainer to run."""
    return "verl.trainer.main_ppo"


def environment(stage_dir: Path) -> dict[str, str]:
    """Variables of the trainer's own."""
    # Ray's sockets must be on a local disk, and their path has to stay below 107 bytes: short, and one a run.
    name = hashlib.sha256(str(stage_dir).encode()).hexdigest()[:8]
    return {"RAY_TMPDIR": f"/tmp/bridge-{os.getuid()}-{name}", "RAY_USAGE_STATS_ENABLED": "0"}


def overrides(settings: Settings) -> list[str]:
    """What the settings mean in verl's words."""
    keep = settings.keep or "null"
    found = [f"trainer.max_actor_ckpt_to_keep={keep}", f"trainer.max_critic_ckpt_to_keep={keep}"]
    if settings.tp:
        found.append(f"actor_rollout_ref.rollout.tensor_model_parallel_size={settings.tp}")
    return found


def command(ranks: int, module: list[str], arguments: list[str]) -> list[str]:
    """One process; Ray starts the workers."""
    return [sys.executable, "-u", "-m", "bridge.loopback", *module, *arguments]


def setting_problems(config: Mapping[str, Any], overrides: Sequence[str]) -> list[str]:
    """Overrides that would have no effect: numbers of rows where micro batches are counted in tokens."""
    actor_rollout, critic = config["actor_rollout_ref"], config["critic"]
    by_tokens = [
        ("actor_rollout_ref.actor.ppo_micro_batch_size", "ppo_max_token_len_per_gpu",
         actor_rollout["actor"]["use_dynamic_bsz"] and not groups_rows(config, actor_rollout["actor"])),
        ("actor_rollout_ref.rollout.log_prob_micro_batch_size", "log_prob_max_token_len_per_gpu",
         actor_rollout["rollout"]["log_prob_use_dynamic_bsz"]),
        ("actor_rollout_ref.ref.log_prob_micro_batch_size", "log_prob_max_token_len_per_gpu",
         actor_rollout["ref"]["log_prob_use_dynamic_bsz"]),
        ("critic.ppo_micro_batch_size", "ppo_max_token_len_per_gpu",
         critic["use_dynamic_bsz"] and not groups_rows(config, critic)),
        ("critic.forward_micro_batch_size", "forward_max_token_len_per_gpu", critic["use_dynamic_bsz"]),
    ]
    return [f"{text}: no effect, since micro batches are counted in tokens here (use_dynamic_bsz). Use "
            f"{key.rpartition('.')[0]}.{tokens}, or PROFILE=tutorial, which counts rows."
            for key, tokens, active in by_tokens if active for text in overrides if text.lstrip("+").startswith(key)]


def averages_groups(part: Mapping[str, Any]) -> bool:
    """Whether actor or critic has a loss that bridge.packed_ppo averages over groups of rows: verl's defaults, by tokens."""
    return bool(part["use_dynamic_bsz"] and part["ppo_micro_batch_size_per_gpu"] and part["loss_agg_mode"] == "token-mean"
                and part.get("policy_loss", {}).get("loss_mode", "vanilla") == "vanilla")


def groups_rows(config: Mapping[str, Any], part: Mapping[str, Any]) -> bool:
    """Whether the loss of this part is averaged over groups of so many rows though micro batches are counted in tokens."""
    libraries = config["actor_rollout_ref"]["model"]["external_lib"], config["critic"]["model"]["external_lib"]
    return averages_groups(part) and any(name in ("bridge.speedups", "bridge.profiled") for name in libraries)


def setting_notes(config: Mapping[str, Any], overrides: Sequence[str]) -> list[str]:
    """What an override changes that its name does not say."""
    parts = {"actor_rollout_ref.actor": config["actor_rollout_ref"]["actor"], "critic": config["critic"]}
    return [f"{text}: rows whose tokens the loss averages together. How many are computed at once is "
            f"{name}.ppo_max_token_len_per_gpu"
            for name, part in parts.items() if groups_rows(config, part)
            for text in overrides if text.lstrip("+").startswith(f"{name}.ppo_micro_batch_size")]


def memory_problems(config: Mapping[str, Any], parameters: int, memory: int) -> list[str]:
    """Whether vLLM can hold its part of the weights (2 bytes each) in its share of a GPU with so many bytes of memory."""
    rollout = config["actor_rollout_ref"]["rollout"]
    share, weights = rollout["gpu_memory_utilization"] * memory, 2 * parameters / rollout["tensor_model_parallel_size"]
    if rollout["name"] != "vllm" or weights < share:
        return []
    return [f"vLLM's share of a GPU, {share / 1e9:.3g} GB (actor_rollout_ref.rollout.gpu_memory_utilization="
            f"{rollout['gpu_memory_utilization']}), does not hold the model's weights, {weights / 1e9:.3g} GB a GPU. Raise it, "
            "or spread the model over more GPUs (TP=)."]


def columns(config: Mapping[str, Any]) -> list[str]:
    """Columns that the trainer reads."""
    return [config["data"]["prompt_key"], config["data"]["reward_fn_key"], "reward_model.ground_truth"]


def divisibility(config: Mapping[str, Any], world: int, heads: int | None) -> list[str]:
    """Which numbers do not divide at this number of GPUs (verl floors some of them in silence).

    Args:
        heads: attention heads of the model; None if not known.
    """
    actor, critic, rollout = config["actor_rollout_ref"]["actor"], config["critic"], config["actor_rollout_ref"]["rollout"]
    batch, tp = config["data"]["train_batch_size"], rollout["tensor_model_parallel_size"]
    faults = []
    if batch * rollout["n"] % world:
        faults.append(f"data.train_batch_size={batch} does not divide by {world} GPUs")
    for name, part in (("actor_rollout_ref.actor", actor), ("critic", critic)):
        mini, micro = part["ppo_mini_batch_size"], part["ppo_micro_batch_size_per_gpu"]
        if mini % world:
            faults.append(f"{name}.ppo_mini_batch_size={mini} does not divide by {world} GPUs")
        elif micro and (mini // world) % micro:
            faults.append(f"{mini // world} rows a GPU ({name}.ppo_mini_batch_size={mini} / {world}) do not divide by "
                          f"ppo_micro_batch_size_per_gpu={micro}")
        if mini > batch:
            faults.append(f"{name}.ppo_mini_batch_size={mini} is more than data.train_batch_size={batch}")
    if world % tp:
        faults.append(f"TP={tp} does not divide {world} GPUs")
    if heads and heads % tp:
        faults.append(f"TP={tp} does not divide the model's {heads} attention heads")
    return faults


def row_problems(config: Mapping[str, Any], world: int, train_rows: int, val_rows: int) -> list[str]:
    """Too little data for one step."""
    batch = config["data"]["train_batch_size"]
    problems = []
    if train_rows < batch:
        problems.append(f"{train_rows} training rows are less than one batch of {batch}. Use more data, or a smaller "
                        "data.train_batch_size.")
    if val_rows < 1:
        problems.append("there are no validation rows. Use more data.")
    return problems
