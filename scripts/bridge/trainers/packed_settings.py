"""Which settings go with the packed trainers, and what they mean there: what a plan asks before torch is imported."""

from collections.abc import Mapping
from typing import Any


def packing_problems(config: Mapping[str, Any]) -> list[str]:
    """Settings of SFT that do not go with packing; none where nothing is packed."""
    budget, longest = config["bridge"]["packed_tokens_per_gpu"], config["data"]["max_length"]
    if budget is None:
        return []
    problems = []
    if type(budget) is not int:
        problems.append(f"bridge.packed_tokens_per_gpu={budget} is no number of tokens. Use e.g. {16 * longest}, or null for "
                        "verl's own trainer, which pads.")
    elif budget < longest:
        problems.append(f"bridge.packed_tokens_per_gpu={budget} is less than the {longest} tokens that a row may have "
                        f"(data.max_length). Use at least {longest}, or null for verl's own trainer, which pads.")
    needed = {"model.strategy": (config["model"]["strategy"], "fsdp2"),
              "use_remove_padding": (config["use_remove_padding"], False),
              "ulysses_sequence_parallel_size": (config["ulysses_sequence_parallel_size"], 1),
              "data.balance_dp_token": (config["data"]["balance_dp_token"], False)}
    return problems + [f"{key}={value} does not go with packing. Use {key}={wanted}, or bridge.packed_tokens_per_gpu=null."
                       for key, (value, wanted) in needed.items() if value != wanted]


def averages_groups(part: Mapping[str, Any]) -> bool:
    """Whether actor or critic has a loss that trainers.packed_ppo averages over groups of rows: verl's defaults, by tokens."""
    return bool(part["use_dynamic_bsz"] and part["ppo_micro_batch_size_per_gpu"] and part["loss_agg_mode"] == "token-mean"
                and part.get("policy_loss", {}).get("loss_mode", "vanilla") == "vanilla")


def groups_rows(config: Mapping[str, Any], part: Mapping[str, Any]) -> bool:
    """Whether the loss of this part is averaged over groups of so many rows though micro batches are counted in tokens."""
    libraries = config["actor_rollout_ref"]["model"]["external_lib"], config["critic"]["model"]["external_lib"]
    return averages_groups(part) and "bridge.trainers.speedups" in libraries
