"""Faults injected into runs of verl's real trainers on CPU. A test's name is the fault, and its row in docs/faults.md."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from bridge.runs import checkpoints, metrics, record
from door import SHELL, bridge, left_running, processes
from downloads_hub import Account, DownloadsHub

STEPS, EVERY, LAST = 9, 3, 6
SFT = ["sft", f"trainer.total_training_steps={STEPS}", f"trainer.save_freq={EVERY}", "data.train_batch_size=8",
       "data.max_length=128"]
PPO = ["ppo", "trainer.total_training_steps=2", "trainer.save_freq=1"]
# Words of the command lines of the processes that are killed.
RANK, DRIVER, RAY_WORKER = "on_cpu verl.trainer.fsdp_sft_trainer", ".loopback ", "WorkerDict"
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
        assert result.returncode == 0, result.stderr[-3000:]
        assert processes(self.work_dir).keys() <= before, "nothing of its own is left"
        words = ["set aside the", "continuing from", *(["will be set aside"] if more else [])]
        return "; ".join(self.brief(line) for line in result.stderr.splitlines()
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
        shard = self.folder / f"global_step_{step}" / part / "optim_world_size_2_rank_1.pt"
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
        return min(number for number, command in processes(self.work_dir).items()
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


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    work_dir = tmp_path_factory.mktemp("prepared")
    for stage in ("data", "model"):
        assert bridge(stage, WORK_DIR=str(work_dir), DATA_SOURCE="builtin", MODEL="tiny").returncode == 0
    return work_dir


@pytest.fixture(scope="module")
def through(tmp_path_factory, prepared) -> Case:
    """An sft that nothing happened to, with its merged model."""
    case = new_case(tmp_path_factory, prepared, SFT)
    assert case.again() == ""
    result = bridge("merge", **case.env())
    assert result.returncode == 0, result.stderr
    return case


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, prepared) -> Case:
    """An sft whose door was killed in a step. To be copied."""
    case = new_case(tmp_path_factory, prepared, SFT)
    with case.started() as door, case.in_step_after(LAST + 1, STEPS, ".", door):
        door.kill()
        case.wait_for_the_rest()
    assert case.complete().keys() == {f"global_step_{EVERY}", f"global_step_{LAST}"}
    return case


@pytest.fixture
def copy(tmp_path_factory, prepared, stopped) -> Case:
    return new_case(tmp_path_factory, prepared, SFT, copied_from=stopped)


def weights(case: Case) -> torch.Tensor:
    """All weights after the last step, as one vector."""
    shards = [torch.load(case.folder / f"global_step_{STEPS}" / f"model_world_size_2_rank_{rank}.pt", weights_only=False)
              for rank in range(2)]
    return torch.cat([shard[name].to_local().flatten().double() for shard in shards for name in sorted(shard)])


def check_kept(kept: dict[str, dict[str, bytes]], case: Case) -> None:
    """Every checkpoint that was complete is there, byte by byte; its checksums may have come since."""
    there = case.complete()
    for name, files in kept.items():
        assert name in there and [file for file in files if files[file] != there[name].get(file)] == [], name


def check_end(case: Case, through: Case, kept: dict[str, dict[str, bytes]]) -> str:
    """Compare what the run left with what an undisturbed one left. `kept`: what was complete before."""
    rows, wanted = (metrics.read(each.stage_dir / "metrics.jsonl") for each in (case, through))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row, other in zip(rows, wanted, strict=True):
        assert row["train/loss"] == pytest.approx(other["train/loss"], rel=2e-2), row["step"]
    one, other = weights(case), weights(through)
    assert ((one - other).norm() / other.norm()).item() < 1e-3
    left = case.complete()
    assert left.keys() == through.complete().keys() == {f"global_step_{LAST}", f"global_step_{STEPS}"}
    assert {path.name for path in case.folder.glob("global_step_*")} == left.keys()
    check_kept({name: files for name, files in kept.items() if name in left}, case)
    recorded = record.read(case.stage_dir)
    assert recorded["status"] == "finished" and recorded["last_step"] == STEPS
    return f"steps 1 to {STEPS}, losses and weights as without the fault"


def ended_as(case: Case, through: Case, kept: dict[str, dict[str, bytes]]) -> str:
    """Start the same command again; returns what there is to be said of it."""
    check_kept(kept, case)
    said = case.again()
    return f"{said}; {check_end(case, through, kept)}"


# ---- killed


def test_a_rank_is_killed_during_a_step(copy, stopped, through, seen):
    with copy.started() as door, copy.in_step_after(LAST + 1, STEPS, ".", door):
        os.kill(copy.process(RANK), signal.SIGKILL)
        door.wait(timeout=PATIENCE)
    assert door.returncode == 1
    seen(copy.said(), ended_as(copy, through, stopped.complete()))


def test_a_rank_is_killed_during_a_save(copy, stopped, through, seen):
    with copy.started() as door, copy.in_save_of(STEPS, ".", door):
        os.kill(copy.process(RANK), signal.SIGKILL)
        door.wait(timeout=PATIENCE)
    assert door.returncode == 1
    seen(copy.said(), ended_as(copy, through, stopped.complete()))


def test_the_door_is_killed_during_a_step(copy, stopped, through, seen):
    seen("(killed)", ended_as(copy, through, stopped.complete()))


def test_the_door_is_killed_during_a_save(copy, stopped, through, seen):
    with copy.started() as door, copy.in_save_of(STEPS, ".", door):
        door.kill()
        copy.wait_for_the_rest()
    seen("(killed)", ended_as(copy, through, stopped.complete()))


# Each of these three goes on with what the one before it left: a start of Ray and two models takes most of a minute.
@pytest.fixture(scope="module")
def ppo(tmp_path_factory, prepared) -> Iterator[Case]:
    case = new_case(tmp_path_factory, prepared, PPO)
    yield case
    # What of Ray's outlives a door that was killed has ended by itself, while the other tests ran.
    case.wait_for(lambda: not left_running(case.work_dir))


def test_a_Ray_worker_is_killed_during_a_step(ppo, seen):
    with ppo.started() as door, ppo.in_step_after(1, 2, "actor", door):
        kept = ppo.complete()
        os.kill(ppo.process(RAY_WORKER), signal.SIGKILL)
        door.wait(timeout=PATIENCE)
    assert door.returncode == 1
    seen(ppo.said(), ppo_will_go_on(ppo, kept))


def test_the_driver_of_PPO_is_killed_during_a_save(ppo, seen):
    with ppo.started() as door, ppo.in_save_of(2, "actor", door):
        kept = ppo.complete()
        os.kill(ppo.process(DRIVER), signal.SIGKILL)
        door.wait(timeout=PATIENCE)
    assert door.returncode == 128 + signal.SIGKILL
    seen(ppo.said(), ppo_will_go_on(ppo, kept))


def test_the_door_of_PPO_is_killed_during_a_save(ppo, seen):
    with ppo.started() as door, ppo.in_save_of(2, "actor", door):
        kept = ppo.complete()
        door.kill()
        # Ray's daemons follow their driver.
        ppo.wait_for_the_rest()
    assert kept.keys() == {"global_step_1"}
    check_kept(kept, ppo)
    told = ppo.again()
    assert [row["step"] for row in metrics.read(ppo.stage_dir / "metrics.jsonl")] == [1, 2]
    left = ppo.complete()
    assert left.keys() == {"global_step_1", "global_step_2"} == {path.name for path in ppo.folder.glob("global_step_*")}
    check_kept(kept, ppo)
    assert record.read(ppo.stage_dir)["status"] == "finished"
    seen("(killed; two agents of Ray's may outlive it by a minute or two, and end by themselves)",
         f"{told}; steps 1 and 2, both checkpoints")


def ppo_will_go_on(case: Case, kept: dict[str, dict[str, bytes]]) -> str:
    assert kept.keys() == {"global_step_1"}
    check_kept(kept, case)
    return f"{case.again('--dry-run')} (a dry run)"


def model_of(case: Case) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((case.stage_dir / "merged").iterdir())}


def test_the_door_is_killed_during_a_merge(through, seen):
    before, checkpoint = model_of(through), through.complete()
    with through.started("merge") as door:
        through.wait_for(lambda: any(Path(f"{through.stage_dir}/merged.tmp").rglob("*.safetensors")), door)
        door.kill()
    assert model_of(through) == before, "the model of the merge before"
    result = bridge("merge", **through.env())
    assert result.returncode == 0 and left_running(through.work_dir) == [], result.stderr
    assert model_of(through) == before and through.complete() == checkpoint
    assert [path.name for path in through.stage_dir.glob("merged*")] == ["merged"]
    seen("(killed)", "the same model; the one of before was there all the time")


def test_the_door_is_killed_during_an_upload(tmp_path, through, seen):
    settings = {"HF_REPO": "team/ours", "STAGE": "sft"}

    def kill(door: subprocess.Popen) -> bool:
        """Kill the door, and answer once what it had started is gone, too: else that could be faster than its end."""
        door.kill()
        door.wait()
        while processes(through.work_dir):
            time.sleep(0.05)
        return True

    with DownloadsHub(tmp_path / "hub", {"hf_a_token_of_a_test": Account("alice", organisations=("team",))}) as hub:
        settings.update(hub.env("hf_a_token_of_a_test"))
        with through.started("upload", **settings) as door:
            # The hub asks itself this when the weights begin to come.
            hub.may_transfer = lambda: kill(door)
        assert not any(name.endswith(".safetensors") for name in hub.files("team/ours")), "others must not see half a model"
        del hub.may_transfer
        result = bridge("upload", **through.env(**settings))
        assert result.returncode == 0, result.stderr
        assert hub.files("team/ours").items() <= model_of(through).items()
        assert {name for name in model_of(through) if name.endswith(".safetensors")} <= hub.files("team/ours").keys()
    seen("(killed)", "the whole model in one commit; nothing of it was to be seen before")


# ---- the disk


@pytest.fixture
def small_disk(tmp_path_factory, prepared, stopped) -> Iterator[Case]:
    """A WORK_DIR on a file system of 128 MiB, which only processes of a mount namespace of its own see."""
    work_dir = tmp_path_factory.mktemp("small_disk")
    mount = f"mount -t tmpfs -o size=128m tmpfs {work_dir} && echo && exec cat"
    holder = subprocess.Popen(["unshare", "--mount", "sh", "-c", mount], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        if holder.stdout.readline() != b"\n":
            pytest.skip("no mount namespace may be made here")
        inside = Path(f"/proc/{holder.pid}/root{work_dir}")
        for name in ("data", "models"):
            (inside / name).symlink_to(prepared / name)
        shutil.copytree(stopped.work_dir / "runs", inside / "runs")
        yield Case(work_dir, SFT, ("nsenter", f"--mount=/proc/{holder.pid}/ns/mnt"), inside)
    finally:
        holder.communicate()


def fill_disk_with(file: Path) -> None:
    for length in (1 << 20, 1 << 12):
        with open(file, "ab", buffering=0) as stream, suppress(OSError):
            while True:
                stream.write(bytes(length))


def test_the_disk_is_full_during_a_save(small_disk, stopped, through, seen):
    case = small_disk
    ballast = case.stage_dir.parents[2] / "ballast"
    with case.started() as door, case.in_step_after(LAST + 1, STEPS, ".", door):
        fill_disk_with(ballast)
    assert door.returncode == 1
    said = [case.brief(line) for line in case.out.read_text().splitlines() if "bridge: writing to log.txt failed" in line]
    assert len(said) == 1 and "No space left on device" in said[0], said
    ballast.unlink()
    seen(f"{said[0]}; {case.said()}", ended_as(case, through, stopped.complete()))


def test_a_shard_is_cut_short(copy, through, seen):
    kept = {f"global_step_{EVERY}": copy.complete()[f"global_step_{EVERY}"]}
    shard = copy.folder / f"global_step_{LAST}" / "model_world_size_2_rank_1.pt"
    os.truncate(shard, shard.stat().st_size // 2)
    seen("", ended_as(copy, through, kept))


def test_a_bit_of_a_shard_is_flipped(copy, through, seen):
    kept = {f"global_step_{EVERY}": copy.complete()[f"global_step_{EVERY}"]}
    checkpoints.record_checksums(copy.folder / f"global_step_{LAST}")
    shard = copy.folder / f"global_step_{LAST}" / "model_world_size_2_rank_1.pt"
    data = bytearray(shard.read_bytes())
    # Among the weights: torch.load takes it without a word.
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    torch.load(shard, weights_only=False)
    seen("", ended_as(copy, through, kept))


def test_the_tracker_is_gone(copy, stopped, through, seen):
    (copy.folder / checkpoints.TRACKER).unlink()
    seen("", ended_as(copy, through, stopped.complete()))


def test_the_tracker_names_a_step_that_is_not_there(copy, stopped, through, seen):
    (copy.folder / checkpoints.TRACKER).write_text(str(STEPS - 1))
    seen("", ended_as(copy, through, stopped.complete()))


# ---- and two at once


def test_two_start_the_same_run_at_once(copy, stopped, through, seen):
    with open(copy.work_dir / "other.out", "wb") as output:
        other = subprocess.Popen([sys.executable, "-m", "bridge", *SFT], env=copy.env(), stdout=output, stderr=subprocess.STDOUT)
    with copy.started() as door:
        other.wait(timeout=PATIENCE)
    assert sorted([door.returncode, other.returncode]) == [0, 2]
    loser = copy.work_dir / "other.out" if other.returncode else copy.out
    told = loser.read_text().splitlines()[-1]
    assert "another run works in" in told and "Traceback" not in loser.read_text()
    seen("to the second: another run works in WORK_DIR/runs/default/sft (process ... on ... since ...). Wait for it, or give "
         "this one a name of its own: RUN=NAME.", f"the first was not disturbed: {check_end(copy, through, stopped.complete())}")
