"""The batches of a PPO that was stopped and goes on, and what counts as asked and answered. The trainers: tests/rehearsal."""

import ast

import pytest

from bridge.errors import Tolerance
from bridge.trainers import stoppable
from door import run_python

# verl's loader: a generator of its own for the order of the rows, the last batch left out. Prints the batches of a run of two
# parts, and those of one that was not stopped.
ORDER = """
import os, sys, torch
from types import SimpleNamespace
from torch.utils.data import RandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader
from bridge.trainers.stoppable import REQUEST, UntilAsked, stage_dir
EPOCHS, stop, has_state = 3, int(os.environ["STOP"]), os.environ["STATE"] == "with"

def trainer(step):
    rows = list(range(42))
    generator = torch.Generator()
    generator.manual_seed(1)
    loader = StatefulDataLoader(rows, batch_size=4, drop_last=True, sampler=RandomSampler(rows, generator=generator))
    made = SimpleNamespace(train_dataloader=loader, global_steps=step + 1, saved=[])
    made.train_dataloader = UntilAsked(made)
    made.train_dataloader.save = lambda: made.saved.append(loader.state_dict())
    return made

def fit(made, stop=None):
    seen = []
    for _ in range(EPOCHS):
        for batch in made.train_dataloader:
            seen.append(batch.tolist())
            if len(seen) == stop:
                (stage_dir() / REQUEST).touch()
    return seen

whole = fit(trainer(0))
first = trainer(0)
before = fit(first, stop)
(stage_dir() / REQUEST).unlink()
(stage_dir() / "stopped").unlink()
then = trainer(stop)
if has_state:
    then.train_dataloader.load_state_dict(first.saved[0])
after = fit(then)
print(len(whole), len(before), before + after[:len(whole) - stop] == whole)
"""


@pytest.mark.parametrize(("stop", "state"), [(3, "with"), (10, "with"), (13, "with"), (20, "with"), (23, "with"),
                                             # A checkpoint that lacks the loader's state: verl warns, and goes on.
                                             (10, "without"), (20, "without")])
def test_a_ppo_that_goes_on_gets_the_batches_that_would_have_come(tmp_path, monkeypatch, stop, state):
    for name, value in (("BRIDGE_STAGE_DIR", tmp_path), ("STOP", stop), ("STATE", state)):
        monkeypatch.setenv(name, str(value))
    assert run_python(ORDER) == f"30 {stop} True"


def test_a_request_that_came_during_the_start_ends_it_before_the_first_step(tmp_path, monkeypatch):
    for name, value in (("BRIDGE_STAGE_DIR", tmp_path), ("STOP", 3), ("STATE", "with")):
        monkeypatch.setenv(name, str(value))
    script = ORDER.replace("whole = fit(trainer(0))", "(stage_dir() / REQUEST).touch(); first = trainer(0)\n"
                           "print(fit(first), first.saved, sorted(os.listdir(stage_dir()))); sys.exit()")
    assert run_python(script) == "[] [] ['stop-requested', 'stopped']"


def test_an_answer_that_cannot_be_seen_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Tolerance, "PAUSES", (0, 0))
    (tmp_path / "file").touch()
    assert not stoppable.is_answered(tmp_path / "stopped")
    assert stoppable.is_answered(tmp_path / "file")
    assert capsys.readouterr().err == ""
    # As a stale handle: an error that does not say that there is none.
    assert not stoppable.is_answered(tmp_path / ("stopped" * 50))
    said = capsys.readouterr().err
    assert "looking for the trainer's answer failed: " in said and "was given up" in said


# What verl's own trainer writes of a validation of 30 problems, of which the second step has other answers.
SAMPLES = """
import json, os, sys
from pathlib import Path
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from bridge.trainers import stoppable
stoppable.SAMPLES_BYTES = int(os.environ["BYTES"])
trainer = object.__new__(stoppable.stoppable_ppo(RayPPOTrainer))
folder = Path(os.environ["FOLDER"])
own = folder == stoppable.stage_dir() / stoppable.SAMPLES
for trainer.global_steps in (10, 20):
    trainer._dump_generations(
        inputs=[f"problem {row}" for row in range(30)], outputs=[f"{trainer.global_steps} {row}" for row in range(30)],
        scores=[row % 2 for row in range(30)],
        reward_extra_infos_dict={"acc": list(range(30)), **({"no JSON": [{1}] * 30} if own else {})},
        dump_path=folder)
found = {file.name: [json.loads(line) for line in file.read_text().splitlines()]
         for file in sorted(folder.glob("*")) if file.is_file()}
print({name: (len(rows), rows[19]) for name, rows in found.items()})
"""


def samples(monkeypatch, stage_dir, folder, size: int) -> dict:
    for name, value in (("BRIDGE_STAGE_DIR", stage_dir), ("FOLDER", folder), ("BYTES", size)):
        monkeypatch.setenv(name, str(value))
    return ast.literal_eval(run_python(SAMPLES))


def test_of_each_validation_the_answers_to_the_same_20_problems_are_kept(tmp_path, monkeypatch):
    found = samples(monkeypatch, tmp_path, tmp_path / stoppable.SAMPLES, 10**6)
    assert found == {f"{step}.jsonl": (20, {"input": "problem 19", "output": f"{step} 19", "score": 1, "step": step})
                     for step in (10, 20)}


def test_no_more_are_kept_once_they_are_too_large_and_all_in_a_folder_of_the_users(tmp_path, monkeypatch):
    assert list(samples(monkeypatch, tmp_path, tmp_path / stoppable.SAMPLES, 100)) == ["10.jsonl"]
    (tmp_path / "own").mkdir()
    assert [rows for rows, _ in samples(monkeypatch, tmp_path, tmp_path / "own", 100).values()] == [30, 30]


def test_samples_that_cannot_be_written_end_no_training(tmp_path, monkeypatch):
    (tmp_path / stoppable.SAMPLES).mkdir()
    (tmp_path / stoppable.SAMPLES / "gone").symlink_to("nowhere")
    # How much is there already cannot be told.
    assert samples(monkeypatch, tmp_path, tmp_path / stoppable.SAMPLES, 10**6) == {}
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / stoppable.SAMPLES).write_text("a file where the folder should be")
    assert samples(monkeypatch, tmp_path / "file", tmp_path / "file" / stoppable.SAMPLES, 10**6) == {}
