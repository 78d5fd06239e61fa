"""Each file operation of the door's code fails in turn: the training goes on or never began, and nothing whole is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from door import ROOT, SHELL

PROGRAM = Path(__file__).with_name("file_errors.py")


# A process of its own: the door ends every child of the process that it is in.
@pytest.mark.long
@pytest.mark.parametrize("scenario", ["fresh", "resumed", "failing"])
def test_whichever_file_operation_fails_the_same_command_ends_as_without_the_fault(prepared, tmp_path, scenario):
    for name in ("data", "models"):
        (tmp_path / name).symlink_to(prepared / name)
    report = tmp_path / "report.json"
    result = subprocess.run([sys.executable, str(PROGRAM), str(tmp_path), scenario, str(report)], stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True, check=False, timeout=600,
                            env={**SHELL, "PYTHONPATH": os.pathsep.join((str(ROOT / "tests"), str(PROGRAM.parent)))})
    assert result.returncode == 0, result.stderr[-3000:]
    rows = json.loads(report.read_text())["rows"]
    wrong = [f"{row['fault']} ({row['outcome']}): {'; '.join(row['wrong'])[:300]}" for row in rows if row["wrong"]]
    assert not wrong, "\n".join(wrong)
    # Before the start and after it, in every part of the code there is.
    outcomes = [row["outcome"] for row in rows]
    assert outcomes.count("refused") > 20 and outcomes.count("went on") > 30
    for code in ("checkpoints.", "record.", "metrics.", "launch.", "door.", "merge: "):
        assert any(code in row["fault"] for row in rows), code
