"""Checkpoints as verl 0.5.0's FSDPCheckpointManager leaves them, with small contents, and the records beside them."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from bridge import settings
from bridge.plan import Plan
from bridge.runs import checkpoints, record
from bridge.stages.table import STAGES

SAVED = {"sft": {".": checkpoints.ALL}, "ppo": {"actor": checkpoints.ALL, "critic": checkpoints.ALL},
         "grpo": {"actor": checkpoints.ALL}}

def write_shards(folder: Path, world_size: int = 2, kinds: tuple[str, ...] = checkpoints.ALL) -> None:
    (folder / "huggingface").mkdir(parents=True)
    (folder / "huggingface" / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (folder / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": world_size}))
    for begin in (checkpoints.SHARDS[kind][0] for kind in kinds):
        for rank in range(world_size):
            torch.save({"x": torch.zeros(64)}, folder / f"{begin}_world_size_{world_size}_rank_{rank}.pt")


def write_checkpoint(folder: Path, step: int, stage: str = "sft") -> Path:
    path = folder / f"global_step_{step}"
    for part in SAVED[stage]:
        write_shards(path / part)
    torch.save({"state": 1}, path / "data.pt")
    return path


def plan(env: Mapping[str, str], stage: str, *overrides: str) -> Plan:
    """What the door plans, in this process."""
    return STAGES[stage].plan(settings.read(env), dict(env), list(overrides), False)


def started(env: Mapping[str, str], stage: str, *overrides: str, steps: tuple[int, ...] = ()) -> Path:
    """A run that was ended by a signal after it had saved these steps; returns its checkpoints' folder."""
    planned = plan(env, stage, *overrides)
    planned.record_dir.mkdir(parents=True)
    record.write_json(planned.record_dir / "run.json", record.end(record.begin(planned, env), 137, max(steps, default=0)), [])
    (planned.record_dir / "log.txt").write_text("the log\n")
    rows = range(1, max(steps, default=0) + 1)
    (planned.record_dir / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in rows))
    for step in steps:
        path = planned.checkpoints / f"global_step_{step}"
        for part, kinds in planned.saved.items():
            write_shards(path / part, kinds=kinds)
        torch.save({"state": step}, path / "data.pt")
        checkpoints.record_checksums(path)
    return planned.checkpoints
