"""The stage table: what there is, in the order of the chain, and what each hands to the door."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module

from bridge.plan import Plan
from bridge.settings import Settings


@dataclass(frozen=True)
class Stage:
    """One row of the table."""

    name: str  # the word of the domain: in make, the module, the configuration, the folder, the wandb run
    help: str
    needs: tuple[str, ...] = ()  # settings without which it cannot start (all missing ones are named at once)
    trains: bool = False  # whether it takes Hydra overrides and is run by verl

    def plan(self, settings: Settings, env: Mapping[str, str], overrides: list[str], dry_run: bool) -> Plan:
        """Check everything that can be checked cheaply and say what to run."""
        if self.trains:
            return import_module("bridge.stages.train").plan(self.name, settings, env, overrides, dry_run)
        return import_module(f"bridge.stages.{self.name}").plan(settings, env)


STAGES = {stage.name: stage for stage in (
    Stage("data", "GSM8K as parquet files (DATA_SOURCE=)"),
    Stage("model", "the base model (MODEL=)"),
    Stage("sft", "supervised fine-tuning with verl", trains=True),
    Stage("ppo", "PPO with verl (INIT=base|sft)", trains=True),
    Stage("merge", "checkpoint -> Hugging Face model, verified (STAGE=sft|ppo)"),
    Stage("eval", "accuracy on GSM8K of the base, SFT and PPO model (LIMIT=, STAGE=)"),
    Stage("upload", "merged model -> HF_REPO, private unless PUBLIC=1", needs=("HF_REPO",)),
)}

