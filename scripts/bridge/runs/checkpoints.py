"""The one module that knows how verl 0.5.0 lays out its checkpoints: docs/architecture.md has the layout, and its source.

An error of the file system (a disk that does not answer) is raised, never taken for a file that is missing or cut short.
"""

import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from threading import Event, Thread
from typing import Any

import xxhash

from bridge.errors import Tolerance, UsageError, say, write_whole

TRACKER = "latest_checkpointed_iteration.txt"
CHECKSUMS = "checksums.json"
LOADER = "data.pt"
# Name under which prepare_resume puts it aside.
EPOCH_END = "data.at-epoch-end.pt"
# What verl's save_contents may name -> how its files begin, and bytes of it a parameter (float32; Adam has two moments).
SHARDS = {"model": ("model", 4), "optimizer": ("optim", 8), "extra": ("extra_state", 0)}
# The whole model in Hugging Face's form, beside the shards.
HF_MODEL_BYTES = 4
ALL = tuple(SHARDS)
# Where verl is told what to load, by stage and part.
LOAD_CONTENTS = {"sft": {".": "trainer.checkpoint.load_contents"},
                 "ppo": {"actor": "actor_rollout_ref.actor.checkpoint.load_contents",
                         "critic": "critic.checkpoint.load_contents"}}
# The folders of a checkpoint that hold shards -> what is saved in each, in the words of verl's save_contents.
Contents = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Checkpoint:
    """One global_step_N folder. `faults` is empty when everything that it was to hold is there and written to its end."""

    path: Path
    step: int
    faults: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether it holds what was asked for."""
        return not self.faults


def has_critic(config: Mapping[str, Any]) -> bool:
    """Whether verl's PPO trainer trains a critic: with one way to estimate advantages of nine (RayPPOTrainer.__init__)."""
    return config["algorithm"]["adv_estimator"] == "gae"


