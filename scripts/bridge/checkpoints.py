"""The one module that knows how verl 0.5.0 lays out its checkpoints.

    checkpoints/latest_checkpointed_iteration.txt      the tracker: a step, written last (by PPO not atomically)
    checkpoints/global_step_N/data.pt                  state of the data loader
    checkpoints/global_step_N/{.,actor,critic}/        SFT: the folder itself; PPO: both
        fsdp_config.json                               {"world_size": W}
        {model,optim,extra_state}_world_size_W_rank_R.pt   zip files, one of each a rank
        huggingface/                                   config and tokenizer, no weights

Source: verl/utils/checkpoint/fsdp_checkpoint_manager.py and the two trainers.
"""

import json
import os
import re
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
SHARDS = ("model", "optim", "extra_state")


@dataclass(frozen=True)
class Checkpoint:
    """One global_step_N folder. `faults` is empty when everything that resuming needs is there and whole."""

    path: Path
    step: int
    faults: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether verl can resume from it."""
        return not self.faults


def parts(stage: str) -> tuple[str, ...]:
    """Folders inside a checkpoint that hold shards."""
    return ("actor", "critic") if stage == "ppo" else (".",)


def shard_faults(folder: Path, kinds: tuple[str, ...] = SHARDS) -> list[str]:
    """What is missing or cut short in one folder of shards, as short phrases with the file's name."""
    config = folder / "fsdp_config.json"
    if not config.is_file():
        return [f"{folder.name}/fsdp_config.json is missing"]
    try:
        world_size = int(json.loads(config.read_text())["world_size"])
    except (ValueError, KeyError, TypeError):
        return [f"{folder.name}/fsdp_config.json is not readable"]
    faults = []
    for kind in kinds:
        for rank in range(world_size):
            file = folder / f"{kind}_world_size_{world_size}_rank_{rank}.pt"
            if not file.is_file():
                faults.append(f"{folder.name}/{file.name} is missing")
            elif not is_whole(file):
                faults.append(f"{folder.name}/{file.name} is cut short")
    if not (folder / "huggingface" / "config.json").is_file():
        faults.append(f"{folder.name}/huggingface/config.json is missing")
    return faults


def is_whole(file: Path) -> bool:
    """Whether a torch.save file was written to its end: its table of contents is the last thing in it."""
    try:
        with zipfile.ZipFile(file):
            return True
    except (zipfile.BadZipFile, OSError):
        return False


def is_value_model(folder: Path) -> bool:
    """Whether shards are those of a critic. Its config.json names the class of the base model, so the weights' names tell.

    They are in the pickle beside the tensors, which are not read.
    """
    shard = next(folder.glob("model_world_size_*_rank_0.pt"))
    with zipfile.ZipFile(shard) as archive:
        names = archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
    return b"score.weight" in names or b"v_head." in names


def list_checkpoints(folder: Path, stage: str) -> list[Checkpoint]:
    """All global_step_N folders, oldest first, with what each lacks."""
    found = []
    for path in folder.glob("global_step_*"):
        match = re.fullmatch(r"global_step_(\d+)", path.name)
        if not match or not path.is_dir():
            continue
        faults = [fault for part in parts(stage) for fault in shard_faults(path / part)]
        loader, aside = path / "data.pt", path / EPOCH_END
        if not aside.is_file() and not (loader.is_file() and is_whole(loader)):
            faults.append("data.pt is missing or cut short")
        found.append(Checkpoint(path, int(match[1]), tuple(faults)))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def newest_complete(folder: Path, stage: str) -> Checkpoint | None:
    """The checkpoint to continue from or to merge."""
    complete = [checkpoint for checkpoint in list_checkpoints(folder, stage) if checkpoint.complete]
    return complete[-1] if complete else None


def prune(folder: Path, stage: str, keep: int | None) -> list[Path]:
    """Remove what is older than the newest `keep` complete checkpoints; returns what was removed.

    verl's own retention is a list in memory, so checkpoints from before a restart would stay for ever. What is newer
    than the newest complete one is never touched: it may be being written.
    """
    if keep is None:
        return []
    checkpoints = list_checkpoints(folder, stage)
    complete = [checkpoint.step for checkpoint in checkpoints if checkpoint.complete]
    if len(complete) < keep:
        return []
    old = [checkpoint.path for checkpoint in checkpoints if checkpoint.step < complete[-keep]]
    for path in old:
        shutil.rmtree(path)
    return old


# Name under which prepare_resume puts data.pt aside.
EPOCH_END = "data.at-epoch-end.pt"


def prepare_resume(folder: Path, stage: str, resume_from: Checkpoint | None, steps_per_epoch: int) -> list[str]:
    """Make the folder such that verl continues from this checkpoint (None: starts anew). Returns what was done.

    - Half-written checkpoints newer than it are removed: verl would write into them.
    - The tracker is made to agree: verl reads it even when told what to resume, and crashes on an empty one.
    - SFT at the end of an epoch: verl loads the state of an exhausted data loader and then skips an epoch. Without data.pt
      it starts the next epoch, in that epoch's order. (PPO's loop is not affected.)
    """
    said = []
    step = resume_from.step if resume_from else 0
    for checkpoint in list_checkpoints(folder, stage):
        if checkpoint.step > step:
            shutil.rmtree(checkpoint.path)
            said.append(f"removed the incomplete checkpoint {checkpoint.path.name} ({checkpoint.faults[0]})")
    tracker = folder / TRACKER
    if resume_from is None:
        tracker.unlink(missing_ok=True)
        return said
    temporary = folder / (TRACKER + ".tmp")
    temporary.write_text(str(step))
    os.replace(temporary, tracker)
    loader = resume_from.path / "data.pt"
    if stage == "sft" and step % steps_per_epoch == 0 and loader.is_file():
        os.replace(loader, resume_from.path / EPOCH_END)
    return said


def size(folder: Path) -> int:
    """Bytes in all files below a folder. Files that vanish meanwhile (being pruned) do not count."""
    total = 0
    for root, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue
    return total


def expected_size(stage: str, parameters: int) -> int:
    """Bytes of one checkpoint: weights and two Adam moments in fp32; PPO saves actor and critic.

    For 1.236e9 parameters: SFT 14.8 GB, PPO 29.7 GB.
    """
    return 12 * parameters * len(parts(stage))
