"""Compose verl's configuration with ours, as verl's trainer will, but without importing verl.

verl's trainers find our file by `--config-dir configs --config-name STAGE`; here Hydra reads the same files, so that the
result can be checked before anything starts.
"""

import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bridge.errors import UsageError, nearest
from bridge.settings import CONFIGS


def verl_config_dir() -> Path:
    """Folder of verl's own configuration, found without importing verl (which imports torch: 7 s)."""
    spec = importlib.util.find_spec("verl")
    return Path(spec.submodule_search_locations[0]) / "trainer" / "config"


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Let ${oc.env:NAME} see these values."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def compose(name: str, overrides: list[str], env: Mapping[str, str]) -> dict[str, Any]:
    """Compose configs/NAME.yaml over verl's tree, resolved.

    Args:
        name: "sft" or "ppo".
        overrides: in Hydra's grammar; the last one wins.
        env: what the interpolations need (WORK_DIR, BRIDGE_*).
    """
    tree = str(verl_config_dir()).replace("\\", "\\\\").replace('"', '\\"')
    with environment(env), initialize_config_dir(str(CONFIGS), version_base=None):
        config = hydra_compose(name, overrides=[f'hydra.searchpath=["file://{tree}"]', *overrides])
        return OmegaConf.to_container(config, resolve=True)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as {"a.b.c": leaf}; lists and empty dicts are leaves."""
    if not isinstance(config, dict) or not config:
        return {prefix: config}
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def compose_checked(name: str, own: list[str], user: list[str], env: Mapping[str, str],
                    owned: Mapping[str, str]) -> dict[str, Any]:
    """Compose with the door's own overrides and then the user's, after checking the user's.

    Args:
        own: overrides of the door.
        user: overrides of the user, from the command line.
        owned: keys that only the door sets -> the setting to use instead.

    Raises:
        UsageError: every override that does not parse, whose key does not exist (with the nearest that does), that the
            door owns, or that puts text where a number or a truth value stands.
    """
    base = flatten(compose(name, own, env))
    nodes = {key.rsplit(".", i)[0] for key in base for i in range(key.count(".") + 1)}
    groups = {"profile/" + name, "memory/" + name}
    problems, numbers = [], []
    parser = OverridesParser.create()
    for text in user:
        if text.startswith("-"):
            problems.append(f"{text!r} is no option of a stage. Options: --dry-run. Training settings are written "
                            "key=value, e.g. trainer.total_epochs=1.")
            continue
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            problems.append(f"{text!r} is not of the form key=value: {str(error).splitlines()[0]}.")
            continue
        key = override.key_or_group
        if key in owned:
            problems.append(f"{key} is set by the bridge. Use {owned[key]} instead of {text!r}.")
        elif key.split(".")[0] == "hydra" or key in groups or override.type == OverrideType.ADD:
            continue
        elif key not in nodes and override.type != OverrideType.FORCE_ADD:
            problems.append(f"{key!r} is not a setting of verl's {name} trainer.{nearest(key, nodes)} "
                            f"(A new key is written +{text}.)")
        elif isinstance(base.get(key), bool | int | float):
            numbers.append((key, text))
    if problems:
        raise UsageError(*problems)
    try:
        config = compose(name, own + user, env)
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(f"the overrides {' '.join(user)} do not compose: {error}") from error
    flat = flatten(config)
    for key, text in numbers:
        wanted = bool if isinstance(base[key], bool) else (int, float)
        if flat[key] is not None and (not isinstance(flat[key], wanted) or isinstance(flat[key], bool) != isinstance(
                base[key], bool)):
            kind = "True or False" if wanted is bool else "a number"
            problems.append(f"{text!r}: {key} is {kind} (its default is {base[key]}).")
    if problems:
        raise UsageError(*problems)
    return config