def contents(stage: str, config: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """What a checkpoint of a run with this configuration holds."""
    def saved(part: Mapping[str, Any]) -> tuple[str, ...]:
        # verl takes null for its default.
        return tuple(part["checkpoint"]["save_contents"] or ALL)

    if stage == "sft":
        return {".": saved(config["trainer"])}
    found = {"actor": saved(config["actor_rollout_ref"]["actor"])}
    if has_critic(config):
        found["critic"] = saved(config["critic"])
    return found


def mergeable(stage: str) -> dict[str, tuple[str, ...]]:
    """What merging needs of a checkpoint: less than continuing."""
    return {"actor" if stage == "ppo" else ".": ("model",)}


def expected_size(saved: Contents, parameters: int) -> int:
    """Bytes of one checkpoint. For 1.236e9 parameters: SFT 14.8 GB, PPO 29.7 GB, without a critic 14.8 GB."""
    return parameters * sum(SHARDS[kind][1] if kind in SHARDS else HF_MODEL_BYTES for kinds in saved.values() for kind in kinds)


# ---- what is there

def shard_faults(folder: Path, kinds: Sequence[str] = ALL) -> list[str]:
    """What is missing or cut short in one folder of shards, as short phrases with the file's name."""
    config = folder / "fsdp_config.json"
    if not config.is_file():
        return [f"{folder.name}/fsdp_config.json is missing"]
    try:
        world_size = int(json.loads(config.read_text())["world_size"])
    except (ValueError, KeyError, TypeError):
        return [f"{folder.name}/fsdp_config.json is not readable"]
    faults = []
    for begin in (SHARDS[kind][0] for kind in kinds if kind in SHARDS):
        for rank in range(world_size):
            file = folder / f"{begin}_world_size_{world_size}_rank_{rank}.pt"
            if not file.is_file():
                faults.append(f"{folder.name}/{file.name} is missing")
            elif not is_whole(file):
                faults.append(f"{folder.name}/{file.name} is cut short")
    if not (folder / "huggingface" / "config.json").is_file():
        faults.append(f"{folder.name}/huggingface/config.json is missing")
    return faults


def is_whole(file: Path) -> bool:
    """Whether a torch.save file was written to its end: what ends its table of contents is the last thing in it."""
    with open(file, "rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - zipfile.sizeEndCentDir))
        # Not by zipfile, which takes an error of the disk for "no zip file", and Debian's a large file's end for damaged.
        return stream.read().startswith(zipfile.stringEndArchive)


def is_value_model(folder: Path) -> bool:
    """Whether shards are a critic's. Its config.json names the base model's class, so the pickled names of weights tell."""
    shard = next(folder.glob("model_world_size_*_rank_0.pt"))
    with zipfile.ZipFile(shard) as archive:
        names = archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
    return b"score.weight" in names or b"v_head." in names


def loader_state(path: Path) -> Path:
    """The file with the data loader's state in a global_step_N folder."""
    return path / EPOCH_END if (path / EPOCH_END).is_file() else path / LOADER


def step_folders(folder: Path, suffix: str = "") -> list[tuple[int, Path]]:
    """(N, folder) of each global_step_N (with this suffix, a pattern), oldest first."""
    try:
        # Not Path.glob, which takes a folder that may not be read for an empty one.
        entries = [entry for entry in os.scandir(folder) if entry.is_dir()]
    except FileNotFoundError:
        return []
    found = [(match, Path(entry.path)) for entry in entries
             if (match := re.fullmatch(rf"global_step_(\d+){suffix}", entry.name))]
    return sorted((int(match[1]), path) for match, path in found)


def judged(path: Path, step: int, wanted: Contents, loader: bool = True) -> Checkpoint:
    """A checkpoint with what it lacks of what is wanted; `loader`: the data loader's state as well."""
    faults = [fault for part, kinds in wanted.items() for fault in shard_faults(path / part, kinds)]
    if loader and not (loader_state(path).is_file() and is_whole(loader_state(path))):
        faults.append(f"{LOADER} is missing or cut short")
    return Checkpoint(path, step, tuple(faults))


def list_checkpoints(folder: Path, wanted: Contents, loader: bool = True) -> list[Checkpoint]:
    """All global_step_N folders, oldest first."""
    return [judged(path, step, wanted, loader) for step, path in step_folders(folder)]


def newest_complete(folder: Path, wanted: Contents) -> Checkpoint | None:
    """The checkpoint to continue from or to merge."""
    return next((checkpoint for checkpoint in reversed(list_checkpoints(folder, wanted)) if checkpoint.complete), None)


def size(folder: Path) -> int:
    """Bytes in all files below a folder. Files that vanish meanwhile (being pruned) do not count."""
    total = 0
    for root, _, files in os.walk(folder):
        for name in files:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(root, name)).st_size
    return total


# ---- whether it is still what was saved

def checksum(file: Path) -> str:
    """Checksum of a file's bytes, as fast as they can be read. It tells damage, not forgery."""
    with open(file, "rb", buffering=0) as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()


def record_checksums(path: Path) -> None:
    """Write down size and checksum of every file of a checkpoint that has just been saved; the file appears whole."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith(CHECKSUMS))
    found = {str(file.relative_to(path)): {"bytes": file.stat().st_size, "xxh3_128": checksum(file)} for file in files}
    write_whole(path / CHECKSUMS, json.dumps(found, indent=1) + "\n")


def damage(path: Path, below: str = "") -> list[str]:
    """Which files of a global_step_N folder (`below`: whose path in it begins so) are not what was saved; all are read."""
    record = path / CHECKSUMS
    if not record.is_file():
        say(f"{path.name} has no {CHECKSUMS}: whether its files are what was saved is not known")
        return []
    try:
        wanted = {name: (row["bytes"], row["xxh3_128"]) for name, row in json.loads(record.read_text()).items()
                  # A model merged by hand, as the tutorial does it, is put there; nothing that is continued reads it.
                  if name.startswith(below) and "huggingface" not in Path(name).parts}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{path.name}/{CHECKSUMS} is damaged itself ({error})"]

    def fault(name: str) -> str | None:
        file = path / name if name != LOADER else loader_state(path)
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != wanted[name][0]:
            return f"{name} has {file.stat().st_size} bytes instead of {wanted[name][0]}"
        return None if checksum(file) == wanted[name][1] else f"{name} is not what was saved: its checksum differs"

    with ThreadPoolExecutor(8) as pool:
        return [found for found in pool.map(fault, wanted) if found]


# ---- what is put aside and removed

def set_aside(path: Path) -> Path:
    """Give a checkpoint that is not whole another name, under which neither verl nor the bridge takes it."""
    names = (f"{path.name}.set-aside{f'-{number}' if number > 1 else ''}" for number in count(1))
    target = next(target for target in map(path.with_name, names) if not target.exists())
    os.rename(path, target)
    return target


def set_aside_damaged(folder: Path, wanted: Contents) -> list[str]:
    """Read the newest complete checkpoint whole; while it is damaged, put it aside and take the one before.
    Returns what was done. If all are damaged, that is a UsageError, and nothing was touched."""
    faults: dict[Path, list[str]] = {}
    for checkpoint in reversed([found for found in list_checkpoints(folder, wanted) if found.complete]):
        say(f"comparing {checkpoint.path.name} with the checksums of when it was saved")
        if not (found := damage(checkpoint.path)):
            return [f"set aside the damaged checkpoint {path.name} as {set_aside(path).name} ({why[0]})"
                    for path, why in faults.items()]
        faults[checkpoint.path] = found
    if faults:
        raise UsageError(none_usable(folder, [f"{path.name}: {why[0]}" for path, why in faults.items()]))
    return []


def none_usable(folder: Path, faults: Sequence[str]) -> str:
    """Why a run is neither continued nor begun anew, and how to go on."""
    return (f"{folder} holds checkpoints, but none can be continued from, so nothing was touched:\n  " + "\n  ".join(faults) +
            "\nIf their disk comes back, run the same command again. To begin anew: RUN=NAME, or move them away: "
            f"mv {folder} {folder}.old")


def newer_incomplete(folder: Path, wanted: Contents, step: int) -> list[Checkpoint]:
    """What a run that goes on from `step` would write into if it stayed."""
    return [checkpoint for checkpoint in list_checkpoints(folder, wanted) if checkpoint.step > step]


def prepare_resume(folder: Path, stage: str, wanted: Contents, resume_from: Checkpoint | None, steps_per_epoch: int) -> list[str]:
    """Make the folder such that verl continues from this checkpoint (None: starts anew). Returns what was done."""
    tracker = folder / TRACKER
    if resume_from is None:
        tracker.unlink(missing_ok=True)
        return []
    # verl would write into them.
    said = [f"set aside the incomplete checkpoint {checkpoint.path.name} as {set_aside(checkpoint.path).name} "
            f"({checkpoint.faults[0]})" for checkpoint in newer_incomplete(folder, wanted, resume_from.step)]
    # verl reads it even when told what to resume, and crashes on an empty one.
    write_whole(tracker, str(resume_from.step))
    # At the end of an epoch verl's SFT loads the state of an exhausted loader, and skips an epoch: without it the next begins.
    loader = resume_from.path / LOADER
    if stage == "sft" and resume_from.step % steps_per_epoch == 0 and loader.is_file():
        os.replace(loader, resume_from.path / EPOCH_END)
    return said


def prune(folder: Path, wanted: Contents, keep: int | None) -> Iterator[Path]:
    """Remove what is older than the newest `keep` complete checkpoints (None: all stay), and what was put aside at a step
    that has been reached since; yields each as it is gone. Raises the first OSError once the others are gone.

    What is newer than the newest complete one is never touched: it may be being written.
    """
    checkpoints = list_checkpoints(folder, wanted)
    complete = [checkpoint.step for checkpoint in checkpoints if checkpoint.complete]
    old = [path for step, path in step_folders(folder, r"\.set-aside(?:-\d+)?") if complete and step <= complete[-1]]
    if keep is not None and len(complete) >= keep:
        old += [checkpoint.path for checkpoint in checkpoints if checkpoint.step < complete[-keep]]
    failed = None
    for path in old:
        try:
            # A link is removed as such: what it leads to stays.
            (Path.unlink if path.is_symlink() else shutil.rmtree)(path)
            yield path
        except OSError as error:
            # The others go all the same, or the disk would fill up.
            failed = failed or error
    if failed:
        raise failed


class Housekeeping(Thread):
    """Beside the trainer, as 30 GB take seconds: records new checkpoints' checksums, then prunes. Failures are tried again."""

    SECONDS = 5

    def __init__(self, folder: Path, wanted: Contents, keep: int | None):
        super().__init__(daemon=True)
        self.folder, self.wanted, self.keep = folder, wanted, keep
        # Those of before stay as they are: without a record, if they had none.
        self.seen = {path for _, path in step_folders(folder)}
        self.tolerance, self.done = Tolerance("keeping checkpoints in order"), Event()

    def run(self) -> None:
        while not self.done.wait(self.SECONDS):
            self.tolerance(self.look)

    def look(self) -> None:
        """Take in what has appeared and is whole. After an OSError the next call does the rest."""
        # Before data.pt is there, the others need not be opened.
        new = [judged(path, step, self.wanted) for step, path in step_folders(self.folder)
               if path not in self.seen and (path / LOADER).is_file()]
        new = [checkpoint.path for checkpoint in new if checkpoint.complete]
        try:
            # First, since saving may be faster than reading.
            for path in prune(self.folder, self.wanted, self.keep) if new else ():
                say(f"removed {path.name}" + ("" if path.suffix else f" (KEEP={self.keep})"))
        finally:
            # What cannot be removed keeps nothing from being recorded.
            for path in new:
                if path.is_dir() and not (path / CHECKSUMS).is_file():
                    record_checksums(path)
        self.seen.update(new)

    def close(self, hurry: bool) -> None:
        """Stop. `hurry`: at once (a time limit may be near); what was not recorded is then without a record."""
        self.done.set()
        if not hurry:
            self.join()
            self.tolerance.at_last(self.look)
