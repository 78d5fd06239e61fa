"""Let each file operation of the door's code fail in turn, in this process, and look at what is left (test_file_errors.py).

    python file_errors.py WORK_DIR SCENARIO REPORT.json

The door is real and so are its files; the trainer is replayer.py, which replays one. An operation is a place in the code that
does something below WORK_DIR/runs: found by running once without a fault. Each is made to fail once, at its last call,
and for good, from its first.
"""

import builtins
import errno
import fcntl
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from shards import plan, started, write_checkpoint

from bridge import door, settings
from bridge.errors import Tolerance, UsageError
from bridge.runs import checkpoints, metrics, progress, record
from bridge.stages import merge, train

CODE = str(Path(door.__file__).parent)
STEPS, KEEP = 4, 2
# An epoch has one step: a run that goes on does so at an epoch's end, where data.pt is put aside.
OVERRIDES = ["trainer.save_freq=1", f"trainer.total_epochs={STEPS}", "data.train_batch_size=512"]
# What a file system answers where it does not do what it is asked for; else that it is full.
ERRORS = {"open": errno.ESTALE, "read": errno.ESTALE,
          "stat": errno.ESTALE, "fstat": errno.ESTALE, "scandir": errno.ESTALE, "seek": errno.EIO,
          "close": errno.EIO, "lockf": errno.EIO, "unlink": errno.EBUSY, "rmdir": errno.ENOTEMPTY}

# The parts of a run: an operation in what several of them call is another operation in each.
PARTS = ("door.", "merge.plan", "metrics.add", "metrics.write", "checkpoints.close", "launch.copy_output", "failure.reason")
# What is done, the part and the line.
Place = tuple[str, tuple[str, str]]


@dataclass(frozen=True)
class Fault:
    """The `call`th call (from 1) of an operation at a place in the code fails; `for_good`: all that follow there, too."""

    place: Place
    call: int
    for_good: bool

    @property
    def error(self) -> int:
        return ERRORS.get(self.place[0], errno.ENOSPC)

    def __str__(self) -> str:
        part, line = self.place[1]
        return f"{self.place[0]} in {line}, for {part}, call {self.call}{', for good' if self.for_good else ''}"


class Disk:
    """Stands between the door and its files below a folder: counts the operations, and lets one fail."""

    def __init__(self, root: Path):
        self.root, self.fault, self.calls = str(root), None, {}
        self.watching = False

    def __enter__(self):
        self.before = [(module, name, getattr(module, name)) for module, names in (
            (os, ("stat", "lstat", "fstat", "open", "scandir", "listdir", "mkdir", "rename", "replace", "unlink", "rmdir")),
            (fcntl, ("lockf",)), (io, ("open",)), (builtins, ("open",))) for name in names]
        for module, name, function in self.before:
            setattr(module, name, partial(self.call, "open" if module in (io, builtins) else name, function))
        return self

    def __exit__(self, *_error):
        for module, name, function in self.before:
            setattr(module, name, function)

    def below(self, target) -> str | None:
        """The path of a file below the folder, None of any other."""
        if hasattr(target, "fileno"):
            target = target.fileno()
        path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.fsdecode(target)
        return path if path.startswith(self.root) else None

    def was_there(self, folder: str) -> bool:
        """Whether there is nothing to be made, and so no error."""
        self.watching = False
        found = os.path.isdir(folder)
        self.watching = True
        return found

    def call(self, name, function, *args, **options):
        directory = options.get("dir_fd")
        path = self.below(args[0] if directory is None else directory) if self.watching and args else None
        if path is None:
            return function(*args, **options)
        if name == "mkdir" and self.was_there(path):
            return function(*args, **options)
        mode = args[1] if name == "open" and len(args) > 1 and isinstance(args[1], str) else "r"
        self.passes("create" if name == "open" and set(mode) & set("wax+") else name, path)
        result = function(*args, **options)
        return File(self, result, path) if name == "open" and hasattr(result, "read") else result

    def passes(self, name: str, path: str) -> None:
        """Count an operation; fail if it is its turn."""
        frame, chain = sys._getframe(2), []
        while frame:
            file = frame.f_code.co_filename
            if file.startswith(CODE):
                chain.append(f"{os.path.basename(file)[:-3]}.{frame.f_code.co_name}:{frame.f_lineno}")
            frame = frame.f_back
        # The lock goes with the process, whatever closing it answers; what size() cannot see takes no room in the disk's budget.
        if not chain or chain[0].startswith("checkpoints.size") or (name == "close" and chain[0].startswith("record.locked")):
            return
        # A thread of damage() has none of them on its stack.
        part = next((call.partition(":")[0] for call in chain if call.startswith(PARTS)), "checkpoints.damage")
        place = (name, (part, chain[0]))
        self.calls[place] = number = self.calls.get(place, 0) + 1
        if self.fault and place == self.fault.place and (number == self.fault.call or self.fault.for_good):
            raise OSError(self.fault.error, os.strerror(self.fault.error), path)


