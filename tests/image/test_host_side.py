"""What Make calls on the host, with the real image; tests/unit/test_host.py drives the same scripts with a fake engine."""

import os
import shutil
import subprocess

import pytest

from door import ROOT

CONTAINER = ROOT / "scripts/host/container.sh"


@pytest.mark.skipif(not (shutil.which("apptainer") and (ROOT / "bridge.sif").is_file()),
                    reason="needs apptainer on PATH and bridge.sif (make image)")
def test_values_and_folders_reach_the_real_container_unchanged(tmp_path):
    work_dir = tmp_path / "a,b:c d 日本語"
    work_dir.mkdir()
    (work_dir / "seen").write_text("from outside")
    odd = "a b;\"c\" 'd' \\ * é"
    script = ('cat "$WORK_DIR/seen"; printf "|%s|" "$HF_ODD" "${PYTHONPATH:-none}" "$PYTHONNOUSERSITE"; '
              "ls -d /opt/bridge/configs/ppo.yaml")
    given = {"WORK_DIR": str(work_dir), "HF_ODD": odd, "PYTHONPATH": "/host", "ENGINE": "apptainer", "IMAGE": ""}
    result = subprocess.run([str(CONTAINER), "shell", "-c", script], capture_output=True, text=True, check=False, timeout=300,
                            env={**os.environ, **given})
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"from outside|{odd}||none||1|/opt/bridge/configs/ppo.yaml\n"
