"""The stage table: what there is, in the order of the chain, and what each hands to the door."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from bridge.settings import Settings


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
    """

    command: list[str]
    env: dict[str, str]
    record_dir: Path
    keep_log: bool
    notes: list[str] = field(default_factory=list)
    config: dict | None = None
    inputs: dict | None = None
    resume_step: int = 0
    finished: str | None = None
    checkpoints: Path | None = None
    saved: Mapping[str, tuple[str, ...]] | None = None
    keep: int | None = None
    steps_per_epoch: int = 0


@dataclass(frozen=True)
class Stage:
    """One row of the table.

    Attributes:
        name: the word of the domain: in make, the module, the configuration, the folder, the wandb run.
        help: one line.
        needs: settings without which the stage cannot start (all missing ones are named at once).
        trains: whether it takes Hydra overrides and is run by verl.
        imports_torch: whether its command begins with seconds of imports.
    """

    name: str
    help: str
    needs: tuple[str, ...] = ()
    trains: bool = False
    imports_torch: bool = False

    def plan(self, settings: Settings, env: Mapping[str, str], overrides: list[str], dry_run: bool) -> Plan:
        """Check everything that can be checked cheaply and say what to run."""
        if self.trains:
            return import_module("bridge.stages.train").plan(self.name, settings, env, overrides, dry_run)
        return import_module(f"bridge.stages.{self.name}").plan(settings, env)


STAGES = {
    stage.name: stage
    for stage in (
        Stage("data", "GSM8K as parquet files (DATA_SOURCE=)"),
        Stage("model", "the base model (MODEL=)"),
        Stage("sft", "supervised fine-tuning with verl", trains=True, imports_torch=True),
        Stage("ppo", "PPO with verl (INIT=base|sft)", trains=True, imports_torch=True),
        Stage("merge", "checkpoint -> Hugging Face model, verified (STAGE=sft|ppo)", imports_torch=True),
        Stage("eval", "accuracy on GSM8K of the base, SFT and PPO model (LIMIT=, STAGE=)", imports_torch=True),
        Stage("upload", "merged model -> HF_REPO, private unless PUBLIC=1", needs=("HF_REPO",)),
    )
}

# Not stages of the chain: they run in the door's own process and leave no record.
TOOLS = {
    "check": "test this environment (--json)",
    "rehearse": "the whole chain, small, on this machine",
    "plot": "curves of runs over each other (RUN... --keys=a,b --mean=N --output=FILE)",
    "bench": "how fast the trainings are (CASES=; --report FILE.json)",
    "accept": "the acceptance test of a GPU node, about ten minutes",
}