class File:
    """An open file whose operations pass by the disk."""

    def __init__(self, disk: Disk, file, path: str):
        self.__dict__.update(_disk=disk, _file=file, _path=path)

    def __getattr__(self, name):
        found = getattr(self._file, name)
        if name not in ("read", "write", "seek", "truncate", "flush"):
            return found

        def passing(*args):
            self._disk.passes(name, self._path)
            return found(*args)

        return passing

    def close(self):
        # As close(2): the file is closed, whatever it answers.
        self._file.close()
        self._disk.passes("close", self._path)

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        self.close()

    def __iter__(self):
        return iter(self._file)


# ---- the scenarios


def fresh(env: dict[str, str], saved: Path) -> None:
    """A run that failed before its first checkpoint: its log and metrics are there."""
    started(env, "sft", *OVERRIDES)


def resumed(env: dict[str, str], saved: Path) -> None:
    """A run that was killed in its fourth save; its third checkpoint has a flipped bit since, so it goes on from the second."""
    folder = started(env, "sft", *OVERRIDES, steps=(1,))
    shutil.rmtree(folder / "global_step_1")
    for step in (1, 2, 3, 4):
        shutil.copytree(saved / f"global_step_{step}", folder / f"global_step_{step}")
        checkpoints.record_checksums(folder / f"global_step_{step}")
    shard = folder / "global_step_3" / "model_world_size_2_rank_1.pt"
    data = bytearray(shard.read_bytes())
    data[data.index(b"\0" * 64) + 8] ^= 1
    shard.write_bytes(data)
    for name in ("data.pt", checkpoints.CHECKSUMS):
        (folder / "global_step_4" / name).unlink()
    (folder.parent / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)))


def failing(env: dict[str, str], saved: Path) -> None:
    """A fresh run whose trainer fails after its second step; the second try does the rest."""
    started(env, "sft", *OVERRIDES)


SCENARIOS = {"fresh": fresh, "resumed": resumed, "failing": failing}
# What cannot be as without the fault where one of these parts of the door fails for good: what it keeps, or has to put in order.
FOR_GOOD = {"metrics.": {"metrics"}, "checkpoints.close": {"older checkpoints", "files"},
            "door.end": {"status", "last step", "files"}}


class Scenario:
    """A WORK_DIR whose runs can be put back to what they were, and the door with the replayer behind it."""

    def __init__(self, work_dir: Path, name: str):
        self.runs, self.begin, self.saved = work_dir / "runs", work_dir / "begin", work_dir / "saved"
        self.diary, self.name = work_dir / "diary", name
        self.env = {"WORK_DIR": str(work_dir), "MODEL": "tiny", "PROFILE": "tiny", "GPUS": "2", "KEEP": str(KEEP),
                    "PATH": os.environ["PATH"], "HOME": os.environ["HOME"]}
        self.folder = self.runs / "default" / "sft"
        for step in range(1, STEPS + 1):
            # Something of its own in each, so that none is taken for another.
            (write_checkpoint(self.saved, step) / "huggingface" / "vocab.json").write_text(str(step))
        SCENARIOS[name](self.env, self.saved)
        shutil.move(self.runs, self.begin)
        self.cheapen()

    def cheapen(self) -> None:
        """What costs time and touches no file of a run is done once; housekeeping looks when the run ends, not every 5 s."""
        self.restore()
        planned, machine, config = train.plan, record.machine(self.env), plan(self.env, "sft", *OVERRIDES).config
        train.compose_checked = lambda *_: deepcopy(config)
        record.machine = lambda _env: machine
        checkpoints.Housekeeping.SECONDS = progress.CHECKPOINTS = 3600
        Tolerance.PAUSES = (0, 0)
        # One after the other, so that "the third" is always the same.
        checkpoints.ThreadPoolExecutor = lambda _threads: ThreadPoolExecutor(1)

        def replayed(*args):
            made = planned(*args)
            return made if made.finished else replace(made, command=[
                sys.executable, "-S", str(Path(__file__).with_name("replayer.py")), str(self.saved), str(made.checkpoints),
                str(made.resume_step + 1), str(STEPS), str(self.diary),
                *(["2"] if self.name == "failing" and not made.resume_step else [])])

        train.plan = replayed

    def restore(self) -> None:
        shutil.rmtree(self.runs, ignore_errors=True)
        shutil.copytree(self.begin, self.runs)
        self.diary.unlink(missing_ok=True)

    def door(self) -> int:
        return door.run_stage("sft", self.env, OVERRIDES, False)

    def did(self) -> list[str]:
        """What the trainer wrote into its diary."""
        return self.diary.read_text().split() if self.diary.exists() else []

    def complete(self) -> dict[str, dict[str, bytes]]:
        """Every complete and undamaged checkpoint, byte by byte."""
        found = {}
        for checkpoint in checkpoints.list_checkpoints(self.folder / "checkpoints", {".": checkpoints.ALL}):
            files = {name: data for name, data in contents(checkpoint.path).items() if name != f"{checkpoints.CHECKSUMS}.tmp"}
            recorded = files.pop(checkpoints.CHECKSUMS, None)
            files["data.pt"] = files.pop(checkpoints.EPOCH_END, None) or files.get("data.pt")
            if checkpoint.complete and (recorded is None or not checkpoints.damage(checkpoint.path)):
                found[checkpoint.path.name] = files
        return found

    def state(self) -> dict[str, object]:
        """What a run left, less the times."""
        recorded = record.read(self.folder)
        return {"checkpoints": self.complete(), "metrics": [row["step"] for row in metrics.read(self.folder / "metrics.jsonl")],
                "status": recorded["status"], "last step": recorded["last_step"],
                "files": sorted(str(file.relative_to(self.runs)) for file in self.runs.rglob("*") if file.is_file())}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def attempt(disk: Disk, work: Callable[[], object], fault: Fault | None) -> tuple[object, str]:
    """Do the work with this fault. Returns what came of it (a value or an error) and what was said."""
    disk.fault, disk.calls = fault, {}
    stderr, sys.stderr = sys.stderr, io.StringIO()
    disk.watching = True
    try:
        result = work()
    except (OSError, UsageError) as error:
        result = error
    finally:
        disk.watching = False
        said, sys.stderr = sys.stderr.getvalue(), stderr
    return result, said


