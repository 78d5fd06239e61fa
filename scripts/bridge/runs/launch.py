"""Run one command as a child: show and log its output, collect metrics, forward signals, leave no orphan."""

import ctypes
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import psutil

from bridge.errors import Tolerance, say
from bridge.runs import metrics
from bridge.runs.progress import Display

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
# verl's SFT ranks and Ray's daemons need a moment to stop by themselves.
GRACE_SECONDS = 20
LIBC = ctypes.CDLL(None, use_errno=True)


def run(command: list[str], env: Mapping[str, str], log: Path | None, metrics_file: metrics.Metrics | None,
        secrets: list[str], until: Callable[[], bool] = lambda: False, display: Display | None = None) -> int:
    """Run a command to its end, with this whole environment; its output is appended to the log, and shown (or the display is).

    metrics_file gets what verl's console lines say; secrets are replaced by ***. `until` is asked some times a second: if true,
    the child is sent SIGTERM. Returns the exit status: 0 where `until` ended it, 128 + N where signal N ended it or us.
    """
    # First, since an error here must not end a child that has begun.
    log_file = open(log or os.devnull, "ab", buffering=0)  # noqa: SIM115 - its closing may fail, too
    adopt_orphans()
    child = subprocess.Popen(command, env=dict(env), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=end_with_parent)
    received: list[int] = []
    asked: list[int] = []

    def forward(number, _frame):
        # The second one does not wait: stop_all follows.
        received.append(number)
        if child.poll() is None:
            child.send_signal(number if len(received) == 1 else signal.SIGKILL)

    def is_ending() -> bool:
        if not received and not asked and child.poll() is None and until():
            asked.append(signal.SIGTERM)
            child.terminate()
        return bool(received or asked)

    # SIGHUP comes when the terminal is closed; under nohup it is ignored, and stays so.
    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
              if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN}
    try:
        with display or nullcontext():
            copy_output(child, log_file, metrics_file, secrets, is_ending, display)
        if received:
            say(f"{signal.Signals(received[0]).name} received: passed on to the {Path(command[0]).name} process")
        try:
            status = child.wait(GRACE_SECONDS if received or asked else None)
        except subprocess.TimeoutExpired:
            child.kill()
            status = child.wait()
    finally:
        stop_all()
        Tolerance("writing to log.txt").at_last(log_file.close)
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        return 128 + received[0]
    if asked:
        return 0
    return 128 - status if status < 0 else status


def adopt_orphans() -> None:
    """Descendants whose parent dies (Ray's daemons) become ours instead of init's, so that they can be found and ended."""
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """In the child: be told to end should the bridge itself be killed."""
    LIBC.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


def copy_output(child: subprocess.Popen, log_file, metrics_file, secrets, is_ending: Callable[[], bool],
                display: Display | None) -> None:
    """Copy the child's output to log and display (else stdout) until it ends, line by line; a progress bar's \\r ends one too.
    A log or metrics that cannot be written (a quota) end no training: that is said, and tried again with the next line."""
    logging, recording = Tolerance("writing to log.txt"), Tolerance("writing to metrics.jsonl")
    hidden = [secret.encode() for secret in secrets if secret]
    pending, stop_at = b"", None

    def emit(data: bytes) -> None:
        for secret in hidden:
            data = data.replace(secret, b"***")
        logging(partial(metrics.write_all, log_file, data))
        if display:
            return display.output(data.decode(errors="replace"))
        try:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        except OSError:
            # Nobody reads any more (the terminal was closed, `| head` has ended): no reason to end a training.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    source = child.stdout.fileno()
    while True:
        ready, _, _ = select.select([source], [], [], 0.2)
        if ready:
            data = os.read(source, 65536)
            if not data:
                break
            *lines, pending = re.split(rb"(?<=[\r\n])", pending + data)
            for line in lines:
                emit(line)
                row = metrics_file and metrics.parse(line.decode(errors="replace"))
                if row:
                    recording(partial(metrics_file.add, *row))
        elif pending and len(pending) > 8192:
            # No end of line in sight: show it rather than hold it back.
            emit(pending)
            pending = b""
        if display:
            display.update()
        if stop_at is None and is_ending():
            stop_at = time.monotonic() + GRACE_SECONDS
        if stop_at and time.monotonic() > stop_at:
            break
        # Descendants may hold the pipe open after the child has ended: do not wait for them.
        if not ready and child.poll() is not None:
            break
    emit(pending)


def stop_all(signals=((signal.SIGTERM, GRACE_SECONDS / 2), (signal.SIGKILL, GRACE_SECONDS))) -> None:
    """End every descendant that is left: ask first, then kill (signal, seconds). Those of the killed become ours and follow."""
    for number, seconds in signals:
        deadline, asked = time.monotonic() + seconds, set()
        while (left := psutil.Process().children()) and time.monotonic() < deadline:
            for process in left:
                if process not in asked:
                    asked.add(process)
                    process.send_signal(number)
            # Collects those that have ended.
            psutil.wait_procs(left, timeout=0.05)
