"""Watch a training of another terminal or node, from the files of its run alone:   bridge follow   (RUN=, STAGE=)"""

import time
from collections.abc import Mapping
from pathlib import Path

from bridge.errors import Tolerance, UsageError, say
from bridge.runs import metrics, progress, record
from bridge.settings import Settings


def run(settings: Settings, env: Mapping[str, str], arguments: list[str]) -> int:
    """Show it until it has ended; returns 0 then, whatever its own status."""
    if arguments:
        raise UsageError(f"follow takes no arguments; got {' '.join(arguments)}. RUN= and STAGE= say what is followed.")
    folder = chosen(settings)
    found = {"recorded": record.read(folder), "rows": metrics.read(folder / "metrics.jsonl")}
    tolerance = Tolerance(f"reading {folder}")

    def read() -> None:
        found["recorded"] = record.read(folder) or found["recorded"]
        found["rows"] = metrics.read(folder / "metrics.jsonl")

    def look() -> tuple[dict, list[dict]]:
        tolerance(read)
        return found["recorded"], found["rows"]

    if not found["rows"]:
        say(f"{folder.name} of run {settings.run!r} is {found['recorded']['status']}, and has made no step yet")
    with progress.Display(folder.name, folder, look) as display:
        # The newest line that was there before is shown as well.
        display.seen = display.state(found["rows"][:-1])
        display.update(at_once=True)
        while not display.lost and found["recorded"]["status"] == "running":
            display.update()
            time.sleep(progress.REFRESH)
    say(f"{folder.name} of run {settings.run!r}: {found['recorded']['status']}; the log is {folder / 'log.txt'}")
    return 0


def chosen(settings: Settings) -> Path:
    """The folder of the training that STAGE= names, or of the one that was begun last."""
    if settings.stage not in (None, *progress.METRICS):
        raise UsageError(f"STAGE={settings.stage}: only trainings are followed. Use STAGE={' or STAGE='.join(progress.METRICS)}.")
    names = [settings.stage] if settings.stage else [*progress.METRICS]
    begun = [folder for name in names if (folder := settings.stage_dir(name)).joinpath("run.json").is_file()]
    if not begun:
        there = sorted({file.parts[-3] for name in progress.METRICS
                        for file in settings.work_dir.glob(f"runs/*/{name}/run.json")})
        raise UsageError(f"run {settings.run!r} has no {' and no '.join(names)} that has begun (WORK_DIR={settings.work_dir}). "
                         f"Runs there: {', '.join(there) or 'none'}. RUN= and STAGE= say what is followed.")
    return max(begun, key=lambda folder: record.read(folder)["attempts"][-1]["started"])
