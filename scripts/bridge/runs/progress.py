"""How far a training is: what is shown while it goes, by the door itself or from the files of its run (bridge follow)."""

import os
import re
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

from bridge.errors import Tolerance, say
from bridge.runs import checkpoints

# Seconds between two looks at a run, and at its checkpoints, whose folder may be on a slow disk.
REFRESH, CHECKPOINTS = 0.5, 5
# Seconds without a step: from which on they are told, and after which a line tells of it where there is no terminal.
QUIET, SILENCE = 60, 300
# Behind colours, Ray's and torchrun's prefixes. A model may write the word, too.
OWN = re.compile(r"(?:\x1b\[[\d;]*m|\(\w+ pid=[^)]*\)|\[\w+\]:|\s)*bridge: (.*\S)")
TROUBLE = re.compile(r"NCCL WARN|WARN: grad_norm|out of memory")
MOST_TOLD = 100
# Newest rows in which a value is looked for.
KNOWN = 1000
# Stage -> what is shown of verl's metrics: word, key (or its beginning, with a *), format.
METRICS = {
    "sft": (("loss", "train/loss", ".3f"), ("validation loss", "val/loss", ".3f")),
    "ppo": (("reward", "critic/score/mean", ".3f"), ("length", "response_length/mean", ".0f"),
            ("validation", "val-core/*", ".3f")),
}


def fields(stage: str, recorded: Mapping[str, Any], rows: Sequence[Mapping[str, float]], saved: int,
           now: float) -> dict[str, str]:
    """What is told of a training, {word: value}.
    recorded: its run.json; rows: of metrics.jsonl; saved: step of the newest whole checkpoint (0: none); now: s since 1970."""
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
    for row in rows[-KNOWN:]:
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
    """Shows a training as `look` gives it: one block on a terminal, else a line a step. What cannot be shown ends no run."""

    def __init__(self, stage: str, stage_dir: Path, look: Callable[[], tuple[Mapping[str, Any], Sequence[Mapping[str, float]]]]):
        self.stage, self.stage_dir, self.look = stage, stage_dir, look
        self.console = Console(highlight=False, soft_wrap=True, force_terminal=sys.stdout.isatty())
        self.live = None
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self.live = Live(console=self.console, auto_refresh=False)
        self.looked, self.looked_for_saves = 0.0, time.monotonic()
        self.shown, self.seen, self.told, self.lost = time.monotonic(), (), set[str](), False
        self.looking, self.saved = Tolerance("looking for checkpoints"), 0

    def __enter__(self) -> "Display":
        self.attempt(self.begin)
        return self

    def __exit__(self, *_) -> None:
        self.update(at_once=True)
        self.attempt(lambda: self.live and self.live.stop())

    def begin(self) -> None:
        """Show nothing of what there was before."""
        self.seen = self.state(self.look()[1][-1:])
        if self.live:
            self.live.start()

    def attempt(self, work: Callable[[], object]) -> None:
        """Do what shows something, until that fails."""
        try:
            if not self.lost:
                work()
        except OSError:
            # Nobody reads any more: the terminal was closed, or `| head` has ended.
            self.lost = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except Exception as error:  # noqa: BLE001 - whatever it is, hours of training must not end by it
            self.lost = True
            say(f"the training goes on, but is shown no more: {error!r}. The log is {self.stage_dir / 'log.txt'}")

    @staticmethod
    def state(rows: Sequence[Mapping[str, float]]) -> tuple:
        """What changes with each line of metrics: a validation's come after those of its step."""
        return (rows[-1]["step"], len(rows[-1])) if rows else ()

    def update(self, at_once: bool = False) -> None:
        """Show what is new, some times a second at most."""
        if time.monotonic() - self.looked > REFRESH or at_once:
            self.attempt(lambda: self.show(at_once))

    def show(self, at_once: bool) -> None:
        """Look, and show what is new."""
        self.looked, (recorded, rows) = (now := time.monotonic()), self.look()
        if now - self.looked_for_saves > CHECKPOINTS or at_once:
            self.looked_for_saves = now
            self.looking(self.look_for_saves)
        if self.live:
            told = fields(self.stage, recorded, rows, self.saved, time.time())
            return self.live.update(self.block(recorded, told), refresh=True)
        new = len(rows)
        while new and self.state(rows[new - 1:new]) > self.seen:
            new -= 1
        # Where nothing is new for long, the last line once more.
        counts = range(new + 1, len(rows) + 1) or [len(rows)] * (now - self.shown > SILENCE)
        for count in counts:
            told = fields(self.stage, recorded, rows[:count], self.saved, time.time())
            print(self.stage, ", ".join(" ".join(found) for found in told.items()), flush=True)
            self.shown = now
        self.seen = self.state(rows[-1:])

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
        """What a trainer printed: shown, once, are the bridge's own words, which each rank says, and what tells of trouble."""
        found = OWN.match(line)
        text = f"bridge: {found[1]}" if found else line.strip() if TROUBLE.search(line) else ""
        if text and text not in self.told and len(self.told) < MOST_TOLD:
            self.told.add(text)
            self.attempt(lambda: print(text, flush=True))
