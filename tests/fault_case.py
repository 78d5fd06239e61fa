"""A run of verl's real trainers on CPU into which a test injects a fault, and what is left of it."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bridge.runs import metrics, record
from door import SHELL, left_running, processes

# How long one wait for an event may take, on a busy machine too. (Undisturbed nothing takes longer than two minutes.)
PATIENCE = 300
# These of Ray's outlive a door that was killed. They see at once that their daemon is gone, and try to tell that to another which
# is gone, too.
AGENTS = ("ray/dashboard/agent.py", "ray/_private/runtime_env/agent/main.py")


class Case:
    """A WORK_DIR of its own, and the door at work in it."""

    def __init__(self, work_dir: Path, command: list[str], prefix: tuple[str, ...] = (), seen_at: Path | None = None):
        self.work_dir, self.command, self.prefix = work_dir, command, prefix
        self.stage_dir = (seen_at or work_dir) / "runs" / "default" / command[0]
        self.folder = self.stage_dir / "checkpoints"
        self.out = work_dir.with_name(work_dir.name + ".out")
        self.attempts_before = 0
        # What is written in the background has another name until it is whole.
        self.written_as = ".partial" if any("background_save" in word for word in command) else ""

    def env(self, **settings: str) -> dict[str, str]:
        return {**SHELL, "WORK_DIR": str(self.work_dir), "MODEL": "tiny", "PROFILE": "tiny", "GPUS": "2",
                "CUDA_VISIBLE_DEVICES": "", **settings}

    @contextmanager
    def started(self, *command: str, **settings: str) -> Iterator[subprocess.Popen]:
        """The door while it runs; at the end it has ended, and all that it started."""
        self.attempts_before = self.attempts()
        with open(self.out, "wb") as output:
            door = subprocess.Popen([*self.prefix, sys.executable, "-m", "bridge", *(command or self.command)], stdout=output,
                                    stderr=subprocess.STDOUT, env=self.env(**settings))
        try:
            yield door
            door.wait(timeout=PATIENCE)
        finally:
            door.kill()
            door.wait()
        self.wait_for_the_rest()

    def wait_for_the_rest(self) -> None:
        """Wait until nothing works here any more."""
        self.wait_for(lambda: all(any(agent in command for agent in AGENTS) for command in left_running(self.work_dir)))

    def wait_for(self, condition: Callable[[], object], door: subprocess.Popen | None = None) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert door is None or door.poll() is None, self.out.read_text()[-3000:]
            assert time.monotonic() < deadline, f"waited in vain: {left_running(self.work_dir)} {self.out.read_text()[-3000:]}"
            time.sleep(0.02)

    def again(self, *more: str) -> str:
        """The same command, to its end; returns what it said of how it went on."""
        before = processes(self.work_dir).keys()
        result = subprocess.run([*self.prefix, sys.executable, "-m", "bridge", *self.command, *more], env=self.env(),
                                capture_output=True, text=True, check=False, timeout=2 * PATIENCE)
        assert result.returncode == 0, result.stderr[-3000:] + result.stdout[-9000:]
        assert processes(self.work_dir).keys() <= before, "nothing of its own is left"
        return self.went_on(result.stderr, *(["will be set aside"] if more else []))

    def went_on(self, output: str, *words: str) -> str:
        """What a door said of how it went on."""
        words = ("set aside the", "continuing from", *words)
        return "; ".join(self.brief(line) for line in output.splitlines()
                         if line.startswith("bridge: ") and any(word in line for word in words))

    def brief(self, line: str) -> str:
        """A line of the door's, less what differs from machine to machine."""
        folder = self.work_dir / "runs" / "default" / self.command[0] / "checkpoints"
        for long, short in (("bridge: ", ""), (f"{folder}/", ""), (str(self.work_dir), "WORK_DIR"), ("|", "/")):
            line = line.replace(long, short)
        return line

    def complete(self) -> dict[str, dict[str, bytes]]:
        """Complete checkpoints, byte by byte."""
        return {found.path.name: {str(file.relative_to(found.path)): file.read_bytes()
                                  for file in sorted(found.path.rglob("*")) if file.is_file()}
                for found in record.saved_checkpoints(self.stage_dir, self.command[0]) if found.complete}

    def attempts(self) -> int:
        return len((record.read(self.stage_dir) or {"attempts": []})["attempts"])

    @contextmanager
    def in_step_after(self, step: int, next_save: int, part: str, door: subprocess.Popen) -> Iterator[None]:
        """Wait until this step is done and the next one is under way; the run does not get past its next save meanwhile."""
        with self.stopping_in_save_of(next_save, part, door):
            self.wait_for(lambda: [row for row in metrics.read(self.stage_dir / "metrics.jsonl") if row["step"] >= step], door)
            yield

    @contextmanager
    def in_save_of(self, step: int, part: str, door: subprocess.Popen) -> Iterator[None]:
        """Wait until the save of this step is writing rank 1's second shard, and hold it there."""
        with self.stopping_in_save_of(step, part, door) as has_come_there:
            self.wait_for(has_come_there, door)
            yield

    @contextmanager
    def stopping_in_save_of(self, step: int, part: str, door: subprocess.Popen) -> Iterator[Callable[[], bool]]:
        """Let the save of this step stop in the middle of rank 1's second shard, which is cut there where the run has ended.

        Yields what says whether it has come there.
        """
        shard = self.folder / f"global_step_{step}" / part / f"optim_world_size_2_rank_1.pt{self.written_as}"
        # What a run before left there has been put aside by then.
        self.wait_for(lambda: self.attempts() > self.attempts_before, door)
        shard.parent.mkdir(parents=True)
        # Whoever writes into it waits until it is read.
        os.mkfifo(shard)
        pipe = os.open(shard, os.O_RDONLY | os.O_NONBLOCK)
        begun = b""

        def has_come_there() -> bool:
            nonlocal begun
            with suppress(BlockingIOError):
                begun = begun or os.read(pipe, 1000)
            return bool(begun)

        try:
            yield has_come_there
            has_come_there()
        finally:
            shard.unlink()
            if begun and door.poll() is None:
                # Who still writes goes on, and what is written is lost.
                os.set_blocking(pipe, True)
                while os.read(pipe, 1 << 16):
                    pass
            elif begun:
                shard.write_bytes(begun)
            os.close(pipe)
        for folder in (shard.parent, *shard.parent.parents):
            # What was only made to hold the pipe.
            if folder == self.folder or any(folder.iterdir()):
                break
            folder.rmdir()

    def process(self, words: str) -> int:
        """The first process of this run with these words in its command line: a rank, not its data loaders."""
        return next(number for number, command in processes(self.work_dir).items()
                    if words in command and "torch.distributed.run" not in command)

    def said(self) -> str:
        """The door's last words."""
        return self.brief([line for line in self.out.read_text(errors="replace").splitlines() if line.startswith("bridge: ")][-1])


def new_case(tmp_path_factory, prepared: Path, command: list[str], copied_from: Case | None = None) -> Case:
    # Its processes are found by this path: no other may begin with it.
    work_dir = tmp_path_factory.mktemp("case") / "work"
    work_dir.mkdir()
    for name in ("data", "models"):
        (work_dir / name).symlink_to(prepared / name)
    if copied_from:
        shutil.copytree(copied_from.work_dir / "runs", work_dir / "runs")
    return Case(work_dir, command)


def check_kept(kept: dict[str, dict[str, bytes]], case: Case) -> None:
    """Every checkpoint that was complete is there, byte by byte; its checksums may have come since."""
    there = case.complete()
    for name, files in kept.items():
        assert name in there and [file for file in files if files[file] != there[name].get(file)] == [], name
