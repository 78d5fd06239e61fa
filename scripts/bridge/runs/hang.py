"""When a training hangs: it makes no step any more, as with a rank that waits for one that does not come."""

import re
import time
from contextlib import suppress
from pathlib import Path
from signal import SIGCONT
from typing import TextIO

import psutil

from bridge.errors import say
from bridge.runs.metrics import Metrics
from bridge.trainers import stoppable

# Exit status of a training that hung, as that of timeout(1).
HUNG = 124
# Seconds without a step, at least (a validation, a slow save); and how often the longest step so far.
LEAST, TIMES = 1800, 10
# Until two steps are known: imports, the model from a slow disk, kernels that are compiled, a validation.
START = 3600
# Seconds between two looks that mean that everything was stopped meanwhile (a suspended job).
PAUSE = 60
# Seconds in which a process writes its stacks.
STACKS = 0.5


class Watch:
    """Asked again and again whether a training hangs. Once it does, its log says so, and what each of its processes was doing.

    seconds: without a step that mean so (None: as above; 0: none do); metrics: gets a row for each step.
    """

    def __init__(self, seconds: int | None, metrics: Metrics, log: Path):
        self.seconds, self.metrics, self.log = seconds, metrics, log
        self.looked = self.last = time.monotonic()
        self.step, self.took, self.hung = None, [], False

    def __call__(self) -> bool:
        if waited := self.hanging_for():
            self.hung = True
            said = f"no step for {waited} s: it hangs, and is ended (HANG_SECONDS=)"
            say(f"{said}. The log has what its processes were doing")
            # A log that cannot be written keeps nothing from being ended.
            with suppress(OSError), self.log.open("a") as log:
                print(f"bridge: {said}. What its processes were doing:", file=log, flush=True)
                ask_for_stacks(log)
        return self.hung

    def hanging_for(self) -> int | None:
        """Seconds without a step, once they are too many."""
        now = time.monotonic()
        if now - self.looked > PAUSE:
            self.last += now - self.looked
        self.looked = now
        if self.metrics.rows and self.metrics.rows[-1]["step"] != self.step:
            # The first tells no time: what came before it was the start.
            self.took += [] if self.step is None else [now - self.last]
            self.step, self.last = self.metrics.rows[-1]["step"], now
        usual = max(LEAST if len(self.took) > 1 else START, TIMES * max(self.took, default=0))
        limit, waited = usual if self.seconds is None else self.seconds, now - self.last
        return int(waited) if limit and waited > limit else None


def ask_for_stacks(log: TextIO) -> None:
    """Ask every process below this one that knows the signal (others would end by it), each with its name in the log first."""
    asked: dict[int, list[str]] = {}
    for process in psutil.Process().children(recursive=True):
        # One that ends meanwhile is not asked.
        with suppress(psutil.Error, OSError):
            caught = int(re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())[1], 16)
            # A trainer's copies of itself, which load its data, know it too and tell nothing.
            if caught >> stoppable.STACKS - 1 & 1 and process.cmdline() != asked.get(process.ppid()):
                asked[process.pid] = process.cmdline()
                print(f"bridge: process {process.pid}, rank {process.environ().get('RANK', '-')}:", file=log, flush=True)
                process.send_signal(stoppable.STACKS)
                # One that was stopped would not answer.
                process.send_signal(SIGCONT)
                # One after another, since they write to the same file.
                time.sleep(STACKS)
