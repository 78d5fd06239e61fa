"""When a training hangs: it makes no step any more, as with a rank that waits for one that does not come."""

import time
from contextlib import suppress
from pathlib import Path

import psutil

from bridge.trainers import stacks

# Seconds without a step, at least (a validation, a slow save); and how often the longest step so far.
LEAST, TIMES = 1800, 10
# Until two steps are known: imports, the model from a slow disk, kernels that are compiled, a validation.
START = 3600
# Seconds between two looks that mean that everything was stopped meanwhile (a suspended job).
PAUSE = 60
# Seconds in which the stacks are written.
STACKS = 5


class Watch:
    """Asked again and again whether a training hangs.

    Args:
        seconds: without a step that mean so; None: as above; 0: none do.
        checkpoints: folder of the checkpoints. One that is being written is a sign of life.
    """

    def __init__(self, seconds: int | None, checkpoints: Path):
        self.seconds, self.checkpoints = seconds, checkpoints
        self.looked = self.last = time.monotonic()
        self.steps, self.longest = 0, 0.0

    def step(self) -> None:
        """A step was made. (The first tells no time: what came before it was the start.)"""
        now = time.monotonic()
        if self.steps:
            self.longest = max(self.longest, now - self.last)
        self.last, self.steps = now, self.steps + 1

    def hanging_for(self) -> int | None:
        """Seconds without a step, once they are too many."""
        now = time.monotonic()
        if now - self.looked > PAUSE:
            self.last += now - self.looked
        self.looked = now
        limit = self.seconds
        if limit is None:
            limit = max(LEAST if self.steps > 2 else START, TIMES * self.longest)
        waited = now - self.last
        if not limit or waited <= limit or time.time() - self.written() <= limit:
            return None
        return int(waited)

    def written(self) -> float:
        """When something of a checkpoint was last written, in seconds since 1970."""
        times = [0.0]
        for file in self.checkpoints.glob("global_step_*/**/*"):
            # It may just be removed.
            with suppress(OSError):
                times.append(file.stat().st_mtime)
        return max(times)


def ask_for_stacks() -> list[str]:
    """Ask every process below this one that knows the signal (others would end by it); returns who they are, in their order."""
    asked: dict[int, str] = {}
    for process in psutil.Process().children(recursive=True):
        # One that ends meanwhile is not asked.
        with suppress(OSError, psutil.Error):
            status = Path(f"/proc/{process.pid}/status").read_text()
            caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
            # A trainer's copies of itself, which load its data, know it too and tell nothing.
            is_copy = process.ppid() in asked and process.cmdline() == psutil.Process(process.ppid()).cmdline()
            if caught >> stacks.SIGNAL - 1 & 1 and not is_copy:
                process.send_signal(stacks.SIGNAL)
                rank = process.environ().get("RANK")
                asked[process.pid] = f"process {process.pid}" + (f" (rank {rank})" if rank else "")
    return list(asked.values())
