"""What a stage hands to the door: what is to be run, and what is to be kept of it."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Plan:
    """What a stage wants run. Made without side effects, so a dry run can show it.

    Attributes:
        command: run as a child process; its output is shown (and logged).
        env: what the command needs beside the user's environment. Never a secret.
        record_dir: where run.json goes.
        keep_log: whether record_dir/log.txt and metrics.jsonl are kept.
        notes: said to the user before the start.
        config: the resolved training configuration; None where there is none.
        inputs: fingerprints of what is read, compared before a run is continued.
        resume_step: step of the checkpoint that is continued from; 0 for a fresh start.
        finished: why there is nothing left to do; None if there is.
        checkpoints: folder that verl saves into; None for stages without.
        saved: what a checkpoint there holds, as in checkpoints.contents.
        keep: how many complete checkpoints stay; None keeps all.
        steps_per_epoch: optimizer steps (SFT) or rollout batches (PPO) in one pass over the data.
        hang_seconds: as in runs.hang.Watch.
    """

    command: list[str]
    env: dict[str, str]
    record_dir: Path
    keep_log: bool = True
    notes: list[str] = field(default_factory=list)
    config: dict | None = None
    inputs: dict | None = None
    resume_step: int = 0
    finished: str | None = None
    checkpoints: Path | None = None
    saved: Mapping[str, tuple[str, ...]] | None = None
    keep: int | None = None
    steps_per_epoch: int = 0
    hang_seconds: int | None = None

    def show(self) -> None:
        """Print the command so that it can be pasted into a shell. It holds no secret: those are in the environment."""
        assignments = [f"{name}={value}" for name, value in self.env.items()]
        print("+ " + shlex.join(["env", *assignments, *self.command]), flush=True)
