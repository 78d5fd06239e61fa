"""docs/faults.md has a row for each test of the ring that injects faults, and for nothing else."""

import re

from door import ROOT


def test_each_fault_that_is_injected_has_its_row_and_no_row_is_left_over():
    tests = [name for file in (ROOT / "tests" / "faults").glob("test_*.py")
             for name in re.findall(r"^def test_(\w+)\(", file.read_text(), re.MULTILINE)]
    text = (ROOT / "docs" / "faults.md").read_text()
    rows = re.findall(r"^\| (.+?) \| .*\| (.+) \|$", text[:text.index("## When")], re.MULTILINE)
    faults = {fault: then for fault, then in rows if fault != "fault"}
    assert faults.keys() == {name.replace("_", " ") for name in tests}
    assert len(tests) <= 17 and all(faults.values())
