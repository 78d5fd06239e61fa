"""metrics.jsonl out of what verl prints."""

import errno
import json
import math
import time
from unittest import mock

import pytest

from bridge.runs import metrics


@pytest.mark.parametrize(("line", "step", "values"), [
    ("step:1 - train/loss:6.5 - train/lr(1e-3):1.3e-05\n", 1, {"train/loss": 6.5, "train/lr(1e-3)": 1.3e-05}),
    ("\x1b[36m(TaskRunner pid=25030)\x1b[0m step:12 - actor/entropy:6.58 - critic/lr:1e-05 - perf/mfu/actor:0.0\n", 12,
     {"actor/entropy": 6.58, "critic/lr": 1e-05, "perf/mfu/actor": 0.0}),
    ("Epoch 1/1:   3%|x         | 1/32 [00:01<00:57,  1.87s/it]step:2 - train/loss:-6.57", 2, {"train/loss": -6.57}),
    ("step:3 - a:nan - b:inf - c:-inf", 3, {"a": math.nan, "b": math.inf, "c": -math.inf}),
    ("step:64 - val/loss:2.35 Epoch 2/2: 100%", 64, {"val/loss": 2.35}),
    ("step:5 - val-core/openai/gsm8k/reward/mean@1:0.25", 5, {"val-core/openai/gsm8k/reward/mean@1": 0.25}),
])
def test_a_line_of_metrics_is_understood(line, step, values):
    found_step, found = metrics.parse(line)
    assert found_step == step
    assert found == pytest.approx(values, nan_ok=True)


@pytest.mark.parametrize("line", ["", "global_step:3 - x:1", "step:3", "trainer/step:3 - x:1", "step: 3 - x",
                                  "next step:4 - none"])
def test_other_lines_are_not(line):
    assert metrics.parse(line) is None


def test_one_line_a_step_written_at_once(tmp_path):
    file = metrics.Metrics(tmp_path / "metrics.jsonl", 0)
    file.add(1, {"loss": 2.0})
    assert values(tmp_path) == [{"step": 1, "loss": 2.0}]
    file.add(2, {"loss": 1.0})
    file.add(2, {"val": 1.5})
    assert values(tmp_path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "val": 1.5}]


def values(folder):
    return [{key: row[key] for key in row if key != "time"} for row in metrics.read(folder / "metrics.jsonl")]


def test_each_line_says_when_its_step_was_first_seen(tmp_path):
    file = metrics.Metrics(tmp_path / "metrics.jsonl", 0)
    before = time.time()
    file.add(1, {"loss": 2.0})
    time.sleep(0.2)
    file.add(2, {"loss": 1.0})
    time.sleep(0.2)
    # Validation after the step is no part of it.
    file.add(2, {"val": 1.5})
    first, second = (row["time"] for row in metrics.read(tmp_path / "metrics.jsonl"))
    assert first == pytest.approx(before, abs=0.1)
    assert second - first == pytest.approx(0.2, abs=0.1)


def test_a_resumed_run_drops_the_steps_that_it_repeats(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)) + '{"step": 6, "lo')
    file = metrics.Metrics(path, after_step=3)
    file.add(4, {"loss": 1.0})
    assert [row["step"] for row in metrics.read(path)] == [1, 2, 3, 4]


def test_a_fresh_run_starts_with_an_empty_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    metrics.Metrics(tmp_path / "metrics.jsonl", after_step=0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_what_a_full_disk_did_not_take_is_written_with_the_next_line_and_till_then_the_file_stays(tmp_path, monkeypatch):
    file = metrics.Metrics(tmp_path / "metrics.jsonl", 0)
    file.add(1, {"loss": 3.0})
    with monkeypatch.context() as full:
        full.setattr(metrics, "write_whole", mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
        for step, new in ((2, {"loss": 2.0}), (2, {"val": 1.5}), (3, {"loss": 1.0})):
            with pytest.raises(OSError, match="No space"):
                file.add(step, new)
    assert values(tmp_path) == [{"step": 1, "loss": 3.0}]
    file.write()
    assert values(tmp_path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "val": 1.5}, {"step": 3, "loss": 1.0}]


@pytest.mark.parametrize("end", [b'{"step": 2, "lo', b"\xff\xfe", b"[1]\n", b'{"loss": 1}\n', b"7\n"])
def test_a_damaged_line_ends_what_is_read(tmp_path, end):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + end)
    assert metrics.read(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_a_validation_at_the_begin_of_a_resumed_run_is_of_the_step_before(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "time": 5.0, "loss": 1.0}\n')
    kept = metrics.Metrics(tmp_path / "metrics.jsonl", 2)
    kept.add(2, {"val": 0.5})
    kept.add(3, {"loss": 0.9})
    first, second = metrics.read(tmp_path / "metrics.jsonl")
    assert first == {"step": 2, "time": 5.0, "loss": 1.0, "val": 0.5} and (second["step"], second["loss"]) == (3, 0.9)
