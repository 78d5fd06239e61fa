"""Stages of the door, run one after another in a folder of their own: what rehearse, bench and accept share."""

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from bridge import launch, runs
from bridge.errors import UsageError
from bridge.main import work_dir_problems
from bridge.settings import Settings, is_local

# Settings of the real run that say nothing here. No metrics of a trial are sent anywhere.
LEFT_OUT = ("WANDB_API_KEY", "STAGE", "STEP", "CKPT", "TP", "INIT")


@contextmanager
def own_folder(settings: Settings, name: str, empty: bool) -> Iterator[Path]:
    """The folder WORK_DIR/NAME, locked; `empty`: the folders in it are removed first.

    Raises:
        UsageError: WORK_DIR cannot be written to, or another process works in the folder.
    """
    problems = work_dir_problems(settings.work_dir)
    if problems:
        raise UsageError(*problems)
    folder = settings.work_dir / name
    folder.mkdir(parents=True, exist_ok=True)
    with runs.locked(folder):
        for path in folder.iterdir() if empty else ():
            if path.is_dir():
                shutil.rmtree(path)
        yield folder


def environment(env: Mapping[str, str], folder: Path, **changes: str) -> dict[str, str]:
    """The environment of stages that run in this folder."""
    return {**{name: value for name, value in env.items() if name not in LEFT_OUT}, "WORK_DIR": str(folder),
            "RUN": "default", "PUBLIC": "0", "WANDB_MODE": "offline", **changes}


def stage(name: str, env: Mapping[str, str], arguments: list[str] | None = None, log: Path | None = None,
          until: Callable[[], bool] = lambda: False) -> int:
    """Run a stage through the door, as a person would; returns its exit status. `log` and `until` as in launch.run."""
    return launch.run([sys.executable, "-m", "bridge", name, *(arguments or [])], env, log, None, runs.secret_values(env),
                      until=until)


def borrow(settings: Settings, folder: Path, data: bool) -> None:
    """Show the model of WORK_DIR, and if `data` its data, in this folder too, where they are there and it has none."""
    shown = [(settings.data_dir, data), *([] if is_local(settings.model) else [(settings.model_dir, True)])]
    for path, wanted in shown:
        link = folder / path.relative_to(settings.work_dir)
        if link.is_symlink():
            link.unlink()
        if wanted and (path / "run.json").is_file() and not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)


def interrupted(status: int) -> bool:
    """Whether an exit status says that a person or Slurm ended the work, so that nothing is to follow."""
    return status in (129, 130, 143)


def last_lines(file: Path, count: int) -> list[str]:
    """The end of a log, without the intermediate states of progress bars."""
    text = file.read_bytes().decode(errors="replace") if file.is_file() else ""
    return [line.rsplit("\r", 1)[-1][:500] for line in text.rstrip().split("\n")[-count:]]


def table(rows: list[tuple[str, float, str]]) -> str:
    """A closing table: what, seconds, what came out; the last line sums up."""
    total = sum(seconds for _, seconds, _ in rows)
    width = max(11, *(len(name) + 2 for name, _, _ in rows))
    lines = [f"{'stage':<{width}}{'seconds':>8}  what came out"]
    lines += [f"{name:<{width}}{seconds:>8.1f}  {text}" for name, seconds, text in [*rows, ("all", total, "")]]
    return "\n".join(line.rstrip() for line in lines)
