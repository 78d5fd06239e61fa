"""Compose verl's configuration with ours without importing verl, so that the result can be checked before anything starts.
Hydra reads the same files as for verl's trainers, which find ours by `--config-dir configs --config-name STAGE`."""

import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bridge.errors import UsageError, nearest, refuse
from bridge.settings import CONFIGS

# Settings that are a number of things, of which there is at least one: what is checked here divides by them.
COUNT = re.compile(r".*(_batch_size|_per_gpu|_parallel_size|_length|\.nnodes|\.n|\.total_epochs|\.total_training_steps)")


def verl_config_dir() -> Path:
    """Folder of verl's own configuration, found without importing verl (which imports torch: 7 s)."""
    return Path(importlib.util.find_spec("verl").submodule_search_locations[0]) / "trainer" / "config"


def quote(value: str) -> str:
    """A value for Hydra's grammar, whatever is in it."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def compose(name: str, overrides: list[str], env: Mapping[str, str], folder: Path = CONFIGS) -> dict[str, Any]:
    """Compose NAME.yaml of this folder over verl's tree, resolved.
    overrides: in Hydra's grammar; the last one wins. env: what the interpolations need (WORK_DIR, BRIDGE_*)."""
    with patch.dict(os.environ, env), initialize_config_dir(str(folder), version_base=None):
        config = hydra_compose(name, overrides=[f"hydra.searchpath=[{quote(f'file://{verl_config_dir()}')}]", *overrides])
        return OmegaConf.to_container(config, resolve=True)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as {"a.b.c": leaf}; lists and empty dicts are leaves."""
    if not isinstance(config, dict) or not config:
        return {prefix: config}
    parts = (flatten(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in config.items())
    return {key: value for part in parts for key, value in part.items()}


def leaf(config: Mapping[str, Any], key: str) -> Any:
    """The value of "a.b.c", Ellipsis if there is none."""
    for part in key.split("."):
        if not isinstance(config, dict) or part not in config:
            return ...
        config = config[part]
    return config


def value_problem(name: str, key: str, value: Any, default: Any) -> str | None:
    """What is wrong with the value of a key which has this default; checks and trainers count on its being there and its kind."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and value == value
    problem = None
    if value is ...:
        return f"{key} would be gone, and it is read"
    if value is None:
        # verl takes null where its own default is null.
        verls_own = leaf(compose(f"{name}_trainer", [], {}, verl_config_dir()), key)
        problem = "cannot be null" if default is not None and verls_own not in (None, ...) else None
    elif isinstance(default, bool):
        problem = None if isinstance(value, bool) else "is True or False"
    elif (default is None or isinstance(default, int) and default > 0) and COUNT.fullmatch(key):
        problem = None if number and isinstance(value, int) and value > 0 else "has to be a whole number of at least 1"
    elif isinstance(default, int | float):
        problem = None if number else "is a number"
    elif isinstance(default, str):
        parts = value if isinstance(value, list) else [value]
        problem = None if all(isinstance(part, str) for part in parts) else "is a text (a number needs quotes: \"'3'\")"
    return problem and f"{key} {problem} (its default is {default})"


def compose_checked(name: str, own: list[str], user: list[str], env: Mapping[str, str],
                    owned: Mapping[str, str]) -> dict[str, Any]:
    """Compose with the door's own overrides and then the user's. owned: keys that only the door sets -> the setting to use.
    A UsageError names every override of the user that does not parse, whose key does not exist or is owned, or that takes away
    a key, a number or a truth value which is read."""
    base = flatten(config := compose(name, own, env))
    nodes = {key.rsplit(".", i)[0] for key in base for i in range(key.count(".") + 1)}
    problems, keys = [], {}
    for text in user:
        if text.startswith("-"):
            problems.append(f"{text!r} is no option of a stage. Options: --dry-run. Training settings are written "
                            "key=value, e.g. trainer.total_epochs=1.")
            continue
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            problems.append(f"{text!r} is not of the form key=value: {str(error).splitlines()[0]}.")
            continue
        key = override.key_or_group
        if key in owned:
            problems.append(f"{key} is set by the bridge. Use {owned[key]} instead of {text!r}.")
        elif key.split(".")[0] == "hydra" or key in ("profile/" + name, "memory/" + name):
            continue
        elif key not in nodes and override.type not in (OverrideType.ADD, OverrideType.FORCE_ADD):
            problems.append(f"{key!r} is not a setting of verl's {name} trainer.{nearest(key, nodes)} "
                            f"(A new key is written +{text}.)")
        else:
            keys[key] = text
    refuse(problems)
    try:
        config = compose(name, own + user, env) if user else config
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UsageError(f"the overrides {' '.join(user)} do not compose: {error}") from error
    for changed, text in keys.items():
        for key in (key for key in base if key == changed or key.startswith(f"{changed}.")):
            if key in owned and leaf(config, key) != base[key]:
                problems.append(f"{key} is set by the bridge. Use {owned[key]} instead of {text!r}.")
            elif problem := value_problem(name, key, leaf(config, key), base[key]):
                problems.append(f"{text!r}: {problem}.")
                # What holds for one key of a section mostly holds for all.
                break
    refuse(problems)
    return config
