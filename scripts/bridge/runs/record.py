"""The record of a run: run.json beside the checkpoints, and the locks that keep other runs out of its folders."""

import errno
import fcntl
import json
import os
import platform
import re
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import yaml

from bridge import hardware
from bridge.compose import flatten
from bridge.errors import UsageError, read_json, say, sha256, write_whole
from bridge.image import manifest
from bridge.plan import Plan
from bridge.runs import checkpoints
from bridge.settings import CONFIGS, ROOT, SECRETS

# Keys that may differ when a run is continued (where from, its name, housekeeping), beside those that configs/memory/ sets.
MAY_DIFFER = ("trainer.project_name", "trainer.experiment_name", "trainer.logger", "trainer.resume_mode",
              "trainer.resume_from_path", "trainer.default_hdfs_dir", "ray_init.num_cpus", "trainer.max_ckpt_to_keep",
              "trainer.validation_data_dir", "trainer.rollout_data_dir",
              "trainer.max_actor_ckpt_to_keep", "trainer.max_critic_ckpt_to_keep",
              *(key for parts in checkpoints.LOAD_CONTENTS.values() for key in parts.values()))
# Modules that records name -> the names they have now. A run that was begun before goes on.
RENAMED_MODULES = {"bridge.speedups": "bridge.trainers.speedups"}
# What begin() writes into a record, and of which kind it is.
RECORD = {"status": str, "last_step": int, "config": dict | None, "inputs": dict | None, "work_dir": str | None,
          "attempts": list}
# In Ray's folder: has the host's name once its process, which will remove the folder, has locked it.
RAY_LOCK = ".bridge-lock"


def read(folder: Path) -> dict[str, Any] | None:
    """The run.json of a folder, with today's names of modules; None if there is none. A UsageError if it is no record."""
    file = folder / "run.json"
    if not file.is_file():
        return None
    try:
        record = read_json(file)
        if not isinstance(record, dict):
            raise ValueError(f"a {type(record).__name__}, not an object")
        wrong = [key for key, kind in RECORD.items() if not isinstance(record.get(key), kind)]
        if not wrong and not (record["attempts"] and all(
                isinstance(attempt, dict) and isinstance(attempt.get("command"), list) for attempt in record["attempts"])):
            wrong = ["attempts"]
        if wrong:
            raise ValueError(f"it lacks, or has of another kind: {', '.join(wrong)}")
        return masked(record, {rf"\A{re.escape(old)}\Z": new for old, new in RENAMED_MODULES.items()})
    except ValueError as error:
        raise UsageError(f"{file} is damaged ({error}), so it is not known what this run was. Move {folder} away, or give "
                         "this run another name (RUN=NAME).") from error


