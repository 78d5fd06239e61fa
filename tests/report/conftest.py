"""The browser of this ring (browser.py) and the page that it looks at.   make test ARGS=tests/report"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser
from selenium import webdriver

from debian import NotHere
from door import bridge
from made_runs import full, nasty, odd, training


@pytest.fixture(scope="session")
def browser(tmp_path_factory) -> Browser:
    try:
        return Browser(tmp_path_factory.mktemp("browser"))
    except NotHere as why:
        pytest.skip(str(why))


@pytest.fixture(scope="session")
def page(tmp_path_factory) -> Path:
    """The page of three runs of one kind and a slower one, made as a person makes it."""
    work_dir = tmp_path_factory.mktemp("work")
    full(work_dir, {"seed1": 1, "seed2": 2, "seed3": 3, "slower": 4}, steps=60, problems=60, length=200)
    return made(work_dir, "seed1,seed2,seed3,slower")


@pytest.fixture(scope="session")
def odd_page(tmp_path_factory) -> Path:
    """The page of runs that lack parts, and of one with answers that would break a page."""
    work_dir = tmp_path_factory.mktemp("odd")
    odd(work_dir)
    training(work_dir / "runs/nasty", "ppo", 2)
    nasty(work_dir / "runs/nasty")
    return made(work_dir, "killed,asked,old,bare,nasty")


def made(work_dir: Path, runs: str) -> Path:
    """The page of these runs."""
    result = bridge("report", WORK_DIR=str(work_dir), RUN=runs)
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.strip())


@pytest.fixture(scope="session", params=[(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")],
                ids=lambda kind: f"{kind[0]}-{kind[1]}")
def opened(request, browser) -> Iterator[webdriver.Chrome]:
    """A window as wide as a desktop's and as a phone's, in both schemes."""
    driver = browser.window(request.param[0], 844, request.param[1])
    yield driver
    driver.quit()


@pytest.fixture
def window(opened, page) -> webdriver.Chrome:
    """The page in such a window, freshly loaded, and with logs of its own."""
    for log in ("browser", "performance"):
        opened.get_log(log)
    opened.get("about:blank")
    opened.get(page.as_uri())
    return opened
