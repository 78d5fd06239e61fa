"""Read verl's console metrics and keep them as one JSON line a step.

verl's tracking has no file backend; its console backend prints `step:N - key:value - key:value` (verl/utils/logger),
possibly behind a progress bar or Ray's prefix, and more than once a step (validation).
"""

import json
import os
import re
import time
from pathlib import Path

LINE = re.compile(r"(?<![\w/])step:(\d+) - (.*)")
ITEM = re.compile(r"(?:^| - )([^\s:]+):(-?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|inf|nan))(?= - |\s|$)")


def parse(line: str) -> tuple[int, dict[str, float]] | None:
    """Return (step, values) of a line of output, None if it holds no metrics."""
    match = LINE.search(line)
    if not match:
        return None
    values = {key: float(value) for key, value in ITEM.findall(match[2])}
    return (int(match[1]), values) if values else None


class Metrics:
    """metrics.jsonl: {"step": N, "time": T, key: value...}, one line a step, flushed as it comes.

    T is when the step's first line was seen, in seconds since 1970: verl's SFT trainer says nothing of time.
    """

    def __init__(self, path: Path, after_step: int):
        """Keep the lines up to `after_step` (what a resumed run goes on from) and append."""
        kept = [row for row in read(path) if row["step"] <= after_step]
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(temporary, path)
        self.file = open(path, "r+")  # noqa: SIM115 - held as long as the run
        self.file.seek(0, os.SEEK_END)
        self.row: dict = {}
        self.start = self.file.tell()

    def add(self, step: int, values: dict[str, float]) -> None:
        """Write the step's line; more values for the same step rewrite that line."""
        if self.row.get("step") == step:
            self.file.seek(self.start)
            self.file.truncate()
        else:
            self.row = {"step": step, "time": round(time.time(), 3)}
            self.start = self.file.tell()
        self.row.update(values)
        self.file.write(json.dumps(self.row) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def read(path: Path) -> list[dict]:
    """All lines of a metrics.jsonl; none if there is no file. A last line cut off by a crash is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
