"""Faults injected into SFT, merge and upload. A test's name is the fault, and its row in docs/faults.md."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from bridge.runs import checkpoints, metrics, record
from door import bridge, left_running, processes
from downloads_hub import Account, DownloadsHub
from fault_case import PATIENCE, Case, check_kept, new_case

STEPS, EVERY, LAST = 9, 3, 6
SFT = ["sft", f"trainer.total_training_steps={STEPS}", f"trainer.save_freq={EVERY}", "data.train_batch_size=8",
       "data.max_length=128"]
# Words of the command line of the process that is killed.
RANK = "on_cpu bridge.trainers.stoppable verl.trainer.fsdp_sft_trainer"


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


# Two faults of one run, neither of which may be noticed in what it goes on to do.
@pytest.fixture(scope="module")
def went_on(tmp_path_factory, prepared, stopped, through) -> str:
    """How the run whose door was killed in a step went on, where the tracker names a step that is not there."""
    case = new_case(tmp_path_factory, prepared, SFT, copied_from=stopped)
    (case.folder / checkpoints.TRACKER).write_text(str(STEPS - 1))
    said = ended_as(case, through, stopped.complete())
    assert said.startswith(f"continuing from global_step_{LAST} ")
    return said


def test_the_door_is_killed_during_a_step(went_on, seen):
    seen("(killed)", went_on)


def test_the_tracker_names_a_step_that_is_not_there(went_on, seen):
    seen("", went_on)


def test_the_door_is_killed_during_a_save(copy, stopped, through, seen):
    with copy.started() as door, copy.in_save_of(STEPS, ".", door):
        door.kill()
        copy.wait_for_the_rest()
    seen("(killed)", ended_as(copy, through, stopped.complete()))


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
        published = hub.files("team/ours")
        assert b"pipeline_tag" in published.pop("README.md")
        assert published.items() <= model_of(through).items()
        assert {name for name in model_of(through) if name.endswith(".safetensors")} <= published.keys()
    seen("(killed)", "the whole model in one commit; nothing of it was to be seen before")


# ---- the disk


@contextmanager
def small_disk_of(tmp_path_factory, prepared) -> Iterator[Case]:
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
        yield Case(work_dir, SFT, ("nsenter", f"--mount=/proc/{holder.pid}/ns/mnt"), inside)
    finally:
        holder.communicate()


@pytest.fixture
def small_disk(tmp_path_factory, prepared, stopped) -> Iterator[Case]:
    with small_disk_of(tmp_path_factory, prepared) as case:
        shutil.copytree(stopped.work_dir / "runs", case.stage_dir.parents[1])
        yield case


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


# ---- written in the background


@pytest.fixture(scope="module")
def behind(tmp_path_factory, prepared, through) -> dict[str, str]:
    """How a run fared whose rank was killed while a save was written, and whose disk then was full when it was written again."""
    with small_disk_of(tmp_path_factory, prepared) as case:
        background = [*SFT, "+model.external_lib=bridge.trainers.background_save"]
        case = Case(case.work_dir, background, case.prefix, case.stage_dir.parents[2])
        said = {}
        with case.started() as door, case.in_save_of(LAST, ".", door):
            # It goes on meanwhile.
            case.wait_for(lambda: metrics.read(case.stage_dir / "metrics.jsonl")[-1]["step"] > LAST, door)
            os.kill(case.process(RANK), signal.SIGKILL)
            door.wait(timeout=PATIENCE)
        assert door.returncode == 1
        said["killed"], kept = case.said(), case.complete()
        assert kept.keys() == {f"global_step_{EVERY}"}
        ballast = case.stage_dir.parents[2] / "ballast"
        with case.started() as door, case.in_step_after(EVERY + 1, LAST, ".", door):
            fill_disk_with(ballast)
        assert door.returncode == 1 and "No space left on device" in case.out.read_text()
        said["killed then"], said["full"] = case.went_on(case.out.read_text()), case.said()
        ballast.unlink()
        # The full disk takes no metrics either.
        shown = [int(step) for step in re.findall(r"step:(\d+) - train/loss", case.out.read_text())]
        assert LAST <= shown[-1] < STEPS, "not before its end"
        said["full then"] = ended_as(case, through, kept)
        return said


def test_a_rank_is_killed_while_a_save_is_written_in_the_background(behind, seen):
    seen(behind["killed"], f"{behind['killed then']}; (then the disk is full, next row)")


def test_the_disk_is_full_while_a_save_is_written_in_the_background(behind, seen):
    seen(behind["full"], behind["full then"])


# ---- and two at once


# Two faults here, too: the one who wins has no tracker.
@pytest.fixture(scope="module")
def two(tmp_path_factory, prepared, stopped, through) -> dict[str, str]:
    """What each said who started the same run at once, without a tracker there, and how it ended."""
    case = new_case(tmp_path_factory, prepared, SFT, copied_from=stopped)
    (case.folder / checkpoints.TRACKER).unlink()
    outs = [case.work_dir / "other.out", case.out]
    with open(outs[0], "wb") as output:
        other = subprocess.Popen([sys.executable, "-m", "bridge", *SFT], env=case.env(), stdout=output, stderr=subprocess.STDOUT)
    with case.started() as door:
        other.wait(timeout=PATIENCE)
    assert sorted([door.returncode, other.returncode]) == [0, 2]
    loser, winner = (out.read_text() for out in (outs if other.returncode else reversed(outs)))
    said = case.went_on(winner)
    assert said.startswith(f"continuing from global_step_{LAST} ")
    return {"loser": loser, "winner": said, "end": check_end(case, through, stopped.complete())}


def test_the_tracker_is_gone(two, seen):
    seen("", f"{two['winner']}; {two['end']}")


def test_two_start_the_same_run_at_once(two, seen):
    assert "another run works in" in two["loser"].splitlines()[-1] and "Traceback" not in two["loser"]
    seen("to the second: another run works in WORK_DIR/runs/default/sft (process ... on ... since ...). Wait for it, or give "
         "this one a name of its own: RUN=NAME.", f"the first was not disturbed: {two['end']}")
