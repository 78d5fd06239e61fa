"""When a training hangs: it makes no step any more, as with a rank that waits for one that does not come."""

import time
from pathlib import Path

import psutil

from bridge.trainers import stacks

# Seconds without a step, at least; and how often the longest step so far.
LEAST, TIMES = 600, 10
# Before the first step: imports, the model from a slow disk, kernels that are compiled, a validation.
START = 1800
# Seconds in which the stacks are written.
STACKS = 5


class Watch:
    """Asked again and again whether a training hangs.

    Args:
        seconds: without a step that mean so; None: as above; 0: none do.
    """

    def __init__(self, seconds: int | None):
        self.seconds, self.last, self.longest = seconds, time.monotonic(), None

    def step(self) -> None:
        """A step was made. (The first tells no time: what came before it was the start.)"""
        now = time.monotonic()
        self.longest = 0 if self.longest is None else max(self.longest, now - self.last)
        self.last = now

    def hanging_for(self) -> int | None:
        """Seconds without a step, once they are too many."""
        limit = self.seconds
        if limit is None:
            limit = START if self.longest is None else max(LEAST, TIMES * self.longest)
        waited = time.monotonic() - self.last
        return int(waited) if limit and waited > limit else None


def ask_for_stacks() -> None:
    """Ask every process below this one that knows the signal (others would end by it)."""
    for process in psutil.Process().children(recursive=True):
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
            if caught >> stacks.SIGNAL - 1 & 1:
                process.send_signal(stacks.SIGNAL)
        except (OSError, psutil.NoSuchProcess):
            # Ended meanwhile.
            continue
