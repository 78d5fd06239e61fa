"""Read verl's console metrics and keep them as one JSON line a step, since verl's tracking has no file backend.

Its console prints `step:N - key:value - ...` (verl/utils/logger), also behind Ray's prefix, and more than once a step.
"""

import json
import re
import time
from contextlib import suppress
from pathlib import Path

from bridge.errors import write_whole

LINE = re.compile(r"(?<![\w/])step:(\d+) - (.*)")
ITEM = re.compile(r"(?:^| - )([^\s:]+):(-?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|inf|nan))(?= - |\s|$)")


def parse(line: str) -> tuple[int, dict[str, float]] | None:
    """Return (step, values) of a line of output, None if it holds no metrics."""
    if not (match := LINE.search(line)):
        return None
    values = {key: float(value) for key, value in ITEM.findall(match[2])}
    return (int(match[1]), values) if values else None


def write_all(file, data: bytes) -> None:
    """Write to an unbuffered file, which may take a part at a time."""
    while data:
        data = data[file.write(data):]


class Metrics:
    """metrics.jsonl: {"step": N, "time": T, key: value...}, one line a step, written as it comes; the file is always whole.

    T is when the step's first line was seen, in seconds since 1970: verl's SFT trainer says nothing of time.
    """

    def __init__(self, path: Path, after_step: int):
        """Keep the lines up to `after_step` (what a resumed run goes on from)."""
        self.path, self.before = path, [row for row in read(path) if row["step"] <= after_step]
        # Of this run.
        self.rows: list[dict] = []
        self.write()

    def add(self, step: int, values: dict[str, float]) -> None:
        """Take in values of a step, one after another. After an OSError the next call writes them too."""
        # A validation at the begin of a resumed run is of the step before.
        known = self.rows or self.before
        if not (known and known[-1]["step"] == step):
            known = self.rows
            known.append({"step": step, "time": round(time.time(), 3)})
        known[-1].update(values)
        self.write()

    def write(self) -> None:
        """Write the file."""
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in self.before + self.rows))


def read(path: Path) -> list[dict]:
    """All lines of a metrics.jsonl up to one that a crash cut off or damaged; none if there is no file."""
    if not path.is_file():
        return []
    rows = []
    with suppress(ValueError, TypeError, KeyError):
        for line in path.read_text(errors="replace").splitlines():
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
    return rows


def course(stage: str, rows: list[dict]) -> str:
    """How a training went: its steps, first and last value of what it is to improve; empty without metrics."""
    key, word = {"sft": ("train/loss", "loss")}.get(stage, ("critic/score/mean", "reward"))
    if not (values := [row[key] for row in rows if key in row]):
        return ""
    last = rows[-1].get("val/loss")
    return (f"{rows[-1]['step']} steps, {word} {values[0]:.3f} -> {values[-1]:.3f}"
            + (f", validation loss {last:.3f}" if last is not None else ""))
