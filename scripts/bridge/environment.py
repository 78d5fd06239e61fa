"""Where a stage works and with which variables: WORK_DIR, the caches below it, what is taken out of the environment."""

import fcntl
import os
import resource
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import yaml

from bridge.errors import say, sha256
from bridge.settings import CONFIGS, ROOT, Settings

# A WORK_DIR with less than this (bytes) cannot even keep a log.
LEAST_FREE = 64 << 20


def work_dir_problems(work_dir: Path) -> list[str]:
    """What keeps WORK_DIR from being written to. Its last folder is made when needed, its parent must be there."""
    cure = "Set WORK_DIR in .env to a folder on a disk with room."
    if work_dir.exists() and not work_dir.is_dir():
        return [f"WORK_DIR={work_dir} is a file. {cure}"]
    if work_dir.is_symlink() and not work_dir.exists():
        return [f"WORK_DIR={work_dir} is a symbolic link to {os.readlink(work_dir)}, which is not there. Mend the link. {cure}"]
    folder = work_dir if work_dir.is_dir() else work_dir.parent
    if not folder.is_dir():
        return [f"WORK_DIR={work_dir}: its parent folder {folder} does not exist. Make it, or correct WORK_DIR."]
    if not os.access(folder, os.W_OK | os.X_OK):
        return [f"WORK_DIR={work_dir} cannot be written to (read-only or not yours). {cure}"]
    free = shutil.disk_usage(folder).free
    return [f"WORK_DIR={work_dir} is full: {free >> 20} MiB are free. {cure}"] if free < LEAST_FREE else []


def lock_problems(folder: Path) -> list[str]:
    """Why locks do not work in a folder, in which a file is made for a moment."""
    # The caches below WORK_DIR need them: where one is refused, the library filelock stops or tries for ever (datasets#2618).
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".lock-") as file, open(file.name, "rb+") as again:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
            seen = "a lock is given to two"
        except BlockingIOError:
            return []
        except OSError as error:
            seen = f"locks do not work ({error.strerror})"
    return [f"{folder}: {seen}, so a start may wait for ever, and nothing keeps two runs apart. Set WORK_DIR to a file system "
            "with locks, or ask the administrator for them (Lustre: mounted with flock; NFS: without nolock)."]


def clean_environment(settings: Settings, env: Mapping[str, str]) -> dict[str, str]:
    """The environment for a stage: the user's, without what harms, with all caches below WORK_DIR.
    Says what it changes that a user might have meant. Also raises the limit of virtual memory."""
    cleaned = dict(env)
    variables = yaml.safe_load((CONFIGS / "environment.yaml").read_text(encoding="utf-8"))
    for name, why in variables["unset"].items():
        if cleaned.pop(name, None):
            say(f"unset {name}: {why}")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        limit = "unlimited" if hard == resource.RLIM_INFINITY else f"{hard >> 10} KiB, the hard limit"
        say(f"ulimit -v raised from {soft >> 10} KiB to {limit}")
    hf_home = Path(cleaned.get("HF_HOME") or Path(cleaned.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface")
    cache = settings.work_dir / "cache"
    # What was compiled for one set of packages is never taken with another.
    compiled = cache / "compiled" / sha256(ROOT / "requirements.lock")[:12]
    cleaned.update({name: value.format(cache=cache, compiled=compiled) for name, value in variables["set"].items()})
    for name, value in variables["default"].items():
        cleaned[name] = cleaned.get(name) or value.format(hf_home=hf_home)
    return cleaned
