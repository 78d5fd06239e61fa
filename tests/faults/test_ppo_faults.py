"""Faults injected into PPO. A test's name is the fault, and its row in docs/faults.md."""

import os
import signal
from collections.abc import Iterator

import pytest

from bridge.runs import metrics, record
from door import left_running
from fault_case import PATIENCE, Case, check_kept, new_case

PPO = ["ppo", "trainer.total_training_steps=2", "trainer.save_freq=1"]
# Words of the command lines of the processes that are killed.
DRIVER, RAY_WORKER = ".loopback ", "WorkerDict"


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
