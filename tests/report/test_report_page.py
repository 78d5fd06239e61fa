"""The page of `make report` in a real browser: it asks for nothing, says no error, fits a phone, and answers in three clicks."""

import json
from datetime import datetime

import pytest
from selenium.webdriver.common.by import By

from bridge.errors import read_json

WIDEST = "return Math.max(document.documentElement.scrollWidth, document.body.scrollWidth) - document.documentElement.clientWidth"


def asked_for(driver) -> set[str]:
    """The addresses that the page has asked for so far."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return {message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"}


def shown(driver, selector: str) -> list:
    return [found for found in driver.find_elements(By.CSS_SELECTOR, selector) if found.is_displayed()]


def click(driver, selector: str, which: int = 0):
    found = shown(driver, selector)[which]
    found.click()
    return found


def test_it_asks_for_nothing_says_no_error_and_fits(window, page):
    # All that can be unfolded and picked.
    for button in shown(window, "#answers td button:enabled"):
        window.execute_script("arguments[0].click()", button)
    window.execute_script("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    for choose in shown(window, "select"):
        window.execute_script("const [target] = arguments; target.selectedIndex = target.length - 1;"
                              "target.onchange({target})", choose)
    assert window.execute_script(WIDEST) <= 0
    assert window.get_log("browser") == []
    assert asked_for(window) - {"about:blank"} == {page.as_uri()}


def test_a_request_would_be_seen_and_is_refused(window, page):
    # What the test above relies on.
    window.execute_async_script("const done = arguments[0]; fetch('http://127.0.0.1:9/').then(done, done)")
    assert "http://127.0.0.1:9/" in asked_for(window) or "Content Security Policy" in str(window.get_log("browser"))


def test_which_answers_changed_in_three_clicks(window):
    click(window, "#nav a[href='#answers']")
    number = click(window, "#answers button[data-pair='seed1 base ppo up']")
    click(window, "#list summary")
    assert number.text == str(len(window.find_elements(By.CSS_SELECTOR, "#list details")))
    said = shown(window, "#list details")[0].text
    assert said.count("wrong (score 0)") == 1 and said.count("right (score 1)") == 1 and "Truth: " in said
    assert "scorer took" in said and "apples" in said


def test_why_a_run_is_slower_in_one_click(window):
    speed = window.find_element(By.ID, "runs").text
    assert "slower’s PPO takes" in speed and "the largest difference is gen, +2." in speed
    click(window, "#nav a[href='#time']")
    rows = [row.text.split() for row in shown(window, "#time table")[1].find_elements(By.CSS_SELECTOR, "tbody tr")]
    # The largest difference first, below that of all.
    assert rows[0][:3] == ["a", "whole", "step"] and rows[1][0] == "gen" and float(rows[1][-1].replace("+", "")) > 2


def test_every_chart_is_drawn_with_a_band_for_the_seeds(window):
    charts = shown(window, ".chart canvas")
    assert len(charts) > 10
    # Not one colour alone.
    drawn = window.execute_script("""return [...document.querySelectorAll('#curves-ppo .chart canvas')].map(canvas =>
        new Set(new Uint32Array(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.buffer)).size)""")
    assert min(drawn) > 5, drawn
    legend = window.find_element(By.CSS_SELECTOR, "#curves-ppo .legend").text
    assert "seed1, seed2, seed3 (3 seeds)" in legend and "slower" in legend


def test_gpu_hours_are_those_of_the_attempts(window, page):
    attempt = read_json(page.parents[1] / "runs/seed1/ppo/run.json")["attempts"][0]
    start, end = (datetime.fromisoformat(attempt[key]).timestamp() for key in ("started", "ended"))
    # On two GPUs.
    [row] = [row.text for row in shown(window, "#runs tr") if {"seed1", "PPO", "reward"} <= {*row.text.split()}]
    assert f"{2 * (end - start) / 3600:.2f}" in row


def test_what_differs_is_told(window):
    settings = window.find_element(By.ID, "settings").text
    assert "actor_rollout_ref.actor.optim.lr" in settings and "data.seed" in settings
    assert "trainer.default_local_dir" not in settings.partition("that are the same")[0]


@pytest.mark.parametrize("text", ["計算"])
def test_letters_of_japanese_have_a_font(window, text):
    # A letter without one is a box, as wide and as dark as any other's.
    widths = window.execute_script("""const context = document.createElement('canvas').getContext('2d');
        context.font = getComputedStyle(document.body).font;
        const looks = letter => { context.clearRect(0, 0, 40, 40); context.fillText(letter, 0, 30);
            return [...context.getImageData(0, 0, 40, 40).data].join(); };
        return new Set([...arguments[0], '\\u{10ffff}'].map(looks)).size""", text)
    assert widths == len(text) + 1


def test_runs_that_lack_parts_and_texts_that_break_pages_do_no_harm(opened, window, odd_page):
    opened.get(odd_page.as_uri())
    assert opened.title == "killed, asked, old, bare, nasty"
    said = opened.find_element(By.TAG_NAME, "body").text
    for part in ("killed: PPO is running", "asked has no SFT", "old: SFT is failed", "bare: SFT is without a run.json"):
        assert part in said, part
    # A run that still goes lasts to its last step.
    [row] = [row.text for row in shown(opened, "#runs tr") if "killed" in row.text]
    assert "running, 3 steps" in row and "2 min" in row
    click(opened, "#answers button[data-pair='nasty base ppo up']")
    click(opened, "#list summary")
    assert "</script><script>document.title='out'</script><!--<script><b>bold</b>" in shown(opened, "#list")[0].text
    assert opened.execute_script(WIDEST) <= 0 and opened.title == "killed, asked, old, bare, nasty"
    assert opened.get_log("browser") == [] and all(address.startswith(("file:", "about:")) for address in asked_for(opened))
