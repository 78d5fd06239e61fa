"""The table of docs/faults.md, made of what the tests of this ring saw.

    make test ARGS=tests/faults              compares how each ended with the table
    make test ARGS='tests/faults --table'    writes it
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from door import ROOT, bridge

TABLE = ROOT / "docs" / "faults.md"
HEAD = "| fault | what the door said | the same command again |\n|---|---|---|\n"


def pytest_addoption(parser) -> None:
    parser.addoption("--table", action="store_true", help="write what was seen into docs/faults.md")


@pytest.fixture
def seen(request) -> Callable[[str, str], None]:
    """Note a row of the table: the fault is the test's name."""
    def note(first: str, then: str) -> None:
        fault = request.function.__name__.removeprefix("test_").replace("_", " ")
        row = f"| {fault} | {first} | {then} |"
        text = TABLE.read_text()
        there = re.search(rf"^\| {re.escape(fault)} \|.*$", text, re.MULTILINE)
        if request.config.getoption("--table"):
            TABLE.write_text(text.replace(there[0], row) if there else text.replace(HEAD, f"{HEAD}{row}\n"))
        else:
            # Where exactly a kill has cut a save differs from run to run; how it ends does not.
            assert there and there[0].rpartition("; ")[2] == row.rpartition("; ")[2], (
                f"docs/faults.md does not have this row (--table writes it):\n{row}")

    return note


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    work_dir = tmp_path_factory.mktemp("prepared")
    for stage in ("data", "model"):
        assert bridge(stage, WORK_DIR=str(work_dir), DATA_SOURCE="builtin", MODEL="tiny").returncode == 0
    return work_dir
