"""Where the tests run, and an option for who wants to know that all ran: pytest ends well where every one was skipped."""

import os
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# Training takes memory, and all cores by itself.
MOST_PROCESSES = 4


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--none-skipped", action="store_true", help="exit status 1 where a test was skipped")


def asked_for(config: pytest.Config) -> list[Path]:
    """The files and folders that pytest was called with; tests itself if with none."""
    return [Path(argument.split("::")[0]).resolve() for argument in config.args]


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """How many processes run tests at the same time; 0 for pytest's own alone. `--numprocesses=N` overrides."""
    files = [path for path in asked_for(config) if path.is_file()]
    folders = [path for path in asked_for(config) if path.is_dir()]
    # What only one can use: the store of images, all cores, the GPU, the file that --table writes.
    if not folders and len(files) == 1 or config.getoption("table", False) or any(
            path.is_relative_to(TESTS / ring) for path in (*files, *folders) for ring in ("eight", "gpu", "image", "report")):
        return 0
    return min(MOST_PROCESSES, len(os.sched_getaffinity(0)))


def pytest_configure(config: pytest.Config) -> None:
    # On a GPU node, too, the tests run on CPU (.venv has no flash-attn), but for those in tests/gpu, which have to be asked for.
    if not any(path.is_relative_to(TESTS / "gpu") for path in asked_for(config)):
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    # Each process has a core: more threads than that wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_unconfigure() -> None:
    from door import DOOR, TRAINER

    for python in (DOOR, TRAINER):
        python.end()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    # Below xdist only the process that collects the results has one.
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    none_skipped = reporter and session.config.getoption("none_skipped")
    if none_skipped and reporter.stats.get("skipped") and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
