"""Where the tests run, and an option for who wants to know that all ran: pytest ends well where every one was skipped."""

import os
from pathlib import Path

import pytest

GPU = Path(__file__).with_name("gpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--none-skipped", action="store_true", help="exit status 1 where a test was skipped")


def pytest_configure(config: pytest.Config) -> None:
    # On a GPU node, too, the tests run on CPU (.venv has no flash-attn), but for those in tests/gpu, which have to be asked for.
    if not any(Path(argument.split("::")[0]).resolve().is_relative_to(GPU) for argument in config.args):
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    # Below xdist only the process that collects the results has one.
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    none_skipped = reporter and session.config.getoption("none_skipped")
    if none_skipped and reporter.stats.get("skipped") and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
