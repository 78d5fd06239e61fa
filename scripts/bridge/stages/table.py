"""The stage table, configs/stages.yaml, and what each stage hands to the door."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

import yaml

from bridge.plan import Plan
from bridge.settings import CONFIGS, Settings


@dataclass(frozen=True)
class Stage:
    """One row of the table, which says what they are."""

    name: str
    help: str
    needs: Sequence[str] = ()
    trains: bool = False

    def plan(self, settings: Settings, env: Mapping[str, str], overrides: list[str], dry_run: bool) -> Plan:
        """Check everything that can be checked cheaply and say what to run."""
        if self.trains:
            return import_module("bridge.stages.train").plan(self.name, settings, env, overrides, dry_run)
        return import_module(f"bridge.stages.{self.name}").plan(settings, env)


TABLE: dict[str, dict] = yaml.safe_load((CONFIGS / "stages.yaml").read_text(encoding="utf-8"))
STAGES = {name: Stage(name, **row) for name, row in TABLE.items()}
