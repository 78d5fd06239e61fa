"""What a user can mend: said without a traceback, all at once, exit status 2."""

import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from difflib import get_close_matches


class UsageError(Exception):
    """One or more mistakes of the user, each with the value seen and the cure."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


def say(message: str) -> None:
    """Tell the user one thing, on stderr, so that stdout stays what a stage prints."""
    # Where nobody reads any more (the terminal was closed), what follows still has to be done.
    with suppress(OSError):
        print(f"bridge: {message}", file=sys.stderr, flush=True)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ' Did you mean X?' for the known word most like this one, or nothing."""
    match = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]}?" if match else ""


class Tolerance:
    """Does what a run can go on without for a while: an error of the file system is said once, and when it is over."""

    # Seconds between the tries at the end of a run.
    PAUSES = (0.5, 2)

    def __init__(self, what: str):
        self.what, self.failing = what, False

    def __call__(self, work: Callable[[], object]) -> bool:
        """Do the work; whether it succeeded."""
        try:
            work()
        except OSError as error:
            if not self.failing:
                say(f"{self.what} failed: {error}. The run goes on, and it is tried again")
            self.failing = True
            return False
        if self.failing:
            say(f"{self.what} works again")
        self.failing = False
        return True

    def at_last(self, work: Callable[[], object]) -> bool:
        """The same where nothing comes after that could try it again."""
        for pause in (*self.PAUSES, None):
            if self(work):
                return True
            if pause is not None:
                time.sleep(pause)
        say(f"{self.what} was given up")
        return False


def exit_status(entry: Callable[[], int | None]) -> int:
    """Run a program's entry; a UsageError becomes lines on stderr and status 2, anything else keeps its traceback."""
    try:
        return entry() or 0
    except UsageError as error:
        for problem in error.problems:
            say(problem)
        return 2
