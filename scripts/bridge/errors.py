"""What a user can mend: said without a traceback, all at once, exit status 2."""

import errno
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

ROOM = "Make room there, or set WORK_DIR in .env to a folder on a disk with room."
PERMISSION = "Get the permission, or use a folder of your own."
SERVER = "The disk or its server failed: run the same command again, and tell the administrator if it stays so."
CURES = {errno.ENOSPC: ROOM, errno.EDQUOT: ROOM, errno.EACCES: PERMISSION, errno.EROFS: PERMISSION,
         errno.EIO: SERVER, errno.ESTALE: SERVER}


class UsageError(Exception):
    """One or more mistakes of the user, each with the value seen and the cure."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


def refuse(problems: Iterable[str]) -> None:
    """Raise a UsageError with all of these problems, if there are any."""
    if problems := list(problems):
        raise UsageError(*problems)


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

    def at_last(self, work: Callable[[], object]) -> None:
        """The same where nothing comes after that could try it again."""
        for pause in self.PAUSES:
            if self(work):
                return
            time.sleep(pause)
        if not self(work):
            say(f"{self.what} was given up")


def exit_status(entry: Callable[[], int | None]) -> int:
    """Run a program's entry; returns its exit status. A UsageError and what the file system refuses become lines on stderr and
    status 2, Ctrl-C becomes 130. Anything else is the program's own mistake and keeps its traceback."""
    try:
        return entry() or 0
    except UsageError as error:
        for problem in error.problems:
            say(problem)
        return 2
    except OSError as error:
        if error.filename is None and error.errno not in CURES:
            raise
        files = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        cure = CURES.get(error.errno, "See what is there, then run the same command again.")
        say(f"{files}{': ' * bool(files)}{error.strerror}. {cure}")
        return 2
    except KeyboardInterrupt:
        say("ended by Ctrl-C")
        return 130


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Within this, an OSError that names no file names this one: a disk that is full at a write, say."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(file)
        raise


@contextmanager
def full_disk_explained(cure: Callable[[], str]) -> Iterator[None]:
    """Within this, a full disk is a UsageError with this cure.
    The libraries in Rust keep the words of the system's error only, and tokenizers has no kind of error of its own."""
    try:
        yield
    except Exception as error:
        if "No space left" in str(error) or "quota exceeded" in str(error):
            raise UsageError(f"the disk is full: {error}. {cure()}") from error
        raise


def read_json(file: Path) -> Any:
    """What a JSON file holds; a ValueError says why it is no JSON in UTF-8."""
    try:
        with naming(file):
            return json.loads(file.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_whole(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = file.with_name(file.name + ".tmp")
    with naming(temporary):
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)
