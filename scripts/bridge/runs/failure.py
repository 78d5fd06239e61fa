"""Why a trainer ended, as its log says."""

import re
from pathlib import Path

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
EXCEPTION = re.compile(r"^(?:\[\w+\]:|\([^()]*pid=[^()]*\)|\s)*((?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit)\b(?:: .*)?)$")
PLACE = re.compile(r'File "([^"]+)", line (\d+)')
# What torchrun, Ray and torch's data loader make of a process's exception: its own is the cause.
CARRIERS = ("RayTaskError", "ChildFailedError", "RayActorError", "ActorDiedError", ": Caught ")


def reason(log: Path, start: int) -> str | None:
    """What ended a program and where, by the first traceback in its log from byte `start` on: the others follow from it."""
    place = None
    try:
        text = log.read_bytes()[start:].decode(errors="replace")
    except OSError as error:
        return f"the log cannot be read: {error}"
    for line in COLOUR.sub("", text).splitlines():
        if found := PLACE.search(line):
            place = f"{Path(found[1]).name}, line {found[2]}"
        elif place and (found := EXCEPTION.match(line)) and not any(word in found[1] for word in CARRIERS):
            return f"{found[1][:300]} ({place})"
    return None


def last_lines(file: Path, count: int, start: int = 0) -> list[str]:
    """The end of a log from byte `start` on, without the states of progress bars, and what torchrun says of a failure."""
    try:
        text = file.read_bytes()[start:].decode(errors="replace") if file.is_file() else ""
    except OSError as error:
        return [f"the log cannot be read: {error}"]
    lines = [line.rsplit("\r", 1)[-1][:500] for line in text.rstrip().split("\n")]
    # Its first line has the rank and the signal.
    end = next((number for number, line in enumerate(lines, 1) if "failed (exitcode: " in line), len(lines))
    return lines[max(0, end - count):end]
