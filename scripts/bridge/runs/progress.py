"""How far a training is: what is shown while it goes, by the door itself or from the files of its run (bridge follow)."""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table

from bridge.errors import Tolerance
from bridge.runs import checkpoints

# Seconds between two looks at a run, and at its checkpoints, whose folder may be on a slow disk.
REFRESH, CHECKPOINTS = 0.5, 5
# Seconds without a step from which on they are told.
QUIET = 60
# Stage -> what is shown of verl's metrics: word, key (or its beginning, with a *), format.
METRICS = {
    "sft": (("loss", "train/loss", ".3f"), ("validation loss", "val/loss", ".3f")),
    "ppo": (("reward", "critic/score/mean", ".3f"), ("length", "response_length/mean", ".0f"),
            ("validation", "val-core/*", ".3f")),
}


def fields(stage: str, recorded: Mapping[str, Any], rows: Sequence[Mapping[str, float]], saved: int,
           now: float) -> dict[str, str]:
    """What is told of a training, {word: value}.

    recorded: its run.json; rows: of its metrics.jsonl; saved: step of the newest whole checkpoint, 0 for none; now: s since 1970.
    """
    attempt, total = recorded["attempts"][-1], recorded.get("steps")
    step = max(attempt["from_step"], *(row["step"] for row in rows[-1:]), 0)
    found = {"step": f"{step}/{total}" if total else str(step)}
    began = datetime.fromisoformat(attempt["started"]).timestamp()
    own = [row for row in rows if row.get("time", 0) >= began and row["step"] > attempt["from_step"]]
    if len(own) > 1:
        # With saves and validations.
        pace = (own[-1]["time"] - own[0]["time"]) / max(1, own[-1]["step"] - own[0]["step"])
        found["s/step"] = f"{pace:.3g}"
        if total and recorded["status"] == "running":
            found["left"] = duration(own[-1]["time"] + pace * (total - step) - now)
    if recorded["status"] == "running":
        if attempt.get("job_end"):
            found["job ends in"] = duration(float(attempt["job_end"]) - now)
        if (quiet := now - (own[-1]["time"] if own else began)) > QUIET:
            found["no step for"] = duration(quiet)

    known = {}
    for row in rows:
        known |= row

    def latest(key: str) -> float | None:
        names = [name for name in known if name.startswith(key[:-1])] if key.endswith("*") else [key]
        return known.get(next(iter(names), ""))

    if rate := latest("perf/throughput"):
        trainer = recorded["config"]["trainer"]
        # verl's is that of one GPU.
        found["tokens/s"] = f"{rate * trainer['n_gpus_per_node'] * trainer['nnodes']:,.0f}"
    found |= {word: f"{value:{form}}" for word, key, form in METRICS[stage] if (value := latest(key)) is not None}
    # Without a GPU verl's PPO tells the machine's.
    if attempt["gpus"] and (memory := latest("perf/max_memory_reserved_gb")):
        found["GPU memory"] = f"{memory:.1f} GB"
    found["checkpoint"] = str(saved or "none")
    return found


def duration(seconds: float) -> str:
    """Hours, minutes and seconds; those that are over are none."""
    return str(timedelta(seconds=round(max(0, seconds))))


class Display:
    """Shows a training: on a terminal one block that changes, elsewhere a line a step. That it cannot be shown ends nothing.

    look: gives the record and the rows of its metrics as they are now.
    """

    def __init__(self, stage: str, stage_dir: Path, look: Callable[[], tuple[Mapping[str, Any], Sequence[Mapping[str, float]]]]):
        self.stage, self.stage_dir, self.look = stage, stage_dir, look
        self.console = Console(highlight=False, soft_wrap=True)
        self.live = None
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self.live = Live(console=self.console, auto_refresh=False)
        self.looked = self.looked_for_saves = 0.0
        self.looking = Tolerance("looking for checkpoints")
        self.seen, self.saved, self.told, self.lost = None, 0, set[str](), False

    def __enter__(self) -> "Display":
        self.seen = self.state(self.look()[1])
        self.attempt(lambda: self.live and self.live.start())
        return self

    def __exit__(self, *_) -> None:
        self.update(at_once=True)
        self.attempt(lambda: self.live and self.live.stop())

    def attempt(self, work: Callable[[], object]) -> None:
        """Do what shows something, until nobody reads any more: the terminal was closed, or `| head` has ended."""
        try:
            if not self.lost:
                work()
        except OSError:
            self.lost = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    @staticmethod
    def state(rows: Sequence[Mapping[str, float]]) -> tuple:
        """What changes with each line of metrics: a validation's come after those of its step."""
        return (rows[-1]["step"], len(rows[-1])) if rows else ()

    def update(self, at_once: bool = False) -> None:
        """Show what is new, some times a second at most."""
        now = time.monotonic()
        if self.lost or (now - self.looked < REFRESH and not at_once):
            return
        self.looked, (recorded, rows) = now, self.look()
        if now - self.looked_for_saves > CHECKPOINTS or at_once:
            self.looked_for_saves = now
            self.looking(self.look_for_saves)
        if self.live:
            shown = fields(self.stage, recorded, rows, self.saved, time.time())
            return self.attempt(lambda: self.live.update(self.block(recorded, shown), refresh=True))
        new = [count for count in range(1, len(rows) + 1) if self.state(rows[:count]) > self.seen]
        for count in new:
            shown = fields(self.stage, recorded, rows[:count], self.saved, time.time())
            text = ", ".join(f"{word} {value}" for word, value in shown.items())
            self.attempt(lambda text=text: print(f"{self.stage} {text}", flush=True))
        self.seen = self.state(rows)

    def look_for_saves(self) -> None:
        """Take in the newest checkpoint that the door has seen whole."""
        self.saved = max((step for step, path in checkpoints.step_folders(self.stage_dir / "checkpoints")
                          if (path / checkpoints.CHECKSUMS).is_file()), default=0)

    def block(self, recorded: Mapping[str, Any], shown: Mapping[str, str]) -> Panel:
        """What a terminal shows."""
        step, _, total = shown["step"].partition("/")
        whole, table = Table.grid(expand=True), Table.grid(padding=(0, 2), expand=True)
        cells = [f"[dim]{word}[/] [bold]{value}[/]" for word, value in shown.items()]
        columns = max(1, min(len(cells), (self.console.width - 4) // 26))
        for place in range(0, len(cells), columns):
            table.add_row(*cells[place:place + columns])
        if total:
            whole.add_row(ProgressBar(int(total), int(step), complete_style="cyan", finished_style="green"))
        whole.add_row(table)
        trainer = recorded["config"]["trainer"]
        where = f"{trainer['n_gpus_per_node'] * trainer['nnodes']} x {next(iter(recorded['attempts'][-1]['gpus']), 'CPU rank')}"
        return Panel(whole, title=escape(f"{self.stage}, run {self.stage_dir.parent.name}, {where}"), title_align="left",
                     subtitle=escape(str(self.stage_dir / "log.txt")), subtitle_align="right")

    def output(self, line: str) -> None:
        """What a trainer printed: shown if it is the bridge's own word, once, since each rank says it."""
        _, found, text = line.rstrip().partition("bridge: ")
        if found and text not in self.told:
            self.told.add(text)
            self.attempt(lambda: print(f"bridge: {text}", flush=True))
