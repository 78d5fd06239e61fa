"""What a stage hands to the door: what is to be run, and what is to be kept of it."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Plan:
    """What a stage wants run. Made without side effects, so a dry run can show it."""

    command: list[str]  # run as a child process; its output is shown (and logged)
    env: dict[str, str]  # what the command needs beside the user's environment; never a secret
    record_dir: Path  # where run.json goes
    keep_log: bool = True  # whether record_dir/log.txt and metrics.jsonl are kept
    notes: list[str] = field(default_factory=list)  # said to the user before the start
    config: dict | None = None  # the resolved training configuration
    inputs: dict | None = None  # fingerprints of what is read, compared before a run is continued
    resume_step: int = 0  # step of the checkpoint that is continued from; 0 for a fresh start
    finished: str | None = None  # why there is nothing left to do; None if there is
    checkpoints: Path | None = None  # folder that verl saves into; None for stages without
    saved: Mapping[str, tuple[str, ...]] | None = None  # what a checkpoint there holds, as in checkpoints.contents
    keep: int | None = None  # how many complete checkpoints stay; None keeps all
    steps_per_epoch: int = 0  # optimizer steps (SFT) or rollout batches (PPO) in one pass over the data
    steps: int = 0  # of the whole training
    hang_seconds: int | None = None  # as in runs.hang.Watch

    def show(self) -> None:
        """Print the command so that it can be pasted into a shell. It holds no secret: those are in the environment."""
        print("+ " + shlex.join(["env", *(f"{name}={value}" for name, value in self.env.items()), *self.command]), flush=True)
