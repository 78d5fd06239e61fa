"""The sft stage: verl's FSDP SFT trainer under torchrun. What is particular to it; the rest is in train.py."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from bridge.trainers.packed_settings import packing_problems

# Columns of the data stage's that hold what is read, as in data.lengths.
TEXTS = ("extra_info.question", "extra_info.answer")


def modules(config: Mapping[str, Any]) -> list[str]:
    """Which trainer to run: verl's own, or the packed one where a budget of tokens is set."""
    return (["bridge.trainers.stoppable", "verl.trainer.fsdp_sft_trainer"] if config["bridge"]["packed_tokens_per_gpu"] is None
            else ["bridge.trainers.packed_sft"])


def environment(_env: Mapping[str, str]) -> dict[str, str]:
    """Variables of the trainer's own."""
    # Otherwise torchrun sets it itself, with a warning.
    return {"OMP_NUM_THREADS": "1"}


def command(ranks: int, modules: list[str], arguments: list[str], nodes: int = 1) -> list[str]:
    """torchrun with one process a GPU (or CPU rank)."""
    # torchrun would tell the ranks the node's name, which need not resolve.
    one = ["bridge.trainers.loopback", "torch.distributed.run", "--standalone", "--nnodes=1", "--local_addr=127.0.0.1"]
    return [sys.executable, "-u", "-m", *(one if nodes == 1 else ["bridge.trainers.nodes", "torch.distributed.run"]),
            f"--nproc_per_node={ranks}", "-m", *modules, *arguments]


def setting_problems(config: Mapping[str, Any], _overrides: Sequence[str] = ()) -> list[str]:
    """Frequencies that verl divides by, and settings that do not go with packing."""
    return [f"trainer.{key}={value}: verl divides by it. Use a number of steps, or -1 (only at the end)."
            for key in ("save_freq", "test_freq") if not (value := config["trainer"][key])] + packing_problems(config)


def columns(config: Mapping[str, Any]) -> list[str]:
    """Columns that the trainer reads; "a.b" is field b of the struct a."""
    data = config["data"]
    found = []
    for key, fields in ((data["prompt_key"], data["prompt_dict_keys"]),
                        (data["response_key"], data.get("response_dict_keys"))):
        found += [f"{key}.{name}" for name in fields] if fields else [key]
    return found


def divisibility(config: Mapping[str, Any], world: int, heads: int | None) -> list[str]:
    """Which numbers do not divide at this number of GPUs (verl checks them only after loading everything)."""
    batch, micro = config["data"]["train_batch_size"], config["data"]["micro_batch_size_per_gpu"]
    if batch % world:
        return [f"data.train_batch_size={batch} does not divide by {world} GPUs"]
    if (batch // world) % micro:
        return [f"{batch // world} rows a GPU (data.train_batch_size={batch} / {world}) do not divide by "
                f"data.micro_batch_size_per_gpu={micro}"]
    return []


def validation_problems(config: Mapping[str, Any], world: int, rows: int) -> list[str]:
    """Too few validation rows: verl would crash at the validation, before saving."""
    micro = config["data"]["micro_batch_size_per_gpu"]
    return [] if rows >= micro * world else [
        f"{rows} validation rows are less than {micro * world} (data.micro_batch_size_per_gpu={micro} x {world} GPUs). Use more "
        "data or fewer GPUs."]
