"""Stages of the door, run one after another in a folder of their own: what rehearse, bench and accept share."""

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from bridge import hardware
from bridge import settings as settings_module
from bridge.compose import compose
from bridge.environment import work_dir_problems
from bridge.errors import UsageError, refuse
from bridge.runs import launch, record
from bridge.settings import Settings, is_local
from bridge.stages import data, model, train

# Settings of the real run that say nothing here. No metrics of a trial are sent anywhere.
LEFT_OUT = ("WANDB_API_KEY", "STAGE", "STEP", "CKPT", "TP", "INIT", "ALGO", "SEED")
# Lies in every folder that is a tool's own: no other is written to, and nothing in another is removed.
MARK = ".made-by-bridge"
PARTS = ("data", "models", "runs", "cache")
# Exit statuses that say that a person or Slurm ended the work, so that nothing is to follow.
INTERRUPTED = (129, 130, 143)
LOCK_CURE = "Wait for it, or use another WORK_DIR."


@contextmanager
def own_folder(own: Settings, env: Mapping[str, str], removed: list[Path], new_model: bool) -> Iterator[None]:
    """Within this, own.work_dir is made, marked and locked, and `removed` is gone. new_model: whether it has yet to be made.
    A UsageError, before anything is removed: wrong settings, WORK_DIR not writable, the folder not ours, a link, or in use."""
    refuse(setting_problems(own, env, removed, new_model))
    folder = own.work_dir
    refuse(work_dir_problems(folder.parent) + [
        f"{path} is a link, and what lies behind it is not this tool's to change. Remove the link, or use another WORK_DIR."
        for path in (folder, *(folder / part for part in PARTS)) if path.is_symlink()])
    if folder.exists() and not (folder / MARK).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"{folder} was not made by this tool, or by an older version (it holds no {MARK}), so nothing in it is "
                         "changed or removed. Move it away or remove it yourself, or use another WORK_DIR.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()
    with record.locked(folder, LOCK_CURE):
        remove(removed)
        yield


def setting_problems(settings: Settings, env: Mapping[str, str], removed: list[Path], new_model: bool) -> list[str]:
    """What is wrong with GPUS, DATA_SOURCE and MODEL."""
    problems: list[str] = []
    sources = {"MODEL": settings.model_dir} if is_local(settings.model) else {}
    try:
        source = data.checked_source(settings.data_source)
        sources |= {"DATA_SOURCE": Path(source)} if source not in ("hub", "builtin") else {}
    except UsageError as error:
        problems += error.problems
    try:
        # As the model stage will, but for tiny, which is made from the data.
        if new_model and is_local(settings.model):
            model.already_there(settings.model, settings.model_dir)
        elif new_model and settings.model != "tiny":
            model.check_source(settings.model, Path(), env)
    except UsageError as error:
        problems += error.problems
    if hardware.visible_gpus(env):
        train.choose_hardware(settings, env, [], problems, dry_run=False)
    for stage, trainer in train.TRAINERS.items():
        config = compose(stage, [f"profile/{stage}={settings.profile}"], train.NAMES)
        problems += [f"GPUS={settings.gpus}: {fault}." for fault in trainer.divisibility(config, settings.gpus, None)]
    for name, source in sources.items():
        problems += [f"{name}={source} lies in {path}, which is removed first. Copy it elsewhere."
                     for path in removed if source.resolve().is_relative_to(path.resolve())]
    return problems


def made(settings: Settings, *more: Path) -> list[Path]:
    """What stages with these settings make, and `more`: nothing else in the own folder is ever removed."""
    own = [] if is_local(settings.model) else [settings.model_dir]
    return [settings.data_dir, *own, settings.run_dir, settings.work_dir / "cache", *more]


def remove(paths: list[Path]) -> None:
    """Remove these folders. What a link leads to stays. A UsageError: a stage works in one of them."""
    stage_dirs = [lock.parent for path in paths if not path.is_symlink() for lock in path.glob("*/.lock")]
    refuse(f"another run works in {stage_dir} ({holder}). {LOCK_CURE}" for stage_dir in stage_dirs
           if not stage_dir.is_symlink() and (holder := record.holder(stage_dir)))
    for path in paths:
        if path.is_symlink():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)


def inside(folder: Path, env: Mapping[str, str], **changes: str) -> tuple[Settings, dict[str, str]]:
    """The settings and the environment of stages that run in this folder."""
    own = {**{name: value for name, value in env.items() if name not in LEFT_OUT}, "WORK_DIR": str(folder),
            "RUN": "default", "PUBLIC": "0", "WANDB_MODE": "offline",
            # The tool begins anew next time: a stage that is ended must not promise that it goes on.
            "BRIDGE_TRIAL": "1", **changes}
    return settings_module.read(own), own


def stage(name: str, env: Mapping[str, str], arguments: Sequence[str] = (), log: Path | None = None,
          until: Callable[[], bool] = lambda: False) -> int:
    """Run a stage through the door, as a person would; returns its exit status. `log` and `until` as in launch.run."""
    return launch.run([sys.executable, "-m", "bridge", name, *arguments], env, log, None, record.secret_values(env), until)


def inputs(settings: Settings, own: Settings, env: Mapping[str, str], borrow_data: bool) -> int:
    """Link WORK_DIR's model, and its data if so, into the own folder, where they are there and it has none; make the rest.
    Returns the exit status of what failed, or 0."""
    shown = [(settings.data_dir, borrow_data), *([] if is_local(settings.model) else [(settings.model_dir, True)])]
    for path, wanted in shown:
        link = own.work_dir / path.relative_to(settings.work_dir)
        if link.is_symlink():
            link.unlink()
        if wanted and (path / "run.json").is_file() and not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    missing = [name for name, folder in (("data", own.data_dir), ("model", own.model_dir))
               if not (folder / "run.json").is_file()]
    return next((status for name in missing if (status := stage(name, env))), 0)