def write_json(file: Path, content: Any, secrets: list[str]) -> None:
    """Write a file of JSON whole or not at all, with any secret that slipped into a value masked."""
    content = masked(content, {re.escape(secret): "***" for secret in secrets})
    write_whole(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def masked(value: Any, hidden: Mapping[str, str]) -> Any:
    """The same with each hidden pattern replaced by its word, in every text that is a value; keys and structure stay."""
    if isinstance(value, dict):
        return {key: masked(part, hidden) for key, part in value.items()}
    if isinstance(value, list):
        return [masked(part, hidden) for part in value]
    if isinstance(value, str):
        for pattern, word in hidden.items():
            value = re.sub(pattern, word, value)
    return value


def secret_values(env: Mapping[str, str]) -> list[str]:
    """The secrets in an environment, to be masked wherever text is kept."""
    return [env[name] for name in SECRETS if env.get(name)]


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def git_commit() -> str | None:
    """Commit of the checkout (with "-dirty" if it was edited), or what the image was built from; None if unknown."""
    if os.environ.get("BRIDGE_COMMIT"):
        return os.environ["BRIDGE_COMMIT"]
    if image := manifest.read():
        return image["recipe_commit"]
    if not (ROOT / ".git").exists():
        return None
    found = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"],
                           capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def machine(env: Mapping[str, str]) -> dict[str, Any]:
    """Where and with what a run was made."""
    return {
        "host": socket.gethostname(), "job": env.get("SLURM_JOB_ID"),
        # Seconds since 1970: of scripts/host/job.sh, or of a newer Slurm itself.
        "job_end": env.get("BRIDGE_JOB_END") or env.get("SLURM_JOB_END_TIME"), "python": platform.python_version(),
        "driver": hardware.driver_version(), "gpus": [gpu.name for gpu in hardware.visible_gpus(env)],
        "kernel": platform.release(), "cpus": hardware.cpu_count(), "memory_gib": psutil.virtual_memory().total >> 30,
        "git_commit": git_commit(), "lock_sha256": sha256(ROOT / "requirements.lock"),
        "configs_sha256": {str(file.relative_to(CONFIGS)): sha256(file) for file in sorted(CONFIGS.rglob("*.yaml"))},
        # Apptainer sets the first, the OCI image the second; neither: run from a virtual environment.
        "image": env.get("APPTAINER_CONTAINER") or env.get("BRIDGE_IMAGE"),
    }


def keep_previous(folder: Path) -> None:
    """At a fresh start: what an earlier try left in the log, the metrics and the samples stays, as previous-log.txt and so on."""
    for name in ("log.txt", "metrics.jsonl", "samples"):
        if (folder / name).exists():
            if name == "samples" and (folder / "previous-samples").exists():
                shutil.rmtree(folder / "previous-samples")
            os.replace(folder / name, folder / f"previous-{name}")


def begin(plan: Plan, env: Mapping[str, str]) -> dict[str, Any]:
    """The record at the start of a run. Attempts before a resume stay in it; a fresh start forgets them."""
    before = read(plan.record_dir) if plan.resume_step else None
    attempt = {"started": now(), "from_step": plan.resume_step, "command": plan.command, "environment": plan.env,
               **machine(env)}
    return {"status": "running", "last_step": plan.resume_step, "steps": plan.steps, "config": plan.config, "inputs": plan.inputs,
            "work_dir": plan.env.get("WORK_DIR"), "attempts": [*(before["attempts"] if before else []), attempt]}


def end(record: dict[str, Any], status: int, last_step: int) -> dict[str, Any]:
    """The record at the end of a run, which left a checkpoint of `last_step` (0: none)."""
    record["status"] = {0: "finished", os.EX_TEMPFAIL: "stopped"}.get(status, "failed")
    record["last_step"] = last_step
    record["attempts"][-1].update(ended=now(), exit_status=status)
    return record


def finish(plan: Plan, env: Mapping[str, str]) -> None:
    """Let the record of a run that has made all its steps say so; its last attempt ended as it did."""
    recorded, newest = read(plan.record_dir), checkpoints.newest_complete(plan.checkpoints, plan.saved)
    recorded |= {"status": "finished", "last_step": newest.step if newest else 0}
    write_json(plan.record_dir / "run.json", recorded, secret_values(env))


def moved(record: Mapping[str, Any], work_dir: Path | str) -> tuple[dict, dict]:
    """The configuration and the inputs of a record as they read now that its WORK_DIR lies there."""
    config, inputs = json.loads(json.dumps([record["config"], record["inputs"]]).replace(
        json.dumps(record["work_dir"])[1:-1], json.dumps(str(work_dir))[1:-1]))
    return config, inputs


def difference(record: Mapping[str, Any], plan: Plan) -> list[str]:
    """What differs between a recorded run and the planned one: "key: recorded -> planned". A moved WORK_DIR is left out."""
    config, inputs = moved(record, plan.env["WORK_DIR"])
    # Last words of the keys that a preset sets: verl takes some of them over elsewhere.
    of_the_machine = {key.rpartition(".")[2] for file in CONFIGS.glob("memory/*/*.yaml")
                      for key in flatten(yaml.safe_load(file.read_text()))}
    # What an older version did not record is not compared.
    now = {name: value for name, value in plan.inputs.items() if name in inputs}
    lines = []
    for old, new in ((config, plan.config), (inputs, now)):
        old, new = flatten(old), flatten(new)
        lines += [f"{key}: {old.get(key)} -> {new.get(key)}" for key in sorted(old.keys() | new.keys())
                  if key not in MAY_DIFFER and key.rpartition(".")[2] not in of_the_machine and old.get(key) != new.get(key)]
    return lines


def saved_checkpoints(stage_dir: Path, stage: str) -> list[checkpoints.Checkpoint]:
    """What a run has saved, oldest first, each judged by what its configuration saves; none without a record."""
    record = read(stage_dir)
    if record is None:
        return []
    return checkpoints.list_checkpoints(stage_dir / "checkpoints", checkpoints.contents(stage, record["config"]))


def holder(folder: Path) -> str | None:
    """Who holds the folder's lock; None if nobody does, or where that cannot be seen. A look keeps nobody out."""
    with suppress(OSError), open(folder / ".lock") as file:
        # The system's struct flock, which it answers with the lock in the way.
        answer = fcntl.fcntl(file, fcntl.F_GETLK, struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        if struct.unpack("hhqqi", answer)[0] != fcntl.F_UNLCK:
            return file.read().strip() or "unknown process"
    return None


@contextmanager
def locked(folder: Path, cure: str = "Wait for it, or give this one a name of its own: RUN=NAME.") -> Iterator[None]:
    """Hold the folder's lock; it goes with the process, however that ends. A UsageError if another process holds it."""
    file = open(folder / ".lock", "a+")  # noqa: SIM115 - held as long as the lock
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            raise UsageError(f"another run works in {folder} ({file.read().strip() or 'unknown process'}). {cure}") from None
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
        # Some parallel file systems are mounted without locks.
        say(f"{folder} is on a file system without locks: nothing keeps a second run out of it")
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {now()}\n")
        file.flush()
        yield
    finally:
        # What was to be done is done, and the lock goes with the process in any case.
        with suppress(OSError):
            file.close()


def keep_ray_folder(folder: str) -> None:
    """Keep Ray's folder, just made, while this process lives; of this user's beside it those go that no one on this host uses."""
    used = {Path((found.info["environ"] or {}).get("RAY_TMPDIR", "")).name for found in psutil.process_iter(["environ"])}
    for left in Path(folder).parent.glob("ray-*"):
        # Locked ones stay, and those where no lock can be had.
        with suppress(OSError), open(left / RAY_LOCK, "r+") as file:
            if left.lstat().st_uid == os.geteuid() and left.name not in used and file.read() == socket.gethostname():
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
    with suppress(OSError):
        # Never closed: the lock goes with the process.
        fcntl.lockf(kept := os.open(f"{folder}/{RAY_LOCK}", os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(kept, socket.gethostname().encode())
