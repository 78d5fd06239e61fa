"""tests/gpu/end_to_end.py reads where the time of a run went; here of a run of whole seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from door import recorded

SCRIPT = Path(__file__).parents[1] / "gpu" / "end_to_end.py"


def test_the_parts_are_the_run(tmp_path):
    folder = tmp_path / "run" / "ppo"
    folder.mkdir(parents=True)
    attempt = {"started": "2026-01-01T00:00:00+00:00", "ended": "2026-01-01T00:02:00+00:00", "from_step": 1, "gpus": ["A", "B"],
               "cpus": 4, "git_commit": "c", "command": ["python", "-m", "verl.trainer.main_ppo", "a=1"]}
    run = recorded(attempts=[{"command": ["python"]}, attempt], config={"trainer": {"n_gpus_per_node": 1}})
    (folder / "run.json").write_text(json.dumps(run))
    began = 1767225600
    rows = [{"step": 1, "time": began - 50, "timing_s/step": 9.0},
            {"step": 2, "time": began + 50, "timing_s/step": 10.0},
            {"step": 3, "time": began + 90, "timing_s/step": 40.0, "timing_s/save_checkpoint": 20.0, "timing_s/testing": 5.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = subprocess.run([sys.executable, SCRIPT, folder], capture_output=True, text=True, check=True)
    found = json.loads(result.stdout)["run"]
    assert found["seconds"] == {"whole": 120, "start": 40, "steps": 25, "saves": 20, "validations": 5, "end": 30, "between": 0}
    assert found["each"]["step"] == {"median": pytest.approx(12.5), "first": 10, "longest": 15}
    assert found["gpus"] == ["A"] and found["overrides"] == ["a=1"] and found["saves"] == found["validations"] == 1
