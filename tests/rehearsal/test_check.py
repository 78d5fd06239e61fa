"""bridge check in this environment: every package as locked, NCCL the pinned one."""

import json
import subprocess
import sys

from door import SHELL, bridge


def test_the_check_passes_and_reports_as_json(tmp_path):
    result = bridge("check", "--json", WORK_DIR=str(tmp_path / "work"))
    report = json.loads(result.stdout)
    failed = [row for row in report["results"] if row["status"] == "FAIL"]
    assert failed == [] and report["passed"] and result.returncode == 0
    seen = {row["check"]: row["seen"] for row in report["results"]}
    # Asked of the library that is loaded; torch's own constant says 2.21.5.
    assert seen["nccl of torch"].startswith("2.22.3 ") and seen["nccl of vllm"].startswith("2.22.3 ")
    assert seen["cuda of torch"] == "12.4"


def test_a_package_of_another_version_fails_the_check(tmp_path):
    # A package's metadata of another version, found first.
    info = tmp_path / "wandb-0.0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: wandb\nVersion: 0.0.1\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from bridge.tools.check import python_environment as check\n" \
           "print([(r.status, r.seen) for r in check(None, {})][1])"
    result = subprocess.run([sys.executable, "-c", code], env=SHELL, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("('FAIL', 'wandb 0.0.1 instead of ")