def faults(disk: Disk, work: Callable[[], object], parts: tuple[str, ...] = ("",)) -> list[tuple[Fault, Fault]]:
    """Every fault there is to try, once and for good: from a run without one. `parts`: only in these."""
    result, said = attempt(disk, work, None)
    assert not isinstance(result, Exception), (result, said)
    return [(Fault(place, count, False), Fault(place, 1, True)) for place, count in disk.calls.items()
            if place[1][0].startswith(parts)]


def judge(scenario: Scenario, disk: Disk, fault: Fault, wanted: dict[str, object]) -> tuple[str, list[str]]:
    """Run with one fault, then once more without. Returns what happened in a word, and what should not have."""
    scenario.restore()
    before = scenario.complete()
    result, said = attempt(disk, scenario.door, fault)
    did, wrong = scenario.did(), []
    if isinstance(result, Exception):
        outcome = "refused"
        if did:
            wrong.append(f"the trainer had begun when the door ended with {result!r}")
        if lost := before.keys() - scenario.complete().keys():
            wrong.append(f"lost {lost}")
    else:
        outcome = "went on"
        if (result, did) != ((1, ["began", "failed"]) if scenario.name == "failing" else (0, ["began", "ended"])):
            wrong.append(f"status {result}, the trainer {did}")
        if os.strerror(fault.error) not in said:
            wrong.append(f"not a word of it: {said}")
    if any(before[name] != files for name, files in scenario.complete().items() if name in before and not did):
        wrong.append("a checkpoint is not what it was")
    record.read(scenario.folder)
    if outcome == "refused" and scenario.name == "failing":
        attempt(disk, scenario.door, None)
    result, said = attempt(disk, scenario.door, None)
    if result != 0:
        wrong.append(f"the same command again: {result!r} {said}")
    state = scenario.state()
    excused = {name for part, names in FOR_GOOD.items() if fault.for_good and part in fault.place[1][0] for name in names}
    if "older checkpoints" in excused:
        state["checkpoints"] = {name: files for name, files in state["checkpoints"].items() if name in wanted["checkpoints"]}
    wrong += [f"{name}: {state[name]} instead of {wanted[name]}"[:600] for name in wanted.keys() - excused
              if state[name] != wanted[name]]
    return outcome, wrong


def run(work_dir: Path, name: str, report: Path) -> None:
    scenario, disk = Scenario(work_dir, name), Disk(work_dir / "runs")
    rows = []
    with disk:
        scenario.restore()
        # All but the end is as in a fresh run that does not fail.
        trying = faults(disk, scenario.door, ("door.end", "door.run_plan", "failure.reason") if name == "failing" else ("",))
        assert scenario.door() == 0 and scenario.did()[-1] == "ended"
        wanted = scenario.state()
        for once, for_good in trying:
            for fault in (once, for_good):
                outcome, wrong = judge(scenario, disk, fault, wanted)
                rows.append({"fault": str(fault), "outcome": outcome, "wrong": wrong})
                if outcome == "refused":
                    # No second call follows.
                    break
        # The finished run is merged: what cannot be read leads to no other plan.
        merging = lambda: merge.plan(settings.read(scenario.env), scenario.env).command  # noqa: E731
        right, _ = attempt(disk, merging, None)
        for fault, _ in faults(disk, merging):
            result, _ = attempt(disk, merging, fault)
            rows.append({"fault": f"merge: {fault}", "outcome": "refused" if isinstance(result, Exception) else "went on",
                         "wrong": [] if isinstance(result, Exception) or result == right else [f"planned {result}"]})
    report.write_text(json.dumps({"left": wanted["files"], "rows": rows}, indent=1))


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
